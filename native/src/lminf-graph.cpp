#include "lminf-graph.h"

#include "llama-context.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "lminf-attn.h"

#include <limits>

// of one sequence: the keys of the others stay where they are
static ggml_tensor * build_shift(
        ggml_context * ctx, const llama_hparams & hparams, const lminf_rope & rope, ggml_tensor * k, ggml_tensor * shift, ggml_tensor * rot,
        int il, uint32_t stream) {
    const int64_t n_embd_head = hparams.n_embd_head_k(il);

    ggml_tensor * cur = ggml_view_3d(ctx, k, n_embd_head, hparams.n_head_kv(il), k->ne[1],
            ggml_row_size(k->type, n_embd_head), k->nb[1], stream*k->nb[2]);

    shift = ggml_view_1d(ctx, shift, k->ne[1], stream*k->ne[1]*shift->nb[0]);

    // without a copy of the window, which can be larger than all that an evaluation needs
    if (k->type == GGML_TYPE_F32 || k->type == GGML_TYPE_F16) {
        return lminf_rotate(ctx, rope, cur, shift, true);
    }

    ggml_tensor * tmp = ggml_cast(ctx, cur, GGML_TYPE_F32);
    if (rope.hadamard) {
        tmp = llama_mul_mat_hadamard(ctx, tmp, rot);
    }
    tmp = lminf_rotate(ctx, rope, tmp, shift);
    if (rope.hadamard) {
        tmp = llama_mul_mat_hadamard(ctx, tmp, rot);
    }

    return ggml_cpy(ctx, tmp, cur);
}

bool lminf_build_shift(ggml_context * ctx, const llama_context & lctx, ggml_cgraph * gf, ggml_tensor * k, ggml_tensor * shift,
        ggml_tensor * rot, int il) {
    if (!lctx.get_cparams().lminf.enabled) {
        return false;
    }
    auto       * mem  = lminf_get_memory(&lctx);
    const auto & rope = mem->get_rope(il);

    // a layer without attention has never been built, one without RoPE has nothing to rotate
    if (!rope.known || rope.n_dims == 0) {
        return true;
    }
    for (const lminf_kv * kv : mem->caches()) {
        for (const uint32_t stream : kv->shifted_streams(k)) {
            ggml_build_forward_expand(gf, build_shift(ctx, lctx.get_model().hparams, rope, k, shift, rot, il, stream));
        }
    }
    return true;
}

//
// the memory's contexts, inside of whatever class the model's graph expects
//

namespace {

struct contexts {
    const lminf_memory_context   * window;
    const llama_kv_cache_context * sliding = nullptr; // NULL if no layer slides
};

}

static contexts find_contexts(const llama_memory_context_i * mctx) {
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        mctx = hybrid->get_attn();
    } else if (const auto * hybrid_iswa = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        mctx = hybrid_iswa->get_attn();
    }
    const auto * dsa_iswa = dynamic_cast<const llama_kv_cache_dsa_iswa_context *>(mctx);
    if (const auto * dsa = dsa_iswa ? dsa_iswa->get_dsa() : dynamic_cast<const llama_kv_cache_dsa_context *>(mctx)) {
        return { static_cast<const lminf_memory_context *>(dsa->get_mla()), dsa_iswa ? dsa_iswa->get_swa() : nullptr };
    }
    if (const auto * msa = dynamic_cast<const llama_kv_cache_msa_context *>(mctx)) {
        return { static_cast<const lminf_memory_context *>(msa->get_base()) };
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        return { static_cast<const lminf_memory_context *>(iswa->get_base()), iswa->get_swa() };
    }
    return { static_cast<const lminf_memory_context *>(mctx) };
}

const lminf_memory * lminf_find_memory(const llm_graph_context & graph) {
    return graph.cparams.lminf.enabled ? &find_contexts(graph.mctx).window->get_memory() : nullptr;
}

