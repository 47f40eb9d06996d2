#include "lminf-memory.h"
#include "lminf-pages.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "lminf-attn.h"

#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

// keys and values of sinks are few: they are kept at the cache's own precision, and at f16 where that is quantized
static ggml_type sink_type(ggml_type type) {
    return ggml_is_quantized(type) ? GGML_TYPE_F16 : type;
}

// llama.cpp checks this with flash attention only, and reads broken rows without
static void check_blocks(ggml_type type, const char * name, uint32_t n_embd_head) {
    if (n_embd_head % ggml_blck_size(type) != 0) {
        throw std::runtime_error(lminf_set_error(format(
            "a KV cache of type %s comes in blocks of %d, which heads of %s size %u are no multiple of: choose f16",
            ggml_type_name(type), (int) ggml_blck_size(type), name, n_embd_head)));
    }
}

static int64_t pad_sinks(int32_t n_global) {
    return GGML_PAD(n_global, 8);
}

static ggml_backend_dev_t kv_device(const llama_model & model, bool offload, int32_t il) {
    return offload ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// stops a window that cannot fit from being zeroed page by page until the system gives up
static void check_memory(const llama_model & model, const llama_memory_params & params, uint64_t n_rows, bool offload,
        const std::vector<int32_t> & layers) {
    std::map<ggml_backend_dev_t, uint64_t> need;

    for (const int32_t il : layers) {
        need[kv_device(model, offload, il)] += n_rows*(ggml_row_size(params.type_k, model.hparams.n_embd_k_gqa(il)) +
                             ggml_row_size(params.type_v, model.hparams.n_embd_v_gqa(il)));
    }

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

// one layer's attention as a device would be asked to compute it
static bool has_fused(ggml_backend_dev_t dev, const llama_hparams & hparams, int32_t il, ggml_type type_k, ggml_type type_v, int64_t n_sink_rows) {
    if (hparams.n_head_kv(il) == 0) {
        return true; // a layer without attention
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

    const ggml_tensor * op = ggml_lminf_attn(ctx.get(),
            rows(GGML_TYPE_F32, n_embd_k, 1,    n_head),
            rows(type_k,        n_embd_k, n_kv, n_head_kv),
            rows(type_v,        n_embd_v, n_kv, n_head_kv),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_sink_rows + n_kv, 1), nullptr,
            has_sinks ? rows(GGML_TYPE_F32,     n_embd_k, 1,           n_head)    : nullptr,
            has_sinks ? rows(sink_type(type_k), n_embd_k, n_sink_rows, n_head_kv) : nullptr,
            has_sinks ? rows(sink_type(type_v), n_embd_v, n_sink_rows, n_head_kv) : nullptr,
            1.0f, 0.0f, 0.0f);

    return ggml_backend_dev_supports_op(dev, op);
}

// llama_kv_cache hands out its values as views only
static ggml_tensor * find_v_storage(const llama_kv_cache & window, int32_t il) {
    const ggml_init_params params_ctx = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    const ggml_context_ptr ctx(ggml_init(params_ctx));

    return window.get_v(ctx.get(), il, 1, { 0, 0, { 0 }, { { 0 } } })->view_src;
}

//
// lminf_memory
//

lminf_memory::lminf_memory(
        const llama_model         & model,
        const llama_memory_params & params_mem,
        const llama_cparams       & cparams,
        const layer_filter_cb     & filter) :
    hparams(model.hparams), params(cparams.lminf), n_seq_max(cparams.n_seq_max) {

    // padded as llama.cpp pads its own caches; what the padding adds is more slack
    const int64_t n_cells_min = (int64_t) params.n_local + params.n_slack + cparams.n_ubatch;
    if (n_cells_min > std::numeric_limits<int32_t>::max()/2) {
        throw std::runtime_error(lminf_set_error(format("n_local = %d is more cells than a KV cache can index", params.n_local)));
    }
    n_cells = GGML_PAD(n_cells_min, 256);

    n_sink_rows = pad_sinks(params.n_global);

    std::vector<int32_t> layers;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.has_kv(il) && (!filter || filter(il))) {
            layers.push_back(il);
        }
    }

    for (const int32_t il : layers) {
        check_blocks(params_mem.type_k, "key",   hparams.n_embd_head_k(il));
        check_blocks(params_mem.type_v, "value", hparams.n_embd_head_v(il));
    }
    check_memory(model, params_mem, (uint64_t) (n_cells + n_sink_rows)*n_seq_max, cparams.offload_kqv, layers);

    params.n_slack = n_cells - cparams.n_ubatch - params.n_local;

    if (params.attention != LMINF_ATTENTION_STOCK) {
        const auto it = std::find_if(layers.begin(), layers.end(), [&](int32_t il) {
            return !has_fused(kv_device(model, cparams.offload_kqv, il), hparams, il, params_mem.type_k, params_mem.type_v, n_sink_rows);
        });
        if (it != layers.end() && params.attention == LMINF_ATTENTION_FUSED) {
            throw std::runtime_error(lminf_set_error(format(
                "there is no fused attention for layer %d of this model on %s with a KV cache of types %s and %s", *it,
                ggml_backend_dev_name(kv_device(model, cparams.offload_kqv, *it)), ggml_type_name(params_mem.type_k), ggml_type_name(params_mem.type_v))));
        }
        params.attention = it == layers.end() ? LMINF_ATTENTION_FUSED : LMINF_ATTENTION_STOCK;
    }

    // RoPE angles are f32: the smaller the positions, the more exact they are. But each rebase rounds the stored keys
    // once more, so it is n_local tokens away at least: no key is rotated twice while a query can see it.
    const int64_t bound_min = (int64_t) n_cells + cparams.n_batch + lminf_stream::block;
    if (params.pos_bound == 0) {
        params.pos_bound = bound_min + params.n_local;
    } else if (params.pos_bound < bound_min) {
        throw std::runtime_error(lminf_set_error(format(
            "pos_bound = %d is too small: this window and batch need %d", params.pos_bound, (int) bound_min)));
    }

    v_trans = !is_fused() && !cparams.flash_attn;

    // the cache's own sliding window is wider than the rule's by the slack: it decides what is recycled, the mask what is seen
    window = std::make_unique<llama_kv_cache>(
            model, hparams, params_mem.type_k, params_mem.type_v, v_trans, cparams.offload_kqv,
            /*unified =*/ false, n_cells, n_seq_max, /*n_pad =*/ 1,
            params.n_local + params.n_slack, LLAMA_SWA_TYPE_STANDARD,
            /*mem_other =*/ nullptr, filter, /*reuse =*/ nullptr, /*share =*/ nullptr);

    std::set<ggml_backend_buffer_t> buffers; // llama_kv_cache allocates one for each device, K and V of all of its layers
    for (const int32_t il : layers) {
        buffers.insert(window->get_k_storage(il)->buffer);
    }
    for (ggml_backend_buffer_t buffer : buffers) {
        lminf_use_huge_pages(buffer);
    }

    streams.assign(n_seq_max, new_stream());
    dirty.assign(n_seq_max, 0);

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;

    for (const int32_t il : layers) {
        ggml_backend_buffer_type_t buft = cparams.offload_kqv
            ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        if (ctx_map.find(buft) == ctx_map.end()) {
            const ggml_init_params params_ctx = {
                /*.mem_size   =*/ 2*(1 + n_seq_max)*layers.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            };
            ctx_map[buft] = ggml_init(params_ctx);
            ctxs_bufs.emplace_back(ggml_context_ptr(ctx_map[buft]), nullptr);
        }

        sink_layer layer = {};

        layer.il       = il;
        layer.window_k = window->get_k_storage(il);
        layer.window_v = find_v_storage(*window, il);

        const auto new_store = [&](const char * name, ggml_type type, uint32_t n_embd_gqa, std::vector<ggml_tensor *> & seqs) {
            ggml_tensor * t = ggml_new_tensor_3d(ctx_map[buft], sink_type(type), n_embd_gqa, get_n_store_rows(), n_seq_max);
            ggml_format_name(t, "sink_%s_l%d", name, il);
            for (uint32_t s = 0; s < n_seq_max; ++s) {
                seqs.push_back(ggml_view_2d(ctx_map[buft], t, t->ne[0], t->ne[1], t->nb[1], s*t->nb[2]));
            }
            return t;
        };

        layer.k = new_store("k", params_mem.type_k, hparams.n_embd_k_gqa(il), layer.k_seq);
        layer.v = new_store("v", params_mem.type_v, hparams.n_embd_v_gqa(il), layer.v_seq);

        map_layer_ids[il] = sinks.size();
        sinks.push_back(std::move(layer));
    }

    for (const auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
        if (!buf) {
            throw std::runtime_error(lminf_set_error("failed to allocate the sink store"));
        }
        // masked rows are multiplied by zero, so they must not hold NaN
        ggml_backend_buffer_clear(buf.get(), 0);

        for (auto & ctx_buf : ctxs_bufs) {
            if (ctx_buf.first.get() == ctx) {
                ctx_buf.second = std::move(buf);
                break;
            }
        }
    }

    LLAMA_LOG_INFO("%s: n_global = %d, n_local = %d, max_distance = %d, n_slack = %d, n_cells = %u, pos_bound = %d\n",
            __func__, params.n_global, params.n_local, params.max_distance, params.n_slack, n_cells, params.pos_bound);
}

