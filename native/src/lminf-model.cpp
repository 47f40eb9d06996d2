#include "lminf-model.h"
#include "lminf-memory.h"

#include "llama-impl.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <typeinfo>

// the smallest memory that llama.cpp itself would make for this model, to see which kind it is
static llama_memory_ptr create_stock_memory(const llama_model & model) {
    const llama_memory_params params = {
        /*.type_k    =*/ GGML_TYPE_F16,
        /*.type_v    =*/ GGML_TYPE_F16,
        /*.swa_full  =*/ false,
        /*.ctx_type  =*/ LLAMA_CONTEXT_TYPE_DEFAULT,
        /*.mem_other =*/ nullptr,
    };

    llama_cparams cparams = {};
    cparams.n_ctx     = 1;
    cparams.n_ctx_seq = 1;
    cparams.n_batch   = 1;
    cparams.n_ubatch  = 1;
    cparams.n_seq_max = 1;

    cparams.flash_attn = true; // values that lie as they come: of any size

    return llama_memory_ptr(model.create_memory(params, cparams));
}

// a class derived from a known one is a new kind
template <typename T>
static const T * as(const llama_memory_i * memory) {
    return memory && typeid(*memory) == typeid(T) ? static_cast<const T *>(memory) : nullptr;
}

namespace {

struct stock_parts {
    const llama_kv_cache         * full      = nullptr;
    const llama_kv_cache         * sliding   = nullptr;
    const llama_kv_cache         * selecting = nullptr; // keys of a selector
    bool                           selects_blocks = false;
    const llama_memory_recurrent * recurrent = nullptr;
};

}

static stock_parts find_parts(const llama_memory_i * memory) {
    stock_parts res;

    if (const auto * hybrid = as<llama_memory_hybrid>(memory)) {
        res.recurrent = hybrid->get_mem_recr();
        memory        = hybrid->get_mem_attn();
    } else if (const auto * hybrid_iswa = as<llama_memory_hybrid_iswa>(memory)) {
        res.recurrent = hybrid_iswa->get_mem_recr();
        memory        = hybrid_iswa->get_mem_attn();
    }

    if (const auto * dsa_iswa = as<llama_kv_cache_dsa_iswa>(memory)) {
        res.sliding = dsa_iswa->get_swa();
        memory      = dsa_iswa->get_dsa();
    }
    if (const auto * dsa = as<llama_kv_cache_dsa>(memory)) {
        res.full      = dsa->get_mla();
        res.selecting = dsa->get_lid();
    } else if (const auto * msa = as<llama_kv_cache_msa>(memory)) {
        res.full           = msa->get_base();
        res.selecting      = msa->get_idx();
        res.selects_blocks = true;
    } else if (const auto * iswa = as<llama_kv_cache_iswa>(memory)) {
        res.full    = iswa->get_base();
        res.sliding = iswa->get_swa();
    } else {
        res.full = as<llama_kv_cache>(memory);
    }

    return res;
}

struct reason {
    const char * why;
    const char * remedy = "run it without one, within its training length";
};

static const char * const no_stream = "run it without one, as it has no stream to bound";

static reason find_reason(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.vocab_only) {
        return { "only its vocabulary was loaded, and there is nothing to run", "load its weights as well" };
    }
    if (llama_model_has_encoder(&model)) {
        return { "it has an encoder, which reads its whole input at once", no_stream };
    }
    if (!hparams.causal_attn) {
        return { "its attention is not causal, so it reads its whole input at once", no_stream };
    }

    // what a file can contradict itself in, and llama.cpp ends the process for
    const char * const convert = "convert it again";
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && !hparams.is_swa_any()) {
        return { "its file names a sliding window and no layer that has one", convert };
    }
    if (hparams.is_swa_any() && (hparams.n_swa == 0 || hparams.n_swa > INT32_MAX/4/lminf_stream::min_block)) {
        return { "its file names a sliding window of a length that makes no sense", convert };
    }
    if (hparams.n_pos_per_embd() > 1 && std::accumulate(hparams.rope_sections.begin(), hparams.rope_sections.end(), 0) <= 0) {
        return { "its file gives M-RoPE no sections", convert };
    }

    const llama_memory_ptr memory = create_stock_memory(model);
    if (!memory) {
        return { "it has no KV cache, as it reads its whole input at once", no_stream };
    }
    if (model.pos_embd != nullptr) {
        return { "it adds learned absolute positions, which end where its training ended" };
    }
    if (!find_parts(memory.get()).full) {
        return { "its memory is of another kind, as one of summaries of all tokens is (sparse attention), which a bound would change" };
    }

    return { nullptr };
}

