#include "lminf-graph.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "lminf-attn.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

// ggml_rope's op_params: n_dims is [1], mode [2], attn_factor [8]; see ggml_rope_impl
enum rope_op_param {
    ROPE_N_DIMS      = 1,
    ROPE_MODE        = 2,
    ROPE_FREQ_SCALE  = 6,
    ROPE_EXT_FACTOR  = 7,
    ROPE_ATTN_FACTOR = 8,
};

static float get_f32(const int32_t * op_params, rope_op_param i) {
    float res;
    memcpy(&res, op_params + i, sizeof(res));
    return res;
}

//
// reading the rotation off the graph
//

[[noreturn]] static void refuse(llm_arch arch, int il, const char * why) {
    throw std::runtime_error(lminf_set_error(format(
        "models of architecture '%s' cannot run with a Λ cache: layer %d %s", llm_arch_name(arch), il, why)));
}

// an input of the graph, seen through reshapes: depends on the position, not on the token
static bool is_graph_input(const ggml_tensor * t) {
    while (t && !(t->flags & GGML_TENSOR_FLAG_INPUT)) {
        const bool same_data = t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE;
        t = same_data ? t->src[0] : nullptr;
    }
    return t != nullptr;
}

static bool has_rope_below(const ggml_tensor * t) {
    while (t && t->op != GGML_OP_MUL_MAT && t->op != GGML_OP_ROPE) {
        t = t->src[0];
    }
    return t && t->op == GGML_OP_ROPE;
}

// the RoPE node that made q or k, or NULL if it was not rotated. A further rotation by other positions is the same as
// rotating by their sum only if everything between that node and the attention commutes with a rotation.
static const ggml_tensor * find_rope(const ggml_tensor * t, llm_arch arch, int il) {
    bool commutes = true;

    while (t) {
        switch (t->op) {
            case GGML_OP_ROPE:
                if (!commutes) {
                    refuse(arch, il, "changes its queries or keys between RoPE and attention");
                }
                if (t->op_params[ROPE_MODE] & GGML_ROPE_TYPE_MROPE) {
                    refuse(arch, il, "uses M-RoPE, which has several positions per token");
                }
                return t;

            case GGML_OP_MUL_MAT:
            case GGML_OP_GET_ROWS:
                return nullptr; // the projection: nothing was rotated

            case GGML_OP_CONCAT:
                if (has_rope_below(t->src[0]) || has_rope_below(t->src[1])) {
                    refuse(arch, il, "joins a rotated and an unrotated part into one head (MLA)");
                }
                commutes = false;
                break;

            // these move data, scale whole heads, or depend on the norm of a head alone
            case GGML_OP_NONE:
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_SCALE:
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
                break;

            case GGML_OP_MUL:
                if (is_graph_input(t->src[1])) {
                    refuse(arch, il, "scales its queries by their absolute position, which a stream without end has no training for");
                }
                commutes = commutes && t->src[1]->ne[0] == 1;
                break;

            default:
                commutes = false;
                break;
        }
        t = t->src[0];
    }

    return nullptr;
}

static lminf_rope read_rope(const ggml_tensor * q, const ggml_tensor * k, llm_arch arch, int il) {
    const ggml_tensor * q_rope = find_rope(q, arch, il);
    const ggml_tensor * k_rope = find_rope(k, arch, il);

    lminf_rope rope;
    rope.known = true;

    if (!q_rope && !k_rope) {
        return rope;
    }
    if (!q_rope || !k_rope || q_rope->src[2] != k_rope->src[2] ||
            memcmp(q_rope->op_params, k_rope->op_params, sizeof(q_rope->op_params)) != 0) {
        refuse(arch, il, "rotates its queries and its keys differently");
    }

    rope.factors = q_rope->src[2];
    rope.n_dims  = q_rope->op_params[ROPE_N_DIMS];
    memcpy(rope.op_params, q_rope->op_params, sizeof(rope.op_params));

    return rope;
}