//
// batches
//

llama_memory_context_ptr lminf_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto failed = [] { return std::make_unique<lminf_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE); };

    balloc.split_reset();

    std::map<llama_seq_id, llama_pos> next; // position that a sequence's next token must have

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = n_seq_max == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.n_seq_id[i] != 1) {
                LLAMA_LOG_ERROR("%s: a token belongs to %d sequences, but each has a stream of its own\n", __func__, ubatch.n_seq_id[i]);
                return failed();
            }
            if (ubatch.pos[i] < 0 || ubatch.pos[i] >= params.pos_bound) {
                LLAMA_LOG_ERROR("%s: position %d is outside of [0, %d): ask lminf_next_pos for each batch's first position\n",
                        __func__, ubatch.pos[i], params.pos_bound);
                return failed();
            }

            const llama_seq_id seq_id = ubatch.seq_id[i][0];
            const llama_pos    pos    = next.try_emplace(seq_id, next_pos(seq_id)).first->second++;
            if (ubatch.pos[i] != pos) {
                LLAMA_LOG_ERROR("%s: a token of sequence %d has position %d where %d comes next: ask lminf_next_pos for each batch's first position\n",
                        __func__, seq_id, ubatch.pos[i], pos);
                return failed();
            }
        }

        ubatches.push_back(std::move(ubatch));
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed();
    }

    auto sinfos = window->prepare(ubatches);
    if (sinfos.empty()) {
        return failed();
    }

    return std::make_unique<lminf_memory_context>(this, std::move(sinfos), std::move(ubatches));
}