bool lminf_mixes_sequences(const llama_model & model) {
    return model.arch == LLM_ARCH_PLAMO2 || model.arch == LLM_ARCH_ARWKV7 || model.arch == LLM_ARCH_RWKV6QWEN2;
}

namespace {

// of a purely recurrent model that mixes sequences
class one_by_one : public llama_memory_recurrent {
public:
    using llama_memory_recurrent::llama_memory_recurrent;

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool) override {
        return llama_memory_recurrent::init_batch(balloc, n_ubatch, /*embd_all =*/ true);
    }
};

}

// recurrent throughout
static bool is_constant(const llama_model & model) {
    return llama_model_is_recurrent(&model) && !model.hparams.vocab_only;
}

int32_t lminf_support(const llama_model * model) {
    if (is_constant(*model)) {
        return LMINF_SUPPORT_CONSTANT;
    }
    return find_reason(*model).why ? LMINF_SUPPORT_REFUSED : LMINF_SUPPORT_RUNS;
}

const char * lminf_refusal(const llama_model * model) {
    static thread_local std::string res;

    if (is_constant(*model)) {
        return nullptr;
    }

    const reason r = find_reason(*model);
    if (!r.why) {
        return nullptr;
    }

    res = format("models of architecture '%s' cannot run with a Λ cache: %s: %s", llm_arch_name(model->arch), r.why, r.remedy);
    return res.c_str();
}

// where a layer's keys are kept; NULL if it has none
static const ggml_tensor * find_k_storage(const llama_kv_cache & cache, int32_t il) {
    try {
        return cache.get_k_storage(il);
    } catch (const std::out_of_range &) {
        return nullptr;
    }
}

std::vector<int32_t> lminf_layers::in_window() const {
    auto res = full;
    if (router >= 0) {
        res.push_back(router);
    }
    return res;
}

lminf_layers lminf_find_layers(const llama_model & model) {
    const llama_memory_ptr memory = create_stock_memory(model);
    const stock_parts      parts  = find_parts(memory.get());

    lminf_layers res;

    const auto add = [&](const llama_kv_cache & cache, std::vector<int32_t> & layers) {
        std::map<const ggml_tensor *, int32_t> owners;
        for (const uint32_t il : cache.get_layer_ids()) {
            layers.push_back(il);
            owners[cache.get_k_storage(il)] = il;
        }
        for (int32_t il = 0; il < (int32_t) model.hparams.n_layer_all; ++il) {
            const ggml_tensor * k = find_k_storage(cache, il);
            if (k && owners.at(k) != il) {
                res.reuse[il] = owners.at(k);
            }
        }
    };

    add(*parts.full, res.full);
    if (model.hparams.router_layer >= 0) {
        res.router = model.hparams.router_layer;
        res.full.erase(std::remove(res.full.begin(), res.full.end(), res.router), res.full.end());
    }
    if (parts.sliding) {
        add(*parts.sliding, res.sliding);
    }
    if (parts.selecting) {
        const auto ids = parts.selecting->get_layer_ids();
        res.selecting.assign(ids.begin(), ids.end());
        res.selects_blocks = parts.selects_blocks;
    }

    for (int32_t il = 0; parts.recurrent && il < (int32_t) parts.recurrent->r_l.size(); ++il) {
        if (parts.recurrent->r_l[il]) {
            res.recurrent.push_back(il);
        }
    }

    return res;
}

llama_memory_i * lminf_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (const char * refusal = lminf_refusal(&model)) {
        throw std::runtime_error(lminf_set_error(refusal));
    }
    if (is_constant(model)) {
        if (lminf_mixes_sequences(model)) { // otherwise as llama.cpp makes it
            return new one_by_one(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv, std::max(1u, cparams.n_seq_max), cparams.n_seq_max,
                    cparams.n_rs_seq, nullptr);
        }
        llama_cparams own = cparams;
        own.lminf.enabled = false;
        return model.create_memory(params, own);
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        throw std::runtime_error(lminf_set_error("a draft context (MTP) cannot have a Λ cache: make it without one"));
    }

    try {
        return new lminf_memory(model, params, cparams, lminf_find_layers(model));
    } catch (const std::exception & err) {
        if (lminf_last_error()[0] == '\0') {
            lminf_set_error(err.what());
        }
        throw;
    }
}