int64_t lminf_n_in_view(const lminf_memory & mem, llama_seq_id seq_id, llama_pos pos) {
    const auto & stream = mem.get_stream(seq_id);

    return std::min<int64_t>(stream.index(pos), (int64_t) stream.n_global + mem.get_params().n_recall + mem.get_params().n_local - 1);
}

//
// lminf_graph_input
//

static ggml_tensor * as_input(const char * name, ggml_tensor * t) {
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

lminf_graph_input::lminf_graph_input(const llm_graph_context & graph) :
    mctx(find_contexts(graph.mctx).window), stores_sinks(mctx->get_stores_sinks()), use_alibi(graph.hparams.use_alibi),
    n_swa(graph.hparams.n_swa), swa_type(graph.hparams.swa_type) {
    ggml_context * ctx = graph.ctx0;

    const auto * sliding = find_contexts(graph.mctx).sliding;

    const int64_t n_tokens    = graph.ubatch.n_tokens;
    const int64_t n_stream    = mctx->get_ns();
    const int64_t n_sink_rows = mctx->get_n_sink_rows();

    q_shift   = as_input("lminf_q_shift",   ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens));
    k_shift   = as_input("lminf_k_shift",   ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens));
    if (mctx->get_memory().get_recall()) {
        k_plain_shift = as_input("lminf_k_plain_shift", ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens));
    }
    if (mctx->get_memory().get_router()) {
        router = as_input("lminf_router", ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens));
    }
    sink_rows = as_input("lminf_sink_rows", ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens));

    // f32 even with flash attention on: an f16 ALiBi distance is only exact to 2048
    const auto new_mask = [&](const char * name, int64_t n_rows) {
        return as_input(name, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_rows, n_tokens/n_stream, 1, n_stream));
    };
    mask = new_mask("lminf_mask", mctx->get_memory().get_n_recall_rows() + n_sink_rows + mctx->get_n_kv());
    if (sliding) {
        mask_sliding = new_mask("lminf_mask_sliding", sliding->get_n_kv());
    }
    if (auto * mem_recall = mctx->get_memory().get_recall()) {
        recall = std::make_unique<lminf_recall_batch>(*mem_recall, n_stream);
    }
}

ggml_tensor * lminf_graph_input::get_head_mask(const llm_graph_context & graph, int64_t n_head, int64_t n_head_kv) {
    ggml_tensor *& res = head_masks[{ n_head, n_head_kv }];
    if (!res) {
        const int64_t n_stream = mctx->get_ns();
        const int64_t n_rows   = mctx->get_memory().get_n_recall_rows();

        res = as_input("lminf_head_mask", ggml_new_tensor_4d(graph.ctx0, GGML_TYPE_F32, n_rows + mctx->get_n_sink_rows(), graph.ubatch.n_tokens/n_stream, n_head, n_stream));
    }
    return res;
}

bool lminf_graph_input::can_reuse(const llm_graph_params & params) {
    const auto ctxs = find_contexts(params.mctx);

    mctx = ctxs.window;

    return
        stores_sinks   == mctx->get_stores_sinks() &&
        q_shift->ne[0] == params.ubatch.n_tokens &&
        mask->ne[0]    == mctx->get_memory().get_n_recall_rows() + mctx->get_n_sink_rows() + mctx->get_n_kv() &&
        mask->ne[3]    == mctx->get_ns() &&
        (!mask_sliding || mask_sliding->ne[0] == ctxs.sliding->get_n_kv());
}