llama_memory_context_ptr lminf_memory::init_full() {
    return std::make_unique<lminf_memory_context>(this);
}

void lminf_memory::apply_ubatch(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        streams[ubatch.seq_id[i][0]].append(ubatch.pos[i]);

        max_graph_pos = std::max(max_graph_pos, ubatch.pos[i]);
    }
}

// the window's own pending work, and the sinks' share of sequence copies
class lminf_memory_update : public llama_memory_context_i {
public:
    lminf_memory_update(lminf_memory * mem, llama_context * lctx, bool optimize) :
        mem(mem), lctx(lctx), inner(mem->window->init_update(lctx, optimize)), copies(std::move(mem->pending_copies)) {
        mem->pending_copies.clear();
    }

    bool next() override { return false; }

    bool apply() override {
        const bool res = inner->get_status() != LLAMA_MEMORY_STATUS_SUCCESS || inner->apply();

        if (!copies.empty()) {
            llama_synchronize(lctx);
            mem->copy_sinks(copies);
        }

        return res;
    }

    const llama_ubatch & get_ubatch() const override { return inner->get_ubatch(); }

    llama_memory_status get_status() const override {
        return copies.empty() ? inner->get_status() : LLAMA_MEMORY_STATUS_SUCCESS;
    }

private:
    lminf_memory  * mem;
    llama_context * lctx;

    llama_memory_context_ptr inner;

    std::vector<lminf_memory::seq_copy> copies;
};

