#include "lminf-memory.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "lminf-attn.h"
#include "lminf-rows.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

// llama.cpp checks this with flash attention only, and reads broken rows without
static void check_blocks(ggml_type type, const char * name, uint32_t n_embd_head) {
    if (n_embd_head % ggml_blck_size(type) != 0) {
        throw std::runtime_error(lminf_set_error(format(
            "a KV cache of type %s comes in blocks of %d, which heads of %s size %u are no multiple of: choose f16",
            ggml_type_name(type), (int) ggml_blck_size(type), name, n_embd_head)));
    }
}

static int64_t pad_sinks(int64_t n_global) {
    return GGML_PAD(n_global, 8);
}

static ggml_backend_dev_t kv_device(const llama_model & model, bool offload, int32_t il) {
    return offload ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// bytes of n_rows keys and values, by the device that they lie on
static void add_rows(std::map<ggml_backend_dev_t, uint64_t> & res, const llama_model & model, const llama_memory_params & params,
        uint64_t n_rows, bool offload, const std::vector<int32_t> & layers) {
    for (const int32_t il : layers) {
        res[kv_device(model, offload, il)] += n_rows*(ggml_row_size(params.type_k, model.hparams.n_embd_k_gqa(il)) +
            (model.hparams.is_mla() ? 0 : ggml_row_size(params.type_v, model.hparams.n_embd_v_gqa(il))));
    }
}

// stops a window that cannot fit from being zeroed page by page until the system gives up
static void check_memory(const std::map<ggml_backend_dev_t, uint64_t> & need) {
    for (const auto & [dev, size] : need) {
        size_t free  = 0;
        size_t total = 0;
        ggml_backend_dev_memory(dev, &free, &total);

        if (total > 0 && size > total) {
            throw std::runtime_error(lminf_set_error(format(
                "the window needs %.1f GiB of KV cache on %s, which has %.1f GiB in all: choose a smaller n_local or a smaller KV type",
                size/1024.0/1024.0/1024.0, ggml_backend_dev_name(dev), total/1024.0/1024.0/1024.0)));
        }
    }
}

// how many tokens an archive has room for. It grows as a stream does: it is told in time that it never can be full
static int32_t archive_tokens(const lminf_archive_layout & layout, const lminf_cparams & params, uint32_t n_seq_max) {
    constexpr double MiB = 1024.0*1024.0;

    constexpr int64_t n_segment = lminf_archive_layout::n_segment;

    const double size = (double) layout.get_segment_size(); // 0 where no layer recalls

    // the newest tokens are in memory even where the others are in files
    if (layout.get_max_bytes() < size) {
        throw std::runtime_error(lminf_set_error(format(
            "the smallest archive needs %.1f MiB of memory, and archives may take %.1f MiB: choose smaller archive types or a larger archive_memory",
            size/MiB, layout.get_max_bytes()/MiB)));
    }

    const bool   in_files  = params.archive_disk > 0;
    const double available = in_files ? (double) params.archive_disk/n_seq_max : (double) layout.get_max_bytes();

    int64_t n_most = INT32_MAX;
    if (in_files && size > 0) {
        // each of these files has a page for its head; the newest tokens are in none
        n_most = n_segment*(int64_t) std::min(available/(size + 4096), (double) (INT32_MAX/n_segment));
    } else if (size > 0) {
        n_most = (int64_t) std::min(available/size*n_segment, (double) INT32_MAX);
    }

    if (params.n_archive == 0 && n_most >= n_segment) {
        return std::min(lminf_archive_layout::n_default, n_most/n_segment*n_segment);
    }

    const int64_t n = params.n_archive == 0 ? n_segment : params.n_archive;
    if (n > n_most) {
        throw std::runtime_error(lminf_set_error(format(
            "an archive of %lld tokens needs %.1f MiB of %s, and %s may take %.1f MiB: choose a smaller n_archive, smaller archive types or a larger %s",
            (long long) n, size*n/n_segment/MiB, in_files ? "files" : "memory", in_files ? "that of each sequence" : "archives", available/MiB,
            in_files ? "archive_disk" : "archive_memory")));
    }
    return n;
}

// one layer's attention as a device would be asked to compute it
static bool has_fused(ggml_backend_dev_t dev, const llama_hparams & hparams, int32_t il, ggml_type type_k, ggml_type type_v, int64_t n_sink_rows) {
    if (hparams.n_head_kv(il) == 0) {
        return true; // a layer without attention
    }
    if (hparams.is_mla()) {
        type_v = type_k;
    }
    // a device that spreads tensors over others knows how to split its own operations only
    if (!lminf_attn_is_kv_type(type_k) || !lminf_attn_is_kv_type(type_v) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META) {
        return false;
    }

    const ggml_init_params params_ctx = {
        /*.mem_size   =*/ 16*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    const ggml_context_ptr ctx(ggml_init(params_ctx));

    // any number of cells, and as many heads as the layer has
    const auto rows = [&](ggml_type type, int64_t n_embd_head, int64_t n, int64_t n_head) {
        return ggml_permute(ctx.get(), ggml_new_tensor_4d(ctx.get(), type, n_embd_head, n_head, n, 1), 0, 2, 1, 3);
    };

    const int64_t n_embd_k  = hparams.n_embd_head_k(il);
    const int64_t n_embd_v  = hparams.n_embd_head_v(il);
    const int64_t n_head    = hparams.n_head(il);
    const int64_t n_head_kv = hparams.n_head_kv(il);
    const int64_t n_kv      = 256;
    const bool    has_sinks = n_sink_rows > 0;

    // with MLA values are the first elements of the keys
    const auto values = [&](ggml_tensor * k, ggml_type type) {
        return hparams.is_mla() ? ggml_view_4d(ctx.get(), k, n_embd_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0)
                                : rows(type, n_embd_v, k->ne[1], n_head_kv);
    };

    ggml_tensor * k      = rows(type_k, n_embd_k, n_kv, n_head_kv);
    ggml_tensor * k_sink = has_sinks ? rows(lminf_sinks::store_type(type_k), n_embd_k, n_sink_rows, n_head_kv) : nullptr;

    const ggml_tensor * op = ggml_lminf_attn(ctx.get(),
            rows(GGML_TYPE_F32, n_embd_k, 1, n_head), k, values(k, type_v),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_sink_rows + n_kv, 1), nullptr,
            has_sinks ? rows(GGML_TYPE_F32, n_embd_k, 1, n_head) : nullptr, k_sink,
            has_sinks ? values(k_sink, lminf_sinks::store_type(type_v)) : nullptr,
            1.0f, 0.0f, 0.0f);

    return ggml_backend_dev_supports_op(dev, op);
}

//
// lminf_memory
//

lminf_memory::lminf_memory(
        const llama_model         & model,
        const llama_memory_params & params_mem,
        const llama_cparams       & cparams,
              lminf_layers          layers_model) :
    model(model), hparams(model.hparams), params(cparams.lminf), layers(std::move(layers_model)), n_seq_max(cparams.n_seq_max),
    // a window that is cut into chunks of positions is cut at the same tokens after a rebase
    block(hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED ? std::lcm<int64_t>(lminf_stream::min_block, hparams.n_swa) : lminf_stream::min_block) {

    // padded as llama.cpp pads its own caches; what the padding adds is more slack
    const auto pad_cells = [](int64_t n) { return (uint32_t) GGML_PAD(n, 256); };

    const int64_t n_cells_min = (int64_t) params.n_local + params.n_slack + cparams.n_ubatch;
    if (n_cells_min > std::numeric_limits<int32_t>::max()/2) {
        throw std::runtime_error(lminf_set_error(format("n_local = %d is more cells than a KV cache can index", params.n_local)));
    }
    const uint32_t n_cells = pad_cells(n_cells_min);

    params.n_slack = n_cells - cparams.n_ubatch - params.n_local;
    n_sink_rows    = pad_sinks(params.n_global);

    const uint32_t n_cells_sliding = layers.sliding.empty() ? 0 : pad_cells((int64_t) hparams.n_swa + params.n_slack + cparams.n_ubatch);

    const auto layers_window = layers.in_window();

    for (const auto * kind : { &layers_window, &layers.sliding }) {
        for (const int32_t il : *kind) {
            check_blocks(params_mem.type_k, "key",   hparams.n_embd_head_k(il));
            check_blocks(params_mem.type_v, "value", hparams.n_embd_head_v(il));
        }
    }

    std::map<ggml_backend_dev_t, uint64_t> need;
    add_rows(need, model, params_mem, (uint64_t) (n_cells + n_sink_rows)*n_seq_max, cparams.offload_kqv, layers_window);
    add_rows(need, model, params_mem, (uint64_t) n_cells_sliding*n_seq_max, cparams.offload_kqv, layers.sliding);
    check_memory(need);

    if (params.n_recall > 0 && params.recall_rule == LMINF_RECALL_PAPER && (hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK)) {
        throw std::runtime_error(lminf_set_error("the paper's recall has no soft cap, which this model has: choose the recall_rule LAYER"));
    }
    check_selection(params_mem.type_v);
    choose_attention(cparams, params_mem.type_k, params_mem.type_v);

    // RoPE angles are f32: the smaller the positions, the more exact they are. But each rebase rounds the stored keys
    // once more, so it is a window away at least: no key is rotated twice while a query can see it.
    const int64_t bound_min = (int64_t) std::max(n_cells, n_cells_sliding) + cparams.n_batch + block;
    const int64_t bound     = bound_min + std::max<int64_t>(params.n_local, layers.sliding.empty() ? 0 : hparams.n_swa);
    if (params.pos_bound == 0 && bound > std::numeric_limits<llama_pos>::max()) {
        throw std::runtime_error(lminf_set_error(format("n_local = %d leaves no room for positions: choose a smaller n_local", params.n_local)));
    }
    if (params.pos_bound == 0) {
        params.pos_bound = (int32_t) bound;
    } else if (params.pos_bound < bound_min) {
        throw std::runtime_error(lminf_set_error(format(
            "pos_bound = %d is too small: this window and batch need %d", params.pos_bound, (int) bound_min)));
    }

    llama_memory_i::layer_reuse_cb reuse;
    if (!layers.reuse.empty()) {
        reuse = [this](int32_t il) {
            const auto it = layers.reuse.find(il);
            return it == layers.reuse.end() ? -1 : it->second;
        };
    }

    lminf_kv::params kv = {
        /*.type_k    =*/ params_mem.type_k,
        /*.type_v    =*/ params_mem.type_v,
        /*.v_trans   =*/ fused.empty() && !cparams.flash_attn && !hparams.is_mla(),
        /*.offload   =*/ cparams.offload_kqv,
        /*.n_cells   =*/ n_cells,
        /*.n_seen    =*/ (uint32_t) params.n_local,
        /*.n_slack   =*/ (uint32_t) params.n_slack,
        /*.n_seq_max =*/ n_seq_max,
    };
    window = std::make_unique<lminf_kv>(model, kv, layers_window, reuse);

    if (!layers.sliding.empty()) {
        kv.n_cells = n_cells_sliding;
        kv.n_seen  = hparams.n_swa;
        kv.n_slack = n_cells_sliding - cparams.n_ubatch - hparams.n_swa;

        sliding = std::make_unique<lminf_kv>(model, kv, layers.sliding, reuse);
    }

    sinks = std::make_unique<lminf_sinks>(model, params_mem.type_k, params_mem.type_v, cparams.offload_kqv, get_n_store_rows(), n_seq_max, layers.full);
    for (const auto & [il, il_keys] : layers.reuse) {
        if (std::count(layers.full.begin(), layers.full.end(), il_keys) > 0) {
            sinks->reuse(il, il_keys);
        }
    }

    if (!layers.recurrent.empty()) {
        recurrent = std::make_unique<lminf_recurrent>(model, cparams.offload_kqv, n_seq_max, cparams.n_rs_seq, layers.recurrent);
    }

    if (!layers.selecting.empty()) {
        selector = std::make_unique<lminf_selector>(model, cparams, layers.selecting);
    }

    if (layers.router >= 0) {
        router = lminf_router::create(model, n_seq_max);
    }

    if (params.n_recall > 0) {
        auto layout = std::make_shared<lminf_archive_layout>(model, params, layers.full, layers.reuse);
        params.n_archive = archive_tokens(*layout, params, n_seq_max);
        recall = std::make_unique<lminf_recall>(params, std::move(layout), n_seq_max);
    }

    streams.assign(n_seq_max, new_stream());

    LLAMA_LOG_INFO("%s: n_global = %d, n_local = %d, max_distance = %d, n_slack = %d, n_cells = %u, pos_bound = %d\n",
            __func__, params.n_global, params.n_local, params.max_distance, params.n_slack, n_cells, params.pos_bound);
    LLAMA_LOG_INFO("%s: layers: %zu full, %zu sliding over %u tokens, %zu recurrent, %zu reuse keys, %zu fused\n", __func__,
            layers.full.size(), layers.sliding.size(), hparams.n_swa, layers.recurrent.size(), layers.reuse.size(), fused.size());
}

void lminf_memory::check_selection(ggml_type type_v) const {
    if (layers.selecting.empty()) {
        return;
    }
    if (params.n_recall > 0 && params.recall_rule == LMINF_RECALL_PAPER) {
        throw std::runtime_error(lminf_set_error(
            "heads of this model attend to tokens that they select together, and the paper's recall gives each its own: choose the recall_rule LAYER"));
    }

    const int64_t n_max  = hparams.indexer_top_k;
    const int64_t n_seen = (int64_t) params.n_global + params.n_local + params.n_recall;

    if (!layers.selects_blocks && n_seen > n_max) {
        throw std::runtime_error(lminf_set_error(format(
            "a query of this model attends to %lld tokens that it selects, and would have %lld in view: choose n_global + n_local + n_recall = %lld or less",
            (long long) n_max, (long long) n_seen, (long long) n_max)));
    }

    if (layers.selects_blocks && ggml_is_quantized(type_v)) {
        throw std::runtime_error(lminf_set_error(format(
            "llama.cpp reads values of type %s with flash attention only, with which this model selects: choose f16 for them", ggml_type_name(type_v))));
    }

    // a window begins anywhere within a block, and what is recalled comes from any
    const auto    n_blocks_of = [&](int64_t n) { return (n + hparams.indexer_block_size - 1)/hparams.indexer_block_size; };
    const int64_t n_blocks    = layers.selects_blocks ? n_blocks_of(params.n_global) + n_blocks_of(params.n_local - 1) + 1 + params.n_recall : 0;

    if (n_blocks > n_max) {
        throw std::runtime_error(lminf_set_error(format(
            "a query of this model attends to %lld blocks of %u tokens that it selects, and could have tokens of %lld in view: choose a smaller n_local",
            (long long) n_max, hparams.indexer_block_size, (long long) n_blocks)));
    }
}

void lminf_memory::choose_attention(const llama_cparams & cparams, ggml_type type_k, ggml_type type_v) {
    if (params.attention == LMINF_ATTENTION_STOCK) {
        return;
    }

    const auto choose = [&](int32_t il, int32_t il_keys, int64_t n_rows) {
        ggml_backend_dev_t dev = kv_device(model, cparams.offload_kqv, il_keys);

        if (has_fused(dev, hparams, il, type_k, type_v, n_rows)) {
            fused.insert(il);
        } else if (params.attention == LMINF_ATTENTION_FUSED) {
            throw std::runtime_error(lminf_set_error(format(
                "there is no fused attention for layer %d of this model on %s with a KV cache of types %s and %s: choose another attention", il,
                ggml_backend_dev_name(dev), ggml_type_name(type_k), ggml_type_name(type_v))));
        }
    };

    // with the paper's rule heads attend to different rows, which the fused operation does not
    const bool    is_paper = params.n_recall > 0 && params.recall_rule == LMINF_RECALL_PAPER;
    const int64_t n_rows   = n_sink_rows + params.n_recall;

    if (!is_paper) {
        for (const int32_t il : layers.full) {
            choose(il, il, n_rows);
        }
    }
    for (const int32_t il : layers.sliding) {
        choose(il, il, 0);
    }
    for (const auto & [il, il_keys] : layers.reuse) {
        if (hparams.is_swa(il)) {
            choose(il, il_keys, 0);
        } else if (!is_paper) {
            choose(il, il_keys, n_rows);
        }
    }

    params.attention = fused.empty() ? LMINF_ATTENTION_STOCK : LMINF_ATTENTION_FUSED;
}

std::vector<lminf_kv *> lminf_memory::caches() const {
    std::vector<lminf_kv *> res = { window.get() };
    if (sliding) {
        res.push_back(sliding.get());
    }
    return res;
}

void lminf_memory::check_layers() const {
    const auto layers_window = layers.in_window();

    for (const auto * kind : { &layers_window, &layers.sliding }) {
        for (const int32_t il : *kind) {
            const auto it = ropes.find(il);
            if (hparams.n_head_kv(il) > 0 && (it == ropes.end() || !it->second.known)) {
                lminf_refuse_layer(model.arch, il, "attends in a way of its own, which the rule does not reach");
            }
        }
    }
}

//
// batches
//

static std::unique_ptr<lminf_memory_context> failed(std::string why) {
    LLAMA_LOG_ERROR("%s: %s\n", __func__, lminf_set_error(std::move(why)).c_str());

    return std::make_unique<lminf_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr lminf_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    if (!lctx->get_cparams().causal_attn) {
        return failed("a stream has no end to be read back from: with a Λ cache the attention is causal");
    }

    balloc.split_reset();

    std::map<llama_seq_id, llama_pos> next; // position that a sequence's next token must have

    // recurrent layers take the same number of tokens of each sequence, and keep snapshots within one micro-batch
    const auto split = [&] {
        if (recurrent) {
            const uint32_t n_rs_seq = recurrent->get_memory().n_rs_seq;

            return embd_all || lminf_mixes_sequences(model) ? balloc.split_seq(n_ubatch) : balloc.split_equal(n_ubatch, true, n_rs_seq > 0 ? n_rs_seq + 1 : 0);
        }
        return n_seq_max == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
    };

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = split();
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (!ubatch.token && hparams.n_pos_per_embd() > 1) {
            return failed("a model with several positions per token (M-RoPE) reads text only with a Λ cache: give it tokens, not embeddings");
        }
        if (!ubatch.token && router) {
            return failed("a model whose tokens turn adapters on reads text only: give it tokens, not embeddings");
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.n_seq_id[i] != 1) {
                return failed(format("a token belongs to %d sequences, but each has a stream of its own", ubatch.n_seq_id[i]));
            }
            if (ubatch.pos[i] < 0 || ubatch.pos[i] >= params.pos_bound) {
                return failed(format("position %d is outside of [0, %d): ask lminf_next_pos for each batch's first position",
                        ubatch.pos[i], params.pos_bound));
            }

            const llama_seq_id seq_id = ubatch.seq_id[i][0];
            const llama_pos    pos    = next.try_emplace(seq_id, next_pos(seq_id)).first->second++;
            if (ubatch.pos[i] != pos) {
                return failed(format("a token of sequence %d has position %d where %d comes next: ask lminf_next_pos for each batch's first position",
                        seq_id, ubatch.pos[i], pos));
            }
        }

        ubatches.push_back(std::move(ubatch));
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed("the batch could not be split into micro-batches");
    }

    // recurrent layers first, as llama.cpp does
    if (recurrent && !recurrent->get_memory().prepare(ubatches)) {
        return failed("there is no state left for a sequence of the batch");
    }

    auto sinfos = window->get_cache().prepare(ubatches);
    if (sinfos.empty()) {
        return failed("there are no cells left for the batch");
    }

    llama_memory_context_ptr ctx_sliding;
    if (sliding) {
        auto sinfos_sliding = sliding->get_cache().prepare(ubatches);
        if (sinfos_sliding.empty()) {
            return failed("there are no cells left for the batch in layers with a sliding window");
        }
        ctx_sliding = std::make_unique<llama_kv_cache_context>(&sliding->get_cache(), std::move(sinfos_sliding), ubatches);
    }

    llama_memory_context_ptr ctx_selector;
    if (selector && !(ctx_selector = selector->new_context(ubatches))) {
        return failed("there are no cells left for the batch in layers that select");
    }

    return wrap(std::make_unique<lminf_memory_context>(this, std::move(sinfos), ubatches), std::move(ctx_sliding), std::move(ctx_selector),
            recurrent ? recurrent->new_context(ubatches) : nullptr, ubatches);
}