void lminf_graph_input::set_input(const llama_ubatch * ubatch) {
    const auto & mem    = mctx->get_memory();
    const auto & params = mem.get_params();

    const int64_t n_tokens      = ubatch->n_tokens;
    const int64_t n_stream      = mask->ne[3];
    const int64_t n_sink_rows   = mctx->get_n_sink_rows();
    const int64_t n_recall_rows = mem.get_n_recall_rows();
    const int64_t n_kv          = mask->ne[0] - n_sink_rows - n_recall_rows;

    if (recall) {
        for (int64_t s = 0; s < n_stream; ++s) {
            const int64_t      i0     = s*n_tokens/n_stream;
            const llama_seq_id seq_id = ubatch->seq_id[i0][0];
            const auto       & stream = mem.get_stream(seq_id);

            recall->set_seq(s, seq_id, stream.index(ubatch->pos[i0]), n_tokens/n_stream, stream.n_global, mctx->is_last());
        }
    }

    // a graph without sinks, without RoPE or without one kind of layers leaves some inputs unallocated
    const auto host_data = [](ggml_tensor * t) {
        GGML_ASSERT(!t->buffer || ggml_backend_buffer_is_host(t->buffer));
        return t->buffer ? t->data : nullptr;
    };

    int32_t * data_q_shift   = (int32_t *) host_data(q_shift);
    int32_t * data_k_shift   = (int32_t *) host_data(k_shift);
    int64_t * data_sink_rows = (int64_t *) host_data(sink_rows);
    float   * data_mask      = (float   *) host_data(mask);
    float   * data_sliding   = mask_sliding ? (float *) host_data(mask_sliding) : nullptr;
    int32_t * data_k_plain   = k_plain_shift ? (int32_t *) host_data(k_plain_shift) : nullptr;
    float   * data_router    = router ? (float *) host_data(router) : nullptr;

    const bool is_paper = recall && params.recall_rule == LMINF_RECALL_PAPER;

    for (const auto & [heads, t] : head_masks) {
        auto * data = (float *) host_data(t);

        const int64_t n_group = heads.first/heads.second;
        for (int64_t i = 0; data && i < ggml_nelements(t); ++i) {
            const int64_t r = i % t->ne[0];
            const int64_t q = i/t->ne[0] % t->ne[1];
            const int64_t h = i/t->ne[0]/t->ne[1] % t->ne[2];

            const bool is_newest = q == t->ne[1] - 1;

            data[i] = r >= n_recall_rows || (is_newest && r/params.n_recall == h % n_group) ? 0.0f : -INFINITY;
        }
    }

    for (int64_t i = 0; i < n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch->seq_id[i][0];
        const llama_pos    pos    = ubatch->pos[i];

        // positions stay small for ever
        GGML_ASSERT(pos >= 0 && pos < params.pos_bound);

        const auto & stream = mem.get_stream(seq_id);
        const auto & cells  = mem.get_cells(seq_id);

        const int64_t index    = stream.index(pos);
        const bool    is_sink  = index < stream.n_global;
        // where StreamingLLM has the query: its place in the cache, which grows until sinks and window are full
        const int64_t in_cache = lminf_n_in_view(mem, seq_id, pos); // there is no recall then

        int64_t q_pos = 0; // where the second query goes
        int64_t k_pos = 0; // where a sink's key goes
        switch (params.sink_mode) {
            case LMINF_SINK_CEILING: q_pos = params.recall_distance; k_pos = is_sink ? params.sink_pos() : 0; break;
            case LMINF_SINK_ORDER:   q_pos = in_cache;               k_pos = index; break;
            case LMINF_SINK_TRUE:    q_pos = index;                  k_pos = index; break;
        }

        if (data_q_shift) {
            data_q_shift[i] = (int32_t) std::min<int64_t>(q_pos - pos, std::numeric_limits<int32_t>::max());
        }
        if (data_k_shift) {
            data_k_shift[i] = is_sink ? (int32_t) (k_pos - pos) : 0;
        }
        if (data_k_plain) {
            data_k_plain[i] = -pos;
        }
        if (data_router) {
            data_router[i] = mem.get_router()->get(seq_id, index);
        }
        if (data_sink_rows) {
            data_sink_rows[i] = seq_id*mem.get_n_store_rows() + (is_sink ? index : mem.get_n_sink_rows());
        }
        if (data_sliding) {
            const auto & cells_sliding = mem.get_sliding_cells(seq_id);

            float * row = data_sliding + i*mask_sliding->ne[0];

            for (int64_t c = 0; c < mask_sliding->ne[0]; ++c) {
                const bool open = !cells_sliding.is_empty(c) && cells_sliding.pos_get(c) <= pos &&
                    !llama_hparams::is_masked_swa(n_swa, swa_type, cells_sliding.pos_get(c), pos);

                row[c] = !open ? -INFINITY : use_alibi ? -(float) (pos - cells_sliding.pos_get(c)) : 0.0f;
            }
        }

        if (!data_mask) {
            continue;
        }

        float * row = data_mask + i*(n_recall_rows + n_sink_rows + n_kv);

        // every query of a micro-batch sees what it recalled
        const int64_t n_chosen = recall ? recall->get_seq(i*n_stream/n_tokens).n_chosen : 0;
        for (int64_t r = 0; r < n_recall_rows; ++r) {
            const bool open = is_paper ? n_chosen > 0 : r < n_chosen;

            row[r] = !open ? -INFINITY : use_alibi ? -(float) params.recall_distance : 0.0f;
        }

        row += n_recall_rows;

        for (int64_t j = 0; j < n_sink_rows; ++j) {
            const bool    open     = j < stream.n_sink && index - j >= params.n_local;
            const int64_t distance = params.sink_mode == LMINF_SINK_CEILING ? params.max_distance : q_pos - j;

            row[j] = !open ? -INFINITY : use_alibi ? -(float) distance : 0.0f;
        }

        row += n_sink_rows;

        for (int64_t c = 0; c < n_kv; ++c) {
            const int32_t distance = cells.is_empty(c) ? -1 : pos - cells.pos_get(c);
            const bool    open     = distance >= 0 && distance < params.n_local;

            row[c] = !open ? -INFINITY : use_alibi ? -(float) distance : 0.0f;
        }
    }
}