// rotates t further, by shift positions, keeping its magnitude: YaRN's factor is in t already
static ggml_tensor * rotate(ggml_context * ctx, const lminf_rope & rope, ggml_tensor * t, ggml_tensor * shift, bool inplace = false) {
    ggml_tensor * res = (inplace ? ggml_rope_ext_inplace : ggml_rope_ext)(ctx, t, shift, rope.factors, rope.n_dims, rope.op_params[ROPE_MODE],
            0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);

    memcpy(res->op_params, rope.op_params, sizeof(rope.op_params));

    // ggml multiplies by attn_factor, and with YaRN by this factor as well (rope_yarn in ggml-cpu/ops.cpp)
    const bool  yarn        = get_f32(rope.op_params, ROPE_EXT_FACTOR) != 0.0f;
    const float attn_factor = yarn ? 1.0f/(1.0f + 0.1f*logf(1.0f/get_f32(rope.op_params, ROPE_FREQ_SCALE))) : 1.0f;
    memcpy(res->op_params + ROPE_ATTN_FACTOR, &attn_factor, sizeof(attn_factor));

    return res;
}

ggml_tensor * lminf_build_shift(
        ggml_context * ctx, const llama_context & lctx, ggml_tensor * k, ggml_tensor * shift, ggml_tensor * rot, int il) {
    const auto & hparams = lctx.get_model().hparams;
    const auto & rope    = lminf_get_memory(&lctx)->get_rope(il);

    // a layer without attention has never been built, one without RoPE has nothing to rotate
    if (!rope.known || rope.n_dims == 0) {
        return nullptr;
    }

    const int64_t n_embd_head = hparams.n_embd_head_k(il);

    ggml_tensor * cur = ggml_view_3d(ctx, k, n_embd_head, hparams.n_head_kv(il), k->ne[1]*k->ne[2],
            ggml_row_size(k->type, n_embd_head), k->nb[1], 0);

    // without a copy of the window, which can be larger than all that an evaluation needs
    if (k->type == GGML_TYPE_F32 || k->type == GGML_TYPE_F16) {
        return rotate(ctx, rope, cur, shift, true);
    }

    ggml_tensor * tmp = ggml_cast(ctx, cur, GGML_TYPE_F32);
    if (rot) {
        tmp = llama_mul_mat_hadamard(ctx, tmp, rot);
    }
    tmp = rotate(ctx, rope, tmp, shift);
    if (rot) {
        tmp = llama_mul_mat_hadamard(ctx, tmp, rot);
    }

    return ggml_cpy(ctx, tmp, cur);
}

//
// lminf_graph_input
//

static ggml_tensor * as_input(const char * name, ggml_tensor * t) {
    ggml_set_input(t);
    ggml_set_name(t, name);
    return t;
}

lminf_graph_input::lminf_graph_input(const llm_graph_context & graph, const lminf_memory_context * mctx) :
    mctx(mctx), stores_sinks(mctx->get_stores_sinks()), use_alibi(graph.hparams.use_alibi) {
    ggml_context * ctx = graph.ctx0;

    const int64_t n_tokens    = graph.ubatch.n_tokens;
    const int64_t n_stream    = graph.ubatch.n_seqs_unq;
    const int64_t n_sink_rows = mctx->get_n_sink_rows();

    q_shift   = as_input("lminf_q_shift",   ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens));
    k_shift   = as_input("lminf_k_shift",   ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_tokens));
    sink_rows = as_input("lminf_sink_rows", ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens));

    // f32 even with flash attention on: an f16 ALiBi distance is only exact to 2048
    mask = as_input("lminf_mask", ggml_new_tensor_4d(ctx, GGML_TYPE_F32,
            n_sink_rows + mctx->get_n_kv(), n_tokens/n_stream, 1, n_stream));
}

bool lminf_graph_input::can_reuse(const llm_graph_params & params) {
    mctx = static_cast<const lminf_memory_context *>(params.mctx);

    const int64_t n_sink_rows = mctx->get_n_sink_rows();

    return
        stores_sinks   == mctx->get_stores_sinks() &&
        q_shift->ne[0] == params.ubatch.n_tokens &&
        mask->ne[0]    == n_sink_rows + mctx->get_n_kv() &&
        mask->ne[3]    == params.ubatch.n_seqs_unq;
}

