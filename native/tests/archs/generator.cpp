// Upstream's generator is in a test program, tests/test-llama-archs.cpp. Here it is compiled as it is, for two of its
// functions: get_gguf_ctx makes the keys of a tiny file, set_tensor_data the weights.

#define main static upstream_main
#include "test-llama-archs.cpp"
#undef main

#include "llama-model.h"

#include "generator.h"

#include <limits>

//
// the keys of a file, named without the architecture in front
//

static std::string full_key(gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, "general.architecture");

    return std::string(gguf_get_val_str(file, id)) + "." + key;
}

static void remove_key(gguf_context * file, const char * key) {
    if (gguf_remove_key(file, full_key(file, key).c_str()) < 0) {
        throw std::runtime_error(std::string("upstream's generator no longer writes the key ") + key);
    }
}

static void set_key(gguf_context * file, const char * key, uint32_t value) {
    gguf_set_val_u32(file, full_key(file, key).c_str(), value);
}

static void set_key(gguf_context * file, const char * key, float value) {
    gguf_set_val_f32(file, full_key(file, key).c_str(), value);
}

template <typename T>
static void set_array(gguf_context * file, const char * key, gguf_type type, const std::vector<T> & value) {
    gguf_set_arr_data(file, full_key(file, key).c_str(), type, value.data(), value.size());
}

static void set_key(gguf_context * file, const char * key, const std::vector<uint32_t> & value) {
    set_array(file, key, GGUF_TYPE_UINT32, value);
}

// so short that a text of a few hundred tokens is several times as long
static const uint32_t n_ctx_orig = 64;

static void set_yarn(gguf_context * file) {
    gguf_set_val_str(file, full_key(file, "rope.scaling.type").c_str(), "yarn");
    set_key(file, "rope.scaling.factor", 16.0f);
    set_key(file, "rope.scaling.original_context_length", n_ctx_orig);
}

//
// variants
//

static void no_sliding_window(gguf_context * file) {
    remove_key(file, "attention.sliding_window");
}

static void no_sections(gguf_context * file) {
    remove_key(file, "rope.dimension_sections");
}

// what upstream's generator leaves out for good: a file of Gemma 4 has arrays in places where the others have numbers
static void complete_gemma4(gguf_context * file) {
    set_key(file, "attention.sliding_window_pattern", { 1, 1, 0, 1, 0 });
    set_key(file, "attention.key_length",             uint32_t(512));
    set_key(file, "attention.value_length",           uint32_t(512));
    set_key(file, "attention.key_length_swa",         uint32_t(256));
    set_key(file, "attention.value_length_swa",       uint32_t(256));
    set_key(file, "rope.dimension_count_swa",         uint32_t(256));
}

// where upstream's own test would abort or refuse its model
static void complete(const std::string & arch, gguf_context * file) {
    gguf_set_val_u32(file, "tokenizer.ggml.token_type_count", 2); // BERTs have that

    if (arch == "gemma4") {
        complete_gemma4(file);
    } else if (arch == "graniteswitch") {
        set_key(file, "attention.scale",               1.0f/128); // as Granite's files have it
        set_key(file, "adapters.count",                uint32_t(3));
        set_key(file, "adapters.lora_rank",            uint32_t(8));
        set_array(file, "adapters.token_ids_activate",   GGUF_TYPE_INT32, std::vector<int32_t>{ 1, 50, 100 });
        set_array(file, "adapters.token_ids_substitute", GGUF_TYPE_INT32, std::vector<int32_t>{ 2, 2, 3 });
    } else if (arch == "nomic-bert-moe") {
        set_key(file, "moe_every_n_layers", uint32_t(2));
    } else if (arch == "bailingmoe3") {
        remove_key(file, "kda.safe_gate");
    } else if (arch == "plm") {
        set_key(file, "attention.key_length",   uint32_t(192));
        set_key(file, "attention.value_length", uint32_t(128));
        set_key(file, "rope.dimension_count",   uint32_t(64));
    } else if (arch == "rwkv7" || arch == "arwkv7") {
        set_key(file, "attention.decay_lora_rank",              uint32_t(64));
        set_key(file, "attention.iclr_lora_rank",               uint32_t(64));
        set_key(file, "attention.value_residual_mix_lora_rank", uint32_t(32));
        set_key(file, "attention.gate_lora_rank",               uint32_t(128));
        set_key(file, "token_shift_count",                      uint32_t(arch == "rwkv7" ? 2 : 1));
    } else if (arch == "rwkv6qwen2") {
        set_key(file, "token_shift_count", uint32_t(1));
    }
}