llama_memory_context_ptr lminf_memory::init_full() {
    return wrap(std::make_unique<lminf_memory_context>(this), sliding ? sliding->get_cache().init_full() : nullptr,
            selector ? selector->get_cache().init_full() : nullptr, recurrent ? recurrent->get_memory().init_full() : nullptr, {});
}

llama_memory_context_ptr lminf_memory::wrap(llama_memory_context_ptr ctx_window, llama_memory_context_ptr ctx_sliding,
        llama_memory_context_ptr ctx_selector, llama_memory_context_ptr ctx_recurrent, const std::vector<llama_ubatch> & ubatches) const {
    llama_memory_context_ptr attn = std::move(ctx_window);
    if (ctx_selector && layers.selects_blocks) {
        attn = std::make_unique<llama_kv_cache_msa_context>(std::move(attn), std::move(ctx_selector), ubatches);
    } else if (ctx_selector) {
        attn = std::make_unique<llama_kv_cache_dsa_context>(std::move(attn), std::move(ctx_selector), ubatches);
    }
    if (ctx_sliding && selector) {
        attn = std::make_unique<llama_kv_cache_dsa_iswa_context>(std::move(attn), std::move(ctx_sliding), ubatches);
    } else if (ctx_sliding) {
        attn = std::make_unique<llama_kv_cache_iswa_context>(std::move(attn), std::move(ctx_sliding), ubatches);
    }
    if (!ctx_recurrent) {
        return attn;
    }
    if (sliding) {
        return std::make_unique<llama_memory_hybrid_iswa_context>(std::move(attn), std::move(ctx_recurrent), ubatches);
    }
    return std::make_unique<llama_memory_hybrid_context>(std::move(attn), std::move(ctx_recurrent), ubatches);
}

