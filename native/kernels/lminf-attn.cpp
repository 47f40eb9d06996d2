#include "lminf-attn.h"

#include "ggml-impl.h"

#include <cmath>
#include <cstring>

bool lminf_attn_is_kv_type(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

// rows of n_embd_head contiguous elements
static bool is_kv(const ggml_tensor * t, int64_t n_embd_head, int64_t n_rows, int64_t n_head_kv, int64_t n_stream) {
    return lminf_attn_is_kv_type(t->type) && t->nb[0] == ggml_type_size(t->type) &&
        t->ne[0] == n_embd_head && t->ne[1] == n_rows && t->ne[2] == n_head_kv && t->ne[3] == n_stream;
}

static bool is_q(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float);
}

bool lminf_attn_is_valid(const ggml_tensor * op) {
    const ggml_tensor * q          = op->src[LMINF_ATTN_Q];
    const ggml_tensor * k          = op->src[LMINF_ATTN_K];
    const ggml_tensor * v          = op->src[LMINF_ATTN_V];
    const ggml_tensor * mask       = op->src[LMINF_ATTN_MASK];
    const ggml_tensor * head_sinks = op->src[LMINF_ATTN_HEAD_SINKS];
    const ggml_tensor * q_sink     = op->src[LMINF_ATTN_Q_SINK];
    const ggml_tensor * k_sink     = op->src[LMINF_ATTN_K_SINK];
    const ggml_tensor * v_sink     = op->src[LMINF_ATTN_V_SINK];

    if (!q || !k || !v || !mask || !q_sink != !k_sink || !q_sink != !v_sink) {
        return false;
    }

    const int64_t n_sink    = k_sink ? k_sink->ne[1] : 0;
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_stream  = q->ne[3];

    return is_q(q) && n_head_kv > 0 && q->ne[2] % n_head_kv == 0 &&
        is_kv(k, q->ne[0], k->ne[1], n_head_kv, n_stream) &&
        is_kv(v, v->ne[0], k->ne[1], n_head_kv, n_stream) &&
        mask->type == GGML_TYPE_F32 && mask->nb[0] == sizeof(float) &&
        mask->ne[0] == n_sink + k->ne[1] && mask->ne[1] == q->ne[1] && mask->ne[2] == 1 && mask->ne[3] == n_stream &&
        (!head_sinks || (head_sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(head_sinks) && ggml_nelements(head_sinks) == q->ne[2])) &&
        (!q_sink || (
            is_q(q_sink) && ggml_are_same_shape(q_sink, q) &&
            is_kv(k_sink, q->ne[0], n_sink, n_head_kv, n_stream) &&
            is_kv(v_sink, v->ne[0], n_sink, n_head_kv, n_stream)));
}

ggml_tensor * ggml_lminf_attn(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * head_sinks,
        ggml_tensor  * q_sink,
        ggml_tensor  * k_sink,
        ggml_tensor  * v_sink,
        float          scale,
        float          max_bias,
        float          logit_softcap) {
    ggml_tensor * res = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3]);

    const float params[] = { scale, max_bias, logit_softcap };
    memcpy(res->op_params, params, sizeof(params));

    res->op = GGML_OP_LMINF_ATTN;

    res->src[LMINF_ATTN_Q]          = q;
    res->src[LMINF_ATTN_K]          = k;
    res->src[LMINF_ATTN_V]          = v;
    res->src[LMINF_ATTN_MASK]       = mask;
    res->src[LMINF_ATTN_HEAD_SINKS] = head_sinks;
    res->src[LMINF_ATTN_Q_SINK]     = q_sink;
    res->src[LMINF_ATTN_K_SINK]     = k_sink;
    res->src[LMINF_ATTN_V_SINK]     = v_sink;

    GGML_ASSERT(lminf_attn_is_valid(res));

    return res;
}

static lminf_attn_operand get_operand(const ggml_tensor * t) {
    lminf_attn_operand res = {};
    if (t) {
        res.data = (const char *) t->data;
        res.nb1  = t->nb[1];
        res.nb2  = t->nb[2];
        res.nb3  = t->nb[3];
        res.type = t->type;
    }
    return res;
}

lminf_attn_args lminf_attn_get_args(const ggml_tensor * op) {
    const ggml_tensor * q          = op->src[LMINF_ATTN_Q];
    const ggml_tensor * k          = op->src[LMINF_ATTN_K];
    const ggml_tensor * v          = op->src[LMINF_ATTN_V];
    const ggml_tensor * k_sink     = op->src[LMINF_ATTN_K_SINK];
    const ggml_tensor * head_sinks = op->src[LMINF_ATTN_HEAD_SINKS];

    lminf_attn_args args = {};

    args.n_embd_head_k = q->ne[0];
    args.n_embd_head_v = v->ne[0];
    args.n_q           = q->ne[1];
    args.n_head        = q->ne[2];
    args.n_head_kv     = k->ne[2];
    args.n_stream      = q->ne[3];
    args.n_sink        = k_sink ? k_sink->ne[1] : 0;
    args.n_kv          = k->ne[1];

    float params[3];
    memcpy(params, op->op_params, sizeof(params));

    args.max_bias      = params[1];
    args.logit_softcap = params[2];
    args.scale         = args.logit_softcap > 0.0f ? params[0]/args.logit_softcap : params[0];

    args.n_head_log2 = 1 << (int) floor(log2(args.n_head));
    args.m0          = powf(2.0f, -(args.max_bias       )/args.n_head_log2);
    args.m1          = powf(2.0f, -(args.max_bias / 2.0f)/args.n_head_log2);

    args.q      = get_operand(q);
    args.k      = get_operand(k);
    args.v      = get_operand(v);
    args.mask   = get_operand(op->src[LMINF_ATTN_MASK]);
    args.q_sink = get_operand(op->src[LMINF_ATTN_Q_SINK]);
    args.k_sink = get_operand(k_sink);
    args.v_sink = get_operand(op->src[LMINF_ATTN_V_SINK]);

    args.head_sinks = head_sinks ? (const float *) head_sinks->data : nullptr;
    args.dst        = (float *) op->data;

    return args;
}

float lminf_attn_slope(const lminf_attn_args * args, int32_t h) {
    if (args->max_bias <= 0.0f) {
        return 1.0f;
    }
    return h < args->n_head_log2 ? powf(args->m0, h + 1) : powf(args->m1, 2*(h - args->n_head_log2) + 1);
}