// the input of this graph, made for its first layer
static lminf_graph_input * find_input(const llm_graph_context & graph) {
    for (const auto & input : graph.res->inputs) {
        if (auto * found = dynamic_cast<lminf_graph_input *>(input.get())) {
            return found;
        }
    }
    return static_cast<lminf_graph_input *>(graph.res->add_input(std::make_unique<lminf_graph_input>(graph)));
}

//
// lminf_attn
//

// contiguous rows of one token each
static ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * t, int64_t n_tokens) {
    const int64_t n_embd = ggml_nelements(t)/n_tokens;

    return ggml_is_contiguous(t) ? ggml_reshape_2d(ctx, t, n_embd, n_tokens) : ggml_cont_2d(ctx, t, n_embd, n_tokens);
}

lminf_attn::lminf_attn(const llm_graph_context & graph, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor *& v_cur, ggml_tensor * kq_b,
        ggml_tensor * k_rot, int il) :
    graph(graph), inp(graph.cparams.lminf.enabled ? find_input(graph) : nullptr), il(il) {
    if (!inp) {
        return;
    }
    if (kq_b) {
        lminf_refuse_layer(graph.arch, il, "adds a bias of its own to the attention scores");
    }

    const int64_t n_tokens = q_cur->ne[2];
    if (v_cur && v_cur->ne[2] != n_tokens) {
        const int64_t n_head_kv = graph.hparams.n_head_kv(il);

        v_cur = ggml_reshape_3d(graph.ctx0, as_rows(graph.ctx0, v_cur, n_tokens), ggml_nelements(v_cur)/n_tokens/n_head_kv, n_head_kv, n_tokens);
    }

    auto & mem  = inp->mctx->get_memory();
    auto & rope = mem.get_rope(il);

    rope = lminf_read_rope(q_cur, k_cur, mem.get_text_factors(), graph.arch, il);
    rope.hadamard = k_rot != nullptr;

    if (mem.is_router(il)) {
        ggml_build_forward_expand(graph.gf, v_cur); // an input that the model fills, whoever reads it

        is_router = true;
        v_cur     = ggml_pad(graph.ctx0, ggml_reshape_3d(graph.ctx0, inp->router, 1, 1, n_tokens), v_cur->ne[0] - 1, 0, 0, 0);
        return;
    }
    if (n_rows() == 0 && !mem.get_recall()) {
        return;
    }
    if (is_sliding()) {
        return;
    }

    q = rope.n_dims > 0 ? lminf_rotate(graph.ctx0, rope, q_cur, inp->q_shift) : q_cur;
    graph.cb(q, "lminf_q_sink", il);

    if (k_cur && mem.get_recall()) {
        k_plain = rope.n_dims > 0 ? lminf_rotate(graph.ctx0, rope, k_cur, inp->k_plain_shift) : k_cur;
        graph.cb(k_plain, "lminf_k_plain", il);
    }
    if (inp->mctx->get_stores_sinks() && k_cur) {
        k = rope.n_dims > 0 ? lminf_rotate(graph.ctx0, rope, k_cur, inp->k_shift) : k_cur;
        graph.cb(k, "lminf_k_sink", il);
    }
}