bool lminf_memory::recalls(int32_t il) const {
    return recall && il >= params.recall_from && !hparams.is_swa(il) && recall->get_layout().find(il);
}

int64_t lminf_memory::get_n_recall_rows() const {
    if (!recall) {
        return 0;
    }
    int64_t n_group = 1;
    if (params.recall_rule == LMINF_RECALL_PAPER) {
        for (const int32_t il : layers.full) {
            n_group = std::max<int64_t>(n_group, hparams.n_head(il)/std::max(1u, hparams.n_head_kv(il)));
        }
    }
    return params.n_recall*n_group;
}

void lminf_memory::apply_ubatch(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; router && i < ubatch.n_seqs_unq; ++i) {
        const llama_seq_id   seq_id = ubatch.seq_id_unq[i];
        const lminf_stream & stream = streams[seq_id];

        router->settle(seq_id, std::min(stream.index(truncate_min(seq_id)), rebuild_min(seq_id) - stream.start));
    }
    if (recall) {
        const uint32_t n_tokens = ubatch.n_tokens/ubatch.n_seqs_unq; // of each sequence
        for (uint32_t i = 0; i < ubatch.n_tokens; i += n_tokens) {
            const llama_seq_id seq_id = ubatch.seq_id[i][0];

            recall->get_archive(seq_id).append(streams[seq_id].index(ubatch.pos[i]), n_tokens, ubatch.token ? ubatch.token + i : nullptr);
        }
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];

        streams[seq_id].append(ubatch.pos[i]);
        if (router) {
            router->append(seq_id, streams[seq_id].index(ubatch.pos[i]), ubatch.token[i]);
        }

        max_graph_pos = std::max(max_graph_pos, ubatch.pos[i]);
    }
}