llama_memory_context_ptr lminf_memory::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;

    return std::make_unique<lminf_memory_update>(this, lctx, optimize);
}

void lminf_memory::copy_sinks(const std::vector<seq_copy> & copies) {
    for (const auto & copy : copies) {
        for (const auto & layer : sinks) {
            ggml_backend_tensor_copy(layer.k_seq[copy.src], layer.k_seq[copy.dst]);
            ggml_backend_tensor_copy(layer.v_seq[copy.src], layer.v_seq[copy.dst]);
        }
    }
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

    const llama_pos shift = lminf_stream::rebase_shift(window->seq_pos_min(seq_id));
    GGML_ASSERT(next + n_tokens - shift <= params.pos_bound);

    window->seq_add(seq_id, 0, -1, -shift);
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

bool lminf_memory::seq_start(llama_seq_id seq_id, int64_t stream_pos) {
    if (stream_pos < 0 || stream_pos > lminf_stream::max_start || streams[seq_id].begun) {
        lminf_set_error(format("a stream position can only be set on an empty sequence, to 0 to %lld", (long long) lminf_stream::max_start));
        return false;
    }

    // graph positions begin anywhere within a block, as they would after a rebase
    streams[seq_id].begin_at(stream_pos);

    return true;
}

bool lminf_memory::skip(llama_seq_id seq_id, int64_t n_tokens) {
    auto & stream = streams[seq_id];

    if (n_tokens < params.n_local) {
        lminf_set_error(format("a skip must be n_local = %d tokens or more, so that no query sees across it", params.n_local));
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

    free_cells(seq_id, -1);
    stream.skip_to(stream_pos + n_tokens);

    return true;
}

llama_pos lminf_memory::next_pos(llama_seq_id seq_id) const {
    const llama_pos pos_max = window->seq_pos_max(seq_id);

    return pos_max >= 0 ? pos_max + 1 : (llama_pos) streams[seq_id].pos_resume();
}

llama_pos lminf_memory::graph_pos(llama_seq_id seq_id, int64_t stream_pos) const {
    const int64_t pos = stream_pos - streams[seq_id].origin;

    return (llama_pos) std::clamp<int64_t>(pos, -1, std::numeric_limits<llama_pos>::max());
}

llama_pos lminf_memory::rollback_min(llama_seq_id seq_id) const {
    const int64_t pos_min    = window->seq_pos_min(seq_id);
    const int64_t pos_resume = streams[seq_id].pos_resume();

    // nothing has been recycled yet: any token can be the last one
    if (pos_min <= pos_resume) {
        return (llama_pos) pos_resume;
    }

    return (llama_pos) (pos_min + params.n_local - 1);
}

bool lminf_memory::can_truncate(llama_seq_id seq_id, llama_pos p0) const {
    return p0 <= std::max<int64_t>(0, streams[seq_id].pos_start()) || p0 >= rollback_min(seq_id);
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
    info.n_cells       = n_cells;
    info.n_rebase      = n_rebase;
    info.max_graph_pos = max_graph_pos;
    info.pos_bound     = params.pos_bound;

    for (const auto & [_, size] : memory_breakdown()) {
        info.kv_bytes += size;
    }

    return info;
}

//
// sequences
//

void lminf_memory::clear(bool data) {
    seq_rm(-1, -1, -1);
    window->clear(data); // as new: the next stream begins in the first cell

    if (data) {
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

bool lminf_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id < (llama_seq_id) n_seq_max);

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
            free_cells(s, -1);
            zero_sinks(s, 0, streams[s].n_sink);
            streams[s] = new_stream();
        } else {
            const int32_t n_sink = streams[s].n_sink;

            free_cells(s, p0);
            streams[s].truncate(p0);
            zero_sinks(s, streams[s].n_sink, n_sink);
        }
    }

    return true;
}

void lminf_memory::free_cells(llama_seq_id seq_id, llama_pos p0) {
    if (p0 < 0) {
        zero_cells(seq_id, 0, dirty[seq_id]);
        if (pending_copies.empty()) {
            dirty[seq_id] = 0;
        }
    } else {
        const auto & cells = window->get_cells(seq_id);

        for (uint32_t i = 0, n = 0; i < n_cells; i += n + 1, n = 0) {
            while (i + n < n_cells && cells.pos_in(i + n, p0, std::numeric_limits<llama_pos>::max())) {
                n++;
            }
            zero_cells(seq_id, i, n);
        }
    }

    window->seq_rm(seq_id, p0, -1);
}