const lminf_attn * lminf_attn::finish(ggml_tensor * v_cur, ggml_tensor *& v, ggml_tensor *& kq_mask) const {
    if (!inp) {
        return nullptr;
    }
    if (is_router) {
        routed = v_cur;
        return this;
    }

    if (k) {
        const auto & sinks = inp->mctx->get_memory().get_sinks();

        const auto store_rows = [&](ggml_tensor * dst, ggml_tensor * cur) {
            dst = ggml_reshape_2d(graph.ctx0, dst, dst->ne[0], dst->ne[1]*dst->ne[2]);
            ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, dst, as_rows(graph.ctx0, cur, inp->sink_rows->ne[0]), inp->sink_rows));
        };

        store_rows(sinks.get_k(il), k);
        if (v_cur) {
            store_rows(sinks.get_v(il), v_cur);
        }
    }

    if (k_plain) {
        stored = inp->recall->build_store(graph.ctx0, k_plain, v_cur, il);
        on_cpu(stored);
        ggml_build_forward_expand(graph.gf, stored);
    }

    if (ggml_is_quantized(v->type) && !is_fused()) {
        v = ggml_cast(graph.ctx0, v, GGML_TYPE_F32); // stock operations cannot transpose it as it is
    }
    kq_mask = layer_mask();

    return this;
}

// the archive and its search are the host's
void lminf_attn::on_cpu(ggml_tensor * t) const {
    ggml_backend_sched_set_tensor_backend(graph.sched, t, graph.backend_cpu);
}

void lminf_attn::build_rows(float kq_scale) const {
    const auto & mem   = inp->mctx->get_memory();
    const auto & sinks = mem.get_sinks();

    if (!inp->recall || !mem.recalls(il)) {
        return;
    }

    const auto sequences = [&](ggml_tensor * t) {
        return ggml_view_3d(graph.ctx0, t, t->ne[0], inp->mctx->get_n_sink_rows(), inp->mctx->get_ns(), t->nb[1], t->nb[2], t->nb[2]*inp->mctx->get_s0());
    };
    const bool has_sinks = inp->mctx->get_n_sink_rows() > 0;

    // as exact as the sinks
    const bool is_f16 = sinks.get_k(il)->type == GGML_TYPE_F16 && sinks.get_v(il)->type == GGML_TYPE_F16;

    rows = inp->recall->build_rows(graph.ctx0, q, has_sinks ? sequences(sinks.get_k(il)) : nullptr,
            has_sinks && !graph.hparams.is_mla() ? sequences(sinks.get_v(il)) : nullptr, stored, is_f16 ? GGML_TYPE_F16 : GGML_TYPE_F32, mem.get_n_recall_rows(),
            score_scale(kq_scale), logit_softcap(), il, [&](ggml_tensor * t) { on_cpu(t); });
    graph.cb(rows, "lminf_rows", il);
}