void lminf_memory::batch_failed() {
    if (!recurrent) {
        return;
    }
    for (const llama_seq_id seq_id : recurrent->get_touched()) {
        LLAMA_LOG_WARN("%s: sequence %d is empty now: its recurrent states were left half written\n", __func__, seq_id);
        remove(seq_id);
    }
    recurrent->zero_free_cells();
}

// the caches' own pending work
class lminf_memory_update : public llama_memory_context_i {
public:
    lminf_memory_update(lminf_memory * mem, llama_context * lctx, bool optimize) {
        for (lminf_kv * kv : mem->caches()) {
            inner.push_back(kv->get_cache().init_update(lctx, optimize));
        }
    }

    bool next() override { return false; }

    bool apply() override {
        bool res = true;
        for (const auto & ctx : inner) {
            res &= ctx->get_status() != LLAMA_MEMORY_STATUS_SUCCESS || ctx->apply();
        }
        return res;
    }

    const llama_ubatch & get_ubatch() const override { return inner[0]->get_ubatch(); }

    llama_memory_status get_status() const override {
        llama_memory_status res = LLAMA_MEMORY_STATUS_NO_UPDATE;
        for (const auto & ctx : inner) {
            res = llama_memory_status_combine(res, ctx->get_status());
        }
        return res;
    }

private:
    std::vector<llama_memory_context_ptr> inner;
};