void lminf_graph_input::set_input(const llama_ubatch * ubatch) {
    const auto & mem    = mctx->get_memory();
    const auto & params = mem.get_params();

    const int64_t n_tokens    = ubatch->n_tokens;
    const int64_t n_sink_rows = mctx->get_n_sink_rows();
    const int64_t n_kv        = mask->ne[0] - n_sink_rows;

    // a graph without sinks or without RoPE leaves some inputs unallocated
    const auto host_data = [](ggml_tensor * t) {
        GGML_ASSERT(!t->buffer || ggml_backend_buffer_is_host(t->buffer));
        return t->buffer ? t->data : nullptr;
    };

    int32_t * data_q_shift   = (int32_t *) host_data(q_shift);
    int32_t * data_k_shift   = (int32_t *) host_data(k_shift);
    int64_t * data_sink_rows = (int64_t *) host_data(sink_rows);
    float   * data_mask      = (float   *) host_data(mask);

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
        const int64_t in_cache = std::min<int64_t>(index, (int64_t) stream.n_global + params.n_local - 1);

        int64_t q_pos = 0; // where the second query goes
        int64_t k_pos = 0; // where a sink's key goes
        switch (params.sink_mode) {
            case LMINF_SINK_CEILING: q_pos = params.max_distance; k_pos = 0;     break;
            case LMINF_SINK_ORDER:   q_pos = in_cache;            k_pos = index; break;
            case LMINF_SINK_TRUE:    q_pos = index;               k_pos = index; break;
        }

        if (data_q_shift) {
            data_q_shift[i] = (int32_t) std::min<int64_t>(q_pos - pos, std::numeric_limits<int32_t>::max());
        }
        if (data_k_shift) {
            data_k_shift[i] = is_sink ? (int32_t) (k_pos - pos) : 0;
        }
        if (data_sink_rows) {
            data_sink_rows[i] = seq_id*mem.get_n_store_rows() + (is_sink ? index : mem.get_n_sink_rows());
        }
        if (!data_mask) {
            continue;
        }

        float * row = data_mask + i*(n_sink_rows + n_kv);

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

lminf_graph_input * lminf_build_input(const llm_graph_context & graph) {
    const auto * mctx = static_cast<const lminf_memory_context *>(graph.mctx);

    return static_cast<lminf_graph_input *>(graph.res->add_input(std::make_unique<lminf_graph_input>(graph, mctx)));
}

//
// lminf_attn
//

// all of it contiguous, [n_embd_head*n_head, n_tokens]
static ggml_tensor * merge_heads(ggml_context * ctx, ggml_tensor * t) {
    const int64_t n_embd   = t->ne[0]*t->ne[1];
    const int64_t n_tokens = t->ne[2];

    return ggml_is_contiguous(t) ? ggml_reshape_2d(ctx, t, n_embd, n_tokens) : ggml_cont_2d(ctx, t, n_embd, n_tokens);
}

lminf_attn::lminf_attn(const llm_graph_context & graph, lminf_graph_input * inp) : graph(graph), inp(inp) {}

void lminf_attn::begin(ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * kq_b, int il) {
    if (kq_b) {
        refuse(graph.arch, il, "adds a bias of its own to the attention scores");
    }

    this->il = il;

    auto & mem  = inp->mctx->get_memory();
    auto & rope = mem.get_rope(il);

    rope = read_rope(q_cur, k_cur, graph.arch, il);

    if (inp->mctx->get_n_sink_rows() == 0) {
        return;
    }

    q = rope.n_dims > 0 ? rotate(graph.ctx0, rope, q_cur, inp->q_shift) : q_cur;
    graph.cb(q, "lminf_q_sink", il);

    if (inp->mctx->get_stores_sinks()) {
        k = rope.n_dims > 0 ? rotate(graph.ctx0, rope, k_cur, inp->k_shift) : k_cur;
        graph.cb(k, "lminf_k_sink", il);
    }
}

void lminf_attn::store(ggml_tensor * v_cur) {
    if (!k) {
        return;
    }

    ggml_context * ctx = graph.ctx0;

    const auto & mem = inp->mctx->get_memory();

    const auto store_rows = [&](ggml_tensor * dst, ggml_tensor * cur) {
        dst = ggml_reshape_2d(ctx, dst, dst->ne[0], dst->ne[1]*dst->ne[2]);
        ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, dst, merge_heads(ctx, cur), inp->sink_rows));
    };

    store_rows(mem.get_sink_k(il), k);
    store_rows(mem.get_sink_v(il), v_cur);
}

ggml_tensor * lminf_attn::readable_v(ggml_tensor * v) const {
    return ggml_is_quantized(v->type) && !is_fused() ? ggml_cast(graph.ctx0, v, GGML_TYPE_F32) : v;
}