// Grok caps its scores always, and scales them for it
float lminf_attn::score_scale(float kq_scale) const {
    return graph.arch == LLM_ARCH_GROK ? kq_scale*graph.hparams.f_attn_out_scale : kq_scale;
}

float lminf_attn::logit_softcap() const {
    return graph.arch == LLM_ARCH_GROK || graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
}

int64_t lminf_attn::n_rows() const {
    if (is_sliding()) {
        return 0;
    }
    const auto & mem = inp->mctx->get_memory();

    return inp->mctx->get_n_sink_rows() + (mem.recalls(il) ? mem.get_n_recall_rows() : 0);
}

ggml_tensor * lminf_attn::layer_mask() const {
    if (is_sliding()) {
        return inp->mask_sliding;
    }
    const int64_t n_recall_rows = inp->mctx->get_memory().get_n_recall_rows();

    ggml_tensor * mask = inp->mask;
    if (n_recall_rows == 0 || inp->mctx->get_memory().recalls(il)) {
        return mask;
    }
    mask = ggml_view_4d(graph.ctx0, mask, mask->ne[0] - n_recall_rows, mask->ne[1], mask->ne[2], mask->ne[3], mask->nb[1], mask->nb[2], mask->nb[3],
            n_recall_rows*mask->nb[0]);

    return is_fused() ? mask : ggml_cont(graph.ctx0, mask);
}

ggml_tensor * lminf_attn::add_confidence(ggml_tensor * mask) const {
    const auto & mem = inp->mctx->get_memory();

    // with ALiBi each head multiplies its mask by its slope
    if (!rows || mem.get_params().recall_rule == LMINF_RECALL_PAPER || graph.hparams.use_alibi) {
        return mask;
    }
    return ggml_add(graph.ctx0, mask, inp->recall->build_confidence(graph.ctx0, mask->ne[0], [&](ggml_tensor * t) { on_cpu(t); }));
}

bool lminf_attn::is_sliding() const {
    return graph.hparams.is_swa(il);
}

// rows of n_embd_head*n_head_kv elements and what may come behind them, [n_embd_head, n_rows, n_head_kv, n_stream]
static ggml_tensor * view_rows(ggml_context * ctx, ggml_tensor * t, int64_t n_embd_head, int64_t n_head_kv, int64_t n_rows, int64_t n_stream, size_t offset) {
    ggml_tensor * res = ggml_view_4d(ctx, t, n_embd_head, n_head_kv, n_rows, n_stream, ggml_row_size(t->type, n_embd_head), t->nb[1], t->nb[2], offset);

    return ggml_permute(ctx, res, 0, 2, 1, 3);
}

ggml_tensor * lminf_attn::view_k_rows() const {
    const auto  & mctx = *inp->mctx;
    ggml_tensor * k_sink = mctx.get_memory().get_sinks().get_k(il);

    return view_rows(graph.ctx0, rows ? rows : k_sink, graph.hparams.n_embd_head_k(il), graph.hparams.n_head_kv(il), n_rows(), mctx.get_ns(),
            rows ? 0 : mctx.get_s0()*k_sink->nb[2]);
}

ggml_tensor * lminf_attn::view_v_rows() const {
    const auto  & mctx    = *inp->mctx;
    const auto  & hparams = graph.hparams;
    ggml_tensor * v_sink  = mctx.get_memory().get_sinks().get_v(il);

    const size_t behind_k = hparams.is_mla() || !rows ? 0 : ggml_row_size(rows->type, hparams.n_embd_k_gqa(il));

    return view_rows(graph.ctx0, rows ? rows : v_sink, hparams.n_embd_head_v(il), hparams.n_head_kv(il), n_rows(), mctx.get_ns(),
            rows ? behind_k : mctx.get_s0()*v_sink->nb[2]);
}