llama_memory_context_ptr lminf_memory::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<lminf_memory_update>(this, lctx, optimize);
}

//
// positions
//

llama_pos lminf_memory::make_room(llama_context & lctx, llama_seq_id seq_id, int32_t n_tokens) {
    auto & stream = streams[seq_id];

    if (n_tokens < 0 || (uint32_t) n_tokens > lctx.n_batch()) {
        lminf_set_error(format("%d tokens do not fit into one batch of n_batch = %u", n_tokens, lctx.n_batch()));
        return -1;
    }

    const llama_pos next = next_pos(seq_id);
    if ((int64_t) next + n_tokens <= params.pos_bound) {
        return next;
    }

    const llama_pos shift = lminf_stream::rebase_shift(seq_pos_min(seq_id), block);
    GGML_ASSERT(next + n_tokens - shift <= params.pos_bound);

    for (lminf_kv * kv : caches()) {
        kv->shift(seq_id, shift);
    }
    if (recurrent) {
        recurrent->set_pos(seq_id, next - shift - 1);
    }
    stream.origin += shift;
    n_rebase++;

    // rotate the keys now: nothing may read the cache between the new positions and the new keys
    lctx.memory_update(false);

    return next - shift;
}

lminf_stream lminf_memory::new_stream() const {
    lminf_stream res;
    res.n_global = params.n_global;
    return res;
}

bool lminf_memory::seq_set_sinks(llama_seq_id seq_id, int32_t n_global) {
    if (n_global < 0 || n_global > params.n_global || streams[seq_id].begun) {
        lminf_set_error(format("an empty sequence can keep 0 to %d sinks", params.n_global));
        return false;
    }

    streams[seq_id].n_global = n_global;

    return true;
}

bool lminf_memory::seq_set_recall(llama_seq_id seq_id, int32_t n_recall) {
    if (n_recall < 0 || n_recall > params.n_recall) {
        lminf_set_error(format("a sequence can recall 0 to %d tokens here", params.n_recall));
        return false;
    }
    if (recall) {
        recall->set_n_recall(seq_id, n_recall);
    }
    return true;
}

bool lminf_memory::seq_set_archive(llama_seq_id seq_id, const lminf_archive & archive, bool copies) {
    wait();
    if (!recall || !recall->get_archive(seq_id).assign(archive, streams[seq_id].index(next_pos(seq_id)), copies)) {
        lminf_set_error("the archive has keys or values of other sizes or types");
        return false;
    }
    return true;
}