static std::vector<arch_model> variants() {
    std::vector<arch_model> res;

    const auto add = [&](const char * arch, const char * variant, void (*edit)(gguf_context *), void (*tune)(llama_model &) = nullptr) {
        res.push_back({ arch, variant, moe_mandatory(llm_arch_from_string(arch)), edit, tune });
    };

    // files with and without a sliding window, or with M-RoPE and without
    for (const char * arch : { "gemma3", "laguna", "lfm2", "mellum", "olmo2", "plamo3", "smallthinker" }) {
        add(arch, "full", no_sliding_window);
    }
    add("exaone4", "sliding", [](gguf_context * file) {
        set_key(file, "block_count", uint32_t(64)); // only a model of 64 layers has one
        set_key(file, "embedding_length", uint32_t(64));
        set_key(file, "feed_forward_length", uint32_t(96));
    });
    for (const char * arch : { "glm4", "glm4moe", "hunyuan_vl", "bailingmoe3" }) {
        add(arch, "text", no_sections);
    }

    // the sections that files have: upstream's sum up to more than there are pairs
    add("qwen2vl",   "sections", [](gguf_context * file) { set_key(file, "rope.dimension_sections", { 16, 24, 24, 0 }); });
    add("paddleocr", "sections", [](gguf_context * file) { set_key(file, "rope.dimension_sections", { 16, 24, 24, 0 }); });
    for (const char * arch : { "qwen3vl", "qwen3vlmoe" }) {
        add(arch, "sections", [](gguf_context * file) { set_key(file, "rope.dimension_sections", { 24, 20, 20, 0 }); });
    }
    for (const char * arch : { "qwen35", "qwen35moe" }) {
        add(arch, "sections", [](gguf_context * file) {
            set_key(file, "rope.dimension_sections", { 11, 11, 10, 0 });
            set_key(file, "rope.dimension_count", uint32_t(64));
        });
    }
    for (const char * arch : { "glm4", "glm4moe" }) {
        add(arch, "sections", [](gguf_context * file) {
            set_key(file, "rope.dimension_sections", { 8, 12, 12, 0 });
            set_key(file, "rope.dimension_count", uint32_t(64));
        });
    }

    // queries scaled by position
    add("mistral3", "temperature", [](gguf_context * file) {
        set_yarn(file);
        set_key(file, "attention.temperature_scale", 0.1f);
    });
    for (const char * arch : { "deepseek2", "mistral4" }) {
        add(arch, "temperature", [](gguf_context * file) {
            set_yarn(file);
            set_key(file, "rope.scaling.yarn_log_multiplier", 0.1f);
            set_key(file, "attention.temperature_scale", 0.1f);
            set_key(file, "attention.temperature_length", n_ctx_orig);
        });
    }

    // rotations that depend on the original context length
    for (const char * arch : { "gpt-oss", "laguna", "llama", "olmo2", "qwen3next" }) {
        add(arch, "yarn", set_yarn);
    }

    add("deepseek2", "expanded", [](gguf_context * file) { // files from before llama.cpp absorbed the projections
        remove_key(file, "attention.key_length_mla");
        remove_key(file, "attention.value_length_mla");
        set_key(file, "attention.key_length",   uint32_t(192));
        set_key(file, "attention.value_length", uint32_t(128));
    });
    add("gemma4", "shared", [](gguf_context * file) { set_key(file, "attention.shared_kv_layers", uint32_t(2)); });
    add("granite_swa", "nope", [](gguf_context * file) { set_key(file, "attention.rope_pattern", { 0, 1 }); });
    add("hy_v4", "dense", [](gguf_context * file) { remove_key(file, "attention.indexer.top_k"); });
    add("mpt", "alibi", nullptr, [](llama_model & model) { model.pos_embd = nullptr; }); // most files have none

    return res;
}

struct weight_params {
    tensor_data_params upstream;
    float              scale; // what scales of norms are around
};