ggml_tensor * lminf_attn::view_q_sink(int64_t n_stream) const {
    const int64_t n_tokens = q->ne[2]/n_stream;

    ggml_tensor * res = ggml_view_4d(graph.ctx0, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tokens, 0);

    return ggml_permute(graph.ctx0, res, 0, 2, 1, 3);
}

bool lminf_attn::is_fused() const {
    return is_router || inp->mctx->get_memory().is_fused(il);
}

ggml_tensor * lminf_attn::build_fused(
        ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * v_mla, ggml_tensor * head_sinks, float kq_scale) const {
    ggml_context * ctx = graph.ctx0;

    if (is_router) {
        return as_rows(ctx, routed, routed->ne[2]);
    }

    ggml_tensor * q_sink = nullptr;
    ggml_tensor * k_sink = nullptr;
    ggml_tensor * v_sink = nullptr;
    if (n_rows() > 0) {
        build_rows(kq_scale);
        q_sink = view_q_sink(q_cur->ne[3]);
        k_sink = view_k_rows();
        v_sink = view_v_rows();
    }

    ggml_tensor * cur = ggml_lminf_attn(ctx, q_cur, k_cur, v_cur, add_confidence(layer_mask()), head_sinks, q_sink, k_sink, v_sink,
            score_scale(kq_scale), graph.hparams.f_max_alibi_bias, logit_softcap());

    if (!graph.cparams.offload_kqv) {
        on_cpu(cur); // where its K and V are
    }

    const int64_t n_tokens = cur->ne[2]*cur->ne[3];

    if (v_mla) {
        cur = ggml_reshape_3d(ctx, cur, cur->ne[0], cur->ne[1], n_tokens);
        cur = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, cur, 0, 2, 1, 3)); // [n_embd_head_v_mla, n_tokens, n_head]
        cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
    }
    cur = ggml_reshape_2d(ctx, cur, ggml_nelements(cur)/n_tokens, n_tokens);

    return cur;
}

ggml_tensor * lminf_attn::build_kq(ggml_tensor * kq, ggml_tensor *& kq_mask, float kq_scale) const {
    if (n_rows() == 0) {
        return kq;
    }

    ggml_context * ctx = graph.ctx0;

    build_rows(kq_scale);
    kq_mask = add_confidence(kq_mask);

    ggml_tensor * kq_rows = ggml_mul_mat(ctx, view_k_rows(), view_q_sink(kq->ne[3]));
    ggml_prec_set_acc(kq_rows, GGML_PREC_F32);
    if (rows && inp->mctx->get_memory().get_params().recall_rule == LMINF_RECALL_PAPER) {
        kq_rows = ggml_add(ctx, kq_rows, inp->get_head_mask(graph, graph.hparams.n_head(il), graph.hparams.n_head_kv(il)));
    }
    graph.cb(kq_rows, "lminf_kq_rows", il);

    return ggml_concat(ctx, kq_rows, kq, 0);
}

ggml_tensor * lminf_attn::build_kqv(ggml_tensor * v, ggml_tensor * kq) const {
    ggml_context * ctx = graph.ctx0;

    if (n_rows() == 0) {
        return ggml_mul_mat(ctx, v, kq);
    }

    const auto columns = [&](int64_t i0, int64_t n) {
        return ggml_view_4d(ctx, kq, n, kq->ne[1], kq->ne[2], kq->ne[3], kq->nb[1], kq->nb[2], kq->nb[3], i0*kq->nb[0]);
    };

    ggml_tensor * v_rows = ggml_cont(ctx, ggml_transpose(ctx, view_v_rows()));

    ggml_tensor * kqv      = ggml_mul_mat(ctx, v, columns(n_rows(), kq->ne[0] - n_rows()));
    ggml_tensor * kqv_rows = ggml_mul_mat(ctx, v_rows, ggml_cont(ctx, columns(0, n_rows())));

    return ggml_add(ctx, kqv, kqv_rows);
}