bool lminf_memory::seq_start(llama_seq_id seq_id, int64_t stream_pos) {
    if (stream_pos < 0 || stream_pos > lminf_stream::max_start || streams[seq_id].begun) {
        lminf_set_error(format("a stream position can only be set on an empty sequence, to 0 to %lld", (long long) lminf_stream::max_start));
        return false;
    }

    // graph positions begin anywhere within a block, as they would after a rebase
    streams[seq_id].begin_at(stream_pos, block);

    return true;
}

bool lminf_memory::skip(llama_seq_id seq_id, int64_t n_tokens, const llama_token * tokens) {
    auto & stream = streams[seq_id];

    if (n_tokens < params.n_local) {
        lminf_set_error(format("a skip must be n_local = %d tokens or more, so that no query sees across it", params.n_local));
        return false;
    }
    if (sliding && n_tokens < hparams.n_swa) {
        lminf_set_error(format("a skip must be %u tokens or more, as the model's own sliding window, so that no query sees across it", hparams.n_swa));
        return false;
    }
    if (stream.n_sink < stream.n_global) {
        lminf_set_error(format("the sequence holds %d of its %d sinks: process those first, then skip", stream.n_sink, stream.n_global));
        return false;
    }

    const int64_t stream_pos = stream.origin + next_pos(seq_id);
    if (n_tokens > lminf_stream::max_start - stream_pos) {
        lminf_set_error(format("a skip can lead to stream position %lld at most", (long long) lminf_stream::max_start));
        return false;
    }

    wait();
    for (lminf_kv * kv : caches()) {
        kv->free_cells(seq_id, -1);
    }
    for (int64_t i = 0; router && tokens && i < n_tokens; ++i) {
        router->append(seq_id, stream_pos - stream.start + i, tokens[i]);
    }
    stream.skip_to(stream_pos + n_tokens, block);
    if (recurrent) {
        recurrent->skip_to(seq_id, next_pos(seq_id));
    }

    return true;
}

llama_pos lminf_memory::next_pos(llama_seq_id seq_id) const {
    const llama_pos pos_max = window->get_cache().seq_pos_max(seq_id);

    return pos_max >= 0 ? pos_max + 1 : (llama_pos) streams[seq_id].pos_resume();
}

llama_pos lminf_memory::graph_pos(llama_seq_id seq_id, int64_t stream_pos) const {
    const int64_t pos = stream_pos - streams[seq_id].origin;

    return (llama_pos) std::clamp<int64_t>(pos, -1, std::numeric_limits<llama_pos>::max());
}

llama_pos lminf_memory::truncate_min(llama_seq_id seq_id) const {
    llama_pos res = 0;
    for (const lminf_kv * kv : caches()) {
        res = std::max(res, kv->rollback_min(seq_id, streams[seq_id].pos_resume()));
    }
    return res;
}

llama_pos lminf_memory::rollback_min(llama_seq_id seq_id) const {
    const llama_pos res = truncate_min(seq_id);

    return recurrent ? std::max(res, next_pos(seq_id) - recurrent->n_rollback(seq_id)) : res;
}

bool lminf_memory::can_truncate(llama_seq_id seq_id, llama_pos p0) const {
    return p0 <= std::max<int64_t>(0, streams[seq_id].pos_start()) || p0 >= rollback_min(seq_id);
}

// an archive that holds no less than a cache of this type did
static bool is_as_fine(ggml_type archive, ggml_type cache) {
    return archive == cache || (archive == GGML_TYPE_F32 && cache == GGML_TYPE_F16);
}

int64_t lminf_memory::rebuild_min(llama_seq_id seq_id) const {
    const auto & stream = streams[seq_id];
    const auto & kv     = window->get_params();

    const int64_t none = stream.origin + next_pos(seq_id);

    // states of recurrent layers and cells of sliding ones are in no archive, nor are positions in a picture; quantized keys are
    // stored under a rotation of their own
    if (!recall || recurrent || sliding || hparams.n_pos_per_embd() > 1 || (kv.type_k != GGML_TYPE_F32 && kv.type_k != GGML_TYPE_F16) ||
            (kv.type_v != GGML_TYPE_F32 && kv.type_v != GGML_TYPE_F16)) {
        return none;
    }
    for (const auto & l : recall->get_layout().get_layers()) {
        if (!is_as_fine(l.type_k, kv.type_k) || (l.n_embd_v_gqa > 0 && !is_as_fine(l.type_v, kv.type_v))) {
            return none;
        }
    }

    const auto & ranges = recall->get_archive(seq_id).get_ranges();
    if (ranges.empty() || ranges.back().second != none - stream.start) {
        return none;
    }
    // the next query sees n_local - 1 tokens, or all since the last skip; one is left at least, to count on from
    const int64_t first  = ranges.back().first + stream.start;
    const int64_t resume = stream.resume;
    const int64_t router_min = router ? stream.start + router->truncate_min(seq_id) : 0;

    return std::min(none, std::max(router_min, first <= resume ? resume + 1 : first + std::max(params.n_local - 1, 1)));
}