bool lminf_memory::begin_zero() {
    if (!pending_copies.empty()) {
        return false;
    }
    if (lctx) {
        llama_synchronize(lctx);
    }
    return true;
}

void lminf_memory::mark_dirty(llama_seq_id seq_id) {
    dirty[seq_id] = std::max(dirty[seq_id], window->get_cells(seq_id).used_max_p1());
}

void lminf_memory::zero_cells(llama_seq_id seq_id, uint32_t i0, uint32_t n) {
    if (n == 0 || !begin_zero()) {
        return;
    }

    for (const auto & layer : sinks) {
        for (ggml_tensor * t : { layer.window_k, layer.window_v }) {
            const size_t at = window->get_stream(seq_id)*t->nb[2];

            if (t == layer.window_k || !v_trans) {
                ggml_backend_tensor_memset(t, 0, at + i0*t->nb[1], n*t->nb[1]);
            } else if (n == n_cells) {
                ggml_backend_tensor_memset(t, 0, at, t->nb[2]);
            } else {
                for (int64_t row = 0; row < t->ne[0]; ++row) {
                    ggml_backend_tensor_memset(t, 0, at + (row*n_cells + i0)*t->nb[0], n*t->nb[0]);
                }
            }
        }
    }
}

void lminf_memory::zero_sinks(llama_seq_id seq_id, int32_t i0, int32_t i1) {
    if (i0 == i1 || !begin_zero()) {
        return;
    }

    for (const auto & layer : sinks) {
        for (ggml_tensor * t : { layer.k_seq[seq_id], layer.v_seq[seq_id] }) {
            ggml_backend_tensor_memset(t, 0, i0*t->nb[1], (i1 - i0)*t->nb[1]);
        }
    }
}

void lminf_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(is_valid(seq_id_src) && is_valid(seq_id_dst));

    if (seq_id_src == seq_id_dst) {
        return;
    }

    const bool from_start = p0 <= std::max<int64_t>(0, streams[seq_id_src].pos_start());
    const bool to_end     = p1 < 0 || p1 >= next_pos(seq_id_src);

    if (!from_start || (!to_end && !can_truncate(seq_id_src, p1))) {
        LLAMA_LOG_ERROR("%s: [%d, %d) of sequence %d cannot be copied: its tokens attend to others that would not be\n",
                __func__, p0, p1, seq_id_src);
        return;
    }

    window->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    streams[seq_id_dst] = streams[seq_id_src];
    pending_copies.push_back({ seq_id_src, seq_id_dst });

    dirty[seq_id_dst] = dirty[seq_id_src];

    // the cells' contents are copied by the next update: do it now, so that a state written next is whole
    if (lctx) {
        lctx->memory_update(false);
    }

    if (!to_end) {
        seq_rm(seq_id_dst, p1, -1);
    }
}

void lminf_memory::seq_keep(llama_seq_id seq_id) {
    GGML_ASSERT(is_valid(seq_id));

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
    return window->seq_pos_min(seq_id);
}

llama_pos lminf_memory::seq_pos_max(llama_seq_id seq_id) const {
    return next_pos(seq_id) - 1;
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_memory::memory_breakdown() const {
    auto res = window->memory_breakdown();
    for (const auto & [_, buf] : ctxs_bufs) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

//
// lminf_memory_context
//

lminf_memory_context::lminf_memory_context(llama_memory_status status) : llama_kv_cache_context(status) {}

lminf_memory_context::lminf_memory_context(lminf_memory * mem) :
    llama_kv_cache_context(mem->window.get()), mem(mem), stores_sinks(mem->params.n_global > 0) {
    spans.push_back({ 0, mem->n_seq_max });
}

lminf_memory_context::lminf_memory_context(lminf_memory * mem, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(mem->window.get(), sinfos, std::move(ubatches)), mem(mem) {
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
        mem->mark_dirty(ubatch.seq_id_unq[s]);
    }

    return res;
}