// Upstream's weights are all around 0. With scales of norms like that little comes through a layer, or of a key, and
// factors of frequencies divide angles: a file has 1 or more there.
static void set_weights(ggml_tensor * tensor, void * userdata) {
    auto & params = *(weight_params *) userdata;

    set_tensor_data(tensor, &params.upstream);

    const bool is_scale  = strstr(tensor->name, "norm.weight") != nullptr;
    const bool is_factor = strncmp(tensor->name, "rope_f", 6) == 0;
    if (!is_scale && !is_factor) {
        return;
    }
    GGML_ASSERT(tensor->type == GGML_TYPE_F32);

    // with larger queries and keys a single key gets all of the attention, and a last digit decides which
    const bool  is_qk = strstr(tensor->name, "_q_norm") || strstr(tensor->name, "_k_norm");
    const float scale = is_qk ? params.scale/2 : params.scale;

    std::vector<float> values(ggml_nelements(tensor));
    ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
    for (float & value : values) {
        value = is_factor ? 1.0f + std::fabs(value) : scale + value;
    }
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

static void set_nothing(ggml_tensor *, void *) {}

// what some architectures have fixed at thousands of tokens, as short as the others have it: a text has several of them
static void shorten(llama_hparams & hparams) {
    if (hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED) {
        hparams.n_swa = 96; // no power of two
    } else if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        hparams.n_swa = std::min(hparams.n_swa, 32u);
    }
    hparams.n_attn_temp_floor_scale = std::min(hparams.n_attn_temp_floor_scale, n_ctx_orig);
}

// upstream's lists name what its test can make
static bool is_moe_too(llm_arch arch) {
    return arch == LLM_ARCH_DEEPSEEK2OCR || arch == LLM_ARCH_NOMIC_BERT_MOE;
}

std::vector<arch_model> all_arch_models() {
    std::vector<arch_model> res;

    const auto more = variants();

    for (const llm_arch arch : llm_arch_all()) {
        if (arch == LLM_ARCH_UNKNOWN) {
            continue;
        }
        const std::string name = llm_arch_name(arch);

        res.push_back({ name, "", moe_mandatory(arch) || is_moe_too(arch) });
        if (moe_implemented(arch) && !moe_mandatory(arch)) {
            res.push_back({ name, "moe", true });
        }
        std::copy_if(more.begin(), more.end(), std::back_inserter(res), [&](const arch_model & m) { return m.arch == name; });
    }

    return res;
}

llama_model_ptr make_model(const arch_model & what, bool has_weights, ggml_backend_dev_t device) {
    const gguf_context_ptr file = get_gguf_ctx(llm_arch_from_string(what.arch), what.moe);

    complete(what.arch, file.get());
    if (what.edit) {
        what.edit(file.get());
    }

    ggml_backend_dev_t devices[] = { device, nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices           = devices;
    params.n_gpu_layers      = device ? -1 : 0;
    params.no_alloc          = !has_weights;
    params.progress_callback = silent_model_load_progress;

    // Gemma 3n's 22 layers make much of a last digit, and so does Gemma 4, which does not divide scores by a head's size
    const bool is_sensitive = what.arch == "gemma3n" || what.arch == "gemma4";

    weight_params weights = { { /*.seed =*/ 1, /*.stdev =*/ 0.1f }, /*.scale =*/ is_sensitive ? 0.0f : 1.0f };

    llama_model_ptr model(llama_model_init_from_user(file.get(), has_weights ? set_weights : set_nothing, &weights, params));
    if (!model) {
        throw std::runtime_error("llama.cpp cannot make the model");
    }
    shorten(model->hparams);
    if (what.arch == "rwkv6qwen2") {
        for (auto & layer : model->layers) {
            layer.time_mix_first = nullptr; // files have none
        }
    }
    if (what.tune) {
        what.tune(*model);
    }

    return model;
}

std::vector<llama_token> random_tokens(uint32_t n_tokens, size_t seed) {
    return get_tokens(n_tokens, 128, seed); // the smallest vocabulary that a model has
}

double error_between(const std::vector<float> & expected, const std::vector<float> & actual) {
    if (expected.empty() || expected.size() != actual.size()) {
        return std::numeric_limits<double>::infinity();
    }

    double error = 0.0;
    double power = 0.0;

    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(expected[i]) || !std::isfinite(actual[i])) {
            return std::numeric_limits<double>::infinity();
        }
        if (std::fabs(expected[i]) > 1e30f || std::fabs(actual[i]) > 1e30f) {
            continue; // Chameleon's tokens for images, which llama.cpp masks in the first row only
        }
        const double diff = (double) actual[i] - expected[i];

        error += diff*diff;
        power += (double) expected[i]*expected[i];
    }

    return power > 0.0 ? error/power : std::numeric_limits<double>::infinity();
}