bool lminf_memory::rebuild(llama_seq_id seq_id, int64_t stream_pos) {
    auto & stream = streams[seq_id];

    if (stream_pos < rebuild_min(seq_id) || stream_pos >= stream.origin + next_pos(seq_id)) {
        return false;
    }
    const auto & archive = recall->get_archive(seq_id);
    const auto & layout  = recall->get_layout();

    // all that the window has room for, so that as much can be taken back as before
    const int64_t oldest = std::max(archive.get_ranges().back().first + stream.start, stream.resume);
    const int64_t first  = std::max(oldest, stream_pos - params.n_local - params.n_slack);
    // 0 is what removes the whole of a stream that has skipped
    const int64_t before = first - stream.is_skipped();

    wait();
    stream.origin = std::min(stream.origin, before - before % block);

    const auto & kv = window->get_params();

    window->fill(seq_id, first - stream.origin, stream_pos - first, [&](size_t layer, int64_t i, char * k, char * v) {
        if (layer == layout.get_layers().size()) {
            return; // a router's, which nobody reads
        }
        const auto    & l       = layout.get_layers()[layer];
        const int64_t   index   = first - stream.start + i;
        const int64_t   row     = index % lminf_archive_layout::n_segment;
        const char    * segment = archive.get_segment(index);

        lminf_row_load(l.type_k, segment + l.at_k + row*l.size_k, l.n_embd_head_k*l.n_head_kv, kv.type_k, k);
        if (v) {
            lminf_row_load(l.type_v, segment + l.at_v + row*l.size_v, l.n_embd_v_gqa, kv.type_v, v);
        }
    });
    window->mark_dirty(seq_id);
    truncate(seq_id, (llama_pos) (stream_pos - stream.origin));

    // rotate the keys now, as after a rebase
    lctx->memory_update(false);

    return true;
}

lminf_info lminf_memory::get_info(llama_seq_id seq_id) const {
    const auto & stream = streams[seq_id];

    lminf_info info = {};

    const llama_pos next = next_pos(seq_id);

    // what the next query can see of the window
    const int64_t n_inside  = std::min<int64_t>(params.n_local - 1, next - stream.pos_resume());
    const int64_t n_outside = stream.index(next) - n_inside;

    info.stream_pos    = stream.origin + next;
    info.n_evicted     = n_outside - std::min<int64_t>(n_outside, stream.n_sink);
    info.n_sink        = stream.n_sink;
    info.n_global      = stream.n_global;
    info.n_window      = window->get_cells(seq_id).get_used();
    info.n_rollback    = std::max(0, next - rollback_min(seq_id));
    info.n_rebuild     = info.stream_pos - rebuild_min(seq_id);
    info.n_cells       = window->get_params().n_cells;
    info.n_rebase      = n_rebase;
    info.max_graph_pos = max_graph_pos;
    info.pos_bound     = params.pos_bound;

    for (const auto & [_, size] : memory_breakdown()) {
        info.kv_bytes += size;
    }

    if (recall) {
        const auto & archive = recall->get_archive(seq_id);

        info.n_archived    = archive.n_tokens();
        info.n_forgotten   = stream.index(next) - info.n_archived;
        info.archive_bytes = archive.n_bytes();
    }

    return info;
}

static uint64_t sum(const std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), (uint64_t) 0, [](uint64_t n, const auto & each) { return n + each.second; });
}

lminf_parts lminf_memory::get_parts() const {
    lminf_parts res = {};

    res.n_layer_full      = layers.full.size();
    res.n_layer_sliding   = layers.sliding.size();
    res.n_layer_recurrent = layers.recurrent.size();
    for (const auto & [il, _] : layers.reuse) {
        (hparams.is_swa(il) ? res.n_layer_sliding : res.n_layer_full)++;
    }
    res.n_layer_fused = fused.size();

    res.window_bytes    = sum(window->get_cache().memory_breakdown());
    res.sink_bytes      = sum(sinks->memory_breakdown()) + (selector ? sum(selector->get_cache().memory_breakdown()) : 0);
    res.sliding_bytes   = sliding   ? sum(sliding->get_cache().memory_breakdown())    : 0;
    res.archive_token_bytes = recall ? recall->get_layout().get_segment_size()/lminf_archive_layout::n_segment : 0;
    res.n_archive           = recall ? params.n_archive : 0;

    res.recurrent_bytes = recurrent ? sum(recurrent->get_memory().memory_breakdown()) : 0;

    return res;
}

//
// sequences
//

void lminf_memory::clear(bool data) {
    seq_rm(-1, -1, -1);
    for (lminf_kv * kv : caches()) {
        kv->get_cache().clear(data); // as new: the next stream begins in the first cell
    }
    if (recurrent) {
        recurrent->get_memory().clear(data);
    }
    if (data) {
        sinks->clear();
    }
}

bool lminf_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        return false;
    }

    const llama_seq_id s0 = seq_id < 0 ? 0         : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_max : seq_id + 1;

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    // nothing of the sequence lies there. From 0 on is all of it, even while its window is empty.
    const auto is_empty = [&](llama_seq_id s) { return p0 >= p1 || (p0 > 0 && p0 >= next_pos(s)); };

    // all or nothing: refuse before anything is changed
    for (llama_seq_id s = s0; s < s1; ++s) {
        const bool leaves_hole = p1 < next_pos(s);
        if (!is_empty(s) && (leaves_hole || !can_truncate(s, p0))) {
            return false;
        }
    }

    for (llama_seq_id s = s0; s < s1; ++s) {
        if (is_empty(s)) {
            continue;
        }
        if (p0 <= std::max<int64_t>(0, streams[s].pos_start())) {
            remove(s);
        } else {
            if (recurrent) {
                recurrent->rollback(s, next_pos(s) - p0);
                recurrent->set_pos(s, p0 - 1);
            }
            truncate(s, p0);
        }
    }

    return true;
}

void lminf_memory::truncate(llama_seq_id seq_id, llama_pos p0) {
    const int32_t n_sink = streams[seq_id].n_sink;

    wait();
    for (lminf_kv * kv : caches()) {
        kv->free_cells(seq_id, p0);
    }
    streams[seq_id].truncate(p0);
    if (recall) {
        recall->get_archive(seq_id).truncate(streams[seq_id].index(p0));
    }
    if (router) {
        router->truncate(seq_id, streams[seq_id].index(p0));
    }
    sinks->zero(seq_id, streams[seq_id].n_sink, n_sink);
}