// the store's rows of the sequences at hand, [n_embd_head, n_sink_rows, n_head_kv, n_stream]
static ggml_tensor * view_sinks(ggml_context * ctx, ggml_tensor * t, const lminf_memory_context * mctx, int64_t n_embd_head, int64_t n_head_kv) {
    ggml_tensor * res = ggml_view_4d(ctx, t, n_embd_head, n_head_kv, mctx->get_n_sink_rows(), mctx->get_ns(),
            ggml_row_size(t->type, n_embd_head), t->nb[1], t->nb[2], t->nb[2]*mctx->get_s0());

    return ggml_permute(ctx, res, 0, 2, 1, 3);
}

ggml_tensor * lminf_attn::view_q_sink(int64_t n_stream) const {
    const int64_t n_tokens = q->ne[2]/n_stream;

    ggml_tensor * res = ggml_view_4d(graph.ctx0, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tokens, 0);

    return ggml_permute(graph.ctx0, res, 0, 2, 1, 3);
}

bool lminf_attn::is_fused() const {
    return inp->mctx->get_memory().is_fused();
}

ggml_tensor * lminf_attn::build_fused(ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * head_sinks, float kq_scale) const {
    ggml_context * ctx = graph.ctx0;

    const auto & hparams = graph.hparams;
    const auto & mem     = inp->mctx->get_memory();

    ggml_tensor * q_sink = nullptr;
    ggml_tensor * k_sink = nullptr;
    ggml_tensor * v_sink = nullptr;
    if (q) {
        q_sink = view_q_sink(q_cur->ne[3]);
        k_sink = view_sinks(ctx, mem.get_sink_k(il), inp->mctx, hparams.n_embd_head_k(il), hparams.n_head_kv(il));
        v_sink = view_sinks(ctx, mem.get_sink_v(il), inp->mctx, hparams.n_embd_head_v(il), hparams.n_head_kv(il));
    }

    // Grok caps its scores always, and scales them for it
    const bool  grok = graph.arch == LLM_ARCH_GROK;
    const float cap  = grok || hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;

    ggml_tensor * cur = ggml_lminf_attn(ctx, q_cur, k_cur, v_cur, inp->mask, head_sinks, q_sink, k_sink, v_sink,
            grok ? kq_scale*hparams.f_attn_out_scale : kq_scale, hparams.f_max_alibi_bias, cap);

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);

    if (!graph.cparams.offload_kqv) {
        ggml_backend_sched_set_tensor_backend(graph.sched, cur->src[0], graph.backend_cpu); // where its K and V are
    }

    return cur;
}

ggml_tensor * lminf_attn::build_kq(ggml_tensor * kq) const {
    if (!q) {
        return kq;
    }

    ggml_context * ctx = graph.ctx0;

    ggml_tensor * k_sink = view_sinks(ctx, inp->mctx->get_memory().get_sink_k(il), inp->mctx,
            graph.hparams.n_embd_head_k(il), graph.hparams.n_head_kv(il));

    ggml_tensor * kq_sink = ggml_mul_mat(ctx, k_sink, view_q_sink(kq->ne[3]));
    ggml_prec_set_acc(kq_sink, GGML_PREC_F32);
    graph.cb(kq_sink, "lminf_kq_sink", il);

    return ggml_concat(ctx, kq_sink, kq, 0);
}

ggml_tensor * lminf_attn::build_kqv(ggml_tensor * v, ggml_tensor * kq) const {
    ggml_context * ctx = graph.ctx0;

    if (!q) {
        return ggml_mul_mat(ctx, v, kq);
    }

    const int64_t n_sink_rows = inp->mctx->get_n_sink_rows();

    const auto columns = [&](int64_t i0, int64_t n) {
        return ggml_view_4d(ctx, kq, n, kq->ne[1], kq->ne[2], kq->ne[3], kq->nb[1], kq->nb[2], kq->nb[3], i0*kq->nb[0]);
    };

    ggml_tensor * v_sink = view_sinks(ctx, inp->mctx->get_memory().get_sink_v(il), inp->mctx,
            graph.hparams.n_embd_head_v(il), graph.hparams.n_head_kv(il));
    v_sink = ggml_cont(ctx, ggml_transpose(ctx, v_sink));

    ggml_tensor * kqv      = ggml_mul_mat(ctx, v, columns(n_sink_rows, kq->ne[0] - n_sink_rows));
    ggml_tensor * kqv_sink = ggml_mul_mat(ctx, v_sink, ggml_cont(ctx, columns(0, n_sink_rows)));

    return ggml_add(ctx, kqv, kqv_sink);
}