void lminf_memory::remove(llama_seq_id seq_id) {
    wait();
    for (lminf_kv * kv : caches()) {
        kv->free_cells(seq_id, -1);
    }
    if (recurrent) {
        recurrent->remove(seq_id);
    }
    if (recall) {
        recall->get_archive(seq_id).clear();
    }
    if (router) {
        router->truncate(seq_id, 0);
    }
    sinks->zero(seq_id, 0, streams[seq_id].n_sink);
    streams[seq_id] = new_stream();
}

void lminf_memory::wait() const {
    llama_synchronize(lctx);
}

void lminf_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (!is_valid(seq_id_src) || !is_valid(seq_id_dst)) {
        LLAMA_LOG_ERROR("%s: sequence %d cannot be copied to %d: there are %u\n", __func__, seq_id_src, seq_id_dst, n_seq_max);
        return;
    }
    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool from_start = p0 <= std::max<int64_t>(0, streams[seq_id_src].pos_start());
    const bool to_end     = p1 < 0 || p1 >= next_pos(seq_id_src);

    // a copied state has no snapshots to go back to
    if (!from_start || (!to_end && (recurrent || !can_truncate(seq_id_src, p1)))) {
        LLAMA_LOG_ERROR("%s: [%d, %d) of sequence %d cannot be copied: its tokens attend to others that would not be\n",
                __func__, p0, p1, seq_id_src);
        return;
    }

    wait();
    for (lminf_kv * kv : caches()) {
        kv->copy(seq_id_src, seq_id_dst);
    }
    if (recurrent) {
        recurrent->copy(seq_id_src, seq_id_dst);
    }
    if (recall) {
        recall->copy(seq_id_src, seq_id_dst);
    }
    if (router) {
        router->copy(seq_id_src, seq_id_dst);
    }
    sinks->copy(seq_id_src, seq_id_dst);
    streams[seq_id_dst] = streams[seq_id_src];

    // the cells' contents are copied by the next update: do it now, so that whatever is done next finds them
    lctx->memory_update(false);

    if (!to_end) {
        seq_rm(seq_id_dst, p1, -1);
    }
}

void lminf_memory::seq_keep(llama_seq_id seq_id) {
    if (!is_valid(seq_id)) {
        LLAMA_LOG_ERROR("%s: sequence %d cannot be kept: there are %u\n", __func__, seq_id, n_seq_max);
        return;
    }

    for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
        if (s != seq_id) {
            seq_rm(s, -1, -1);
        }
    }
}

void lminf_memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    LLAMA_LOG_ERROR("%s: positions [%d, %d) of sequence %d cannot be shifted by %d: a stream keeps its own\n", __func__, p0, p1, seq_id, shift);
}

void lminf_memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    LLAMA_LOG_ERROR("%s: positions [%d, %d) of sequence %d cannot be divided by %d: a stream keeps its own\n", __func__, p0, p1, seq_id, d);
}

llama_pos lminf_memory::seq_pos_min(llama_seq_id seq_id) const {
    if (!is_valid(seq_id)) {
        return -1;
    }

    const llama_pos res = window->get_cache().seq_pos_min(seq_id);

    return sliding ? std::min(res, sliding->get_cache().seq_pos_min(seq_id)) : res;
}

llama_pos lminf_memory::seq_pos_max(llama_seq_id seq_id) const {
    return is_valid(seq_id) ? next_pos(seq_id) - 1 : -1;
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_memory::memory_breakdown() const {
    auto res = sinks->memory_breakdown();

    const auto add = [&](const std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
        for (const auto & [buft, size] : sizes) {
            res[buft] += size;
        }
    };
    for (const lminf_kv * kv : caches()) {
        add(kv->get_cache().memory_breakdown());
    }
    if (selector) {
        add(selector->get_cache().memory_breakdown());
    }
    if (recurrent) {
        add(recurrent->get_memory().memory_breakdown());
    }

    return res;
}

//
// lminf_memory_context
//

lminf_memory_context::lminf_memory_context(llama_memory_status status) : llama_kv_cache_context(status) {}

lminf_memory_context::lminf_memory_context(lminf_memory * mem) :
    llama_kv_cache_context(&mem->window->get_cache()), mem(mem), stores_sinks(mem->params.n_global > 0) {
    spans.push_back({ 0, mem->n_seq_max });
}

lminf_memory_context::lminf_memory_context(lminf_memory * mem, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(&mem->window->get_cache(), sinfos, std::move(ubatches)), mem(mem) {
    for (const auto & sinfo : sinfos) {
        spans.push_back({ sinfo.s0, sinfo.s1 - sinfo.s0 + 1 });
    }
}

int64_t lminf_memory_context::get_n_sink_rows() const {
    int32_t n_global = 0;
    for (uint32_t s = get_s0(); s < get_s0() + get_ns(); ++s) {
        n_global = std::max(n_global, mem->streams[s].n_global);
    }
    return pad_sinks(n_global);
}

bool lminf_memory_context::next() {
    i_ubatch++;

    return llama_kv_cache_context::next();
}

bool lminf_memory_context::apply() {
    const auto & ubatch = get_ubatch();

    mem->apply_ubatch(ubatch);

    stores_sinks = false;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto & stream = mem->streams[ubatch.seq_id[i][0]];

        stores_sinks |= stream.index(ubatch.pos[i]) < stream.n_global;
    }

    const bool res = llama_kv_cache_context::apply();

    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        for (lminf_kv * kv : mem->caches()) {
            kv->mark_dirty(ubatch.seq_id_unq[s]);
        }
    }

    return res;
}
