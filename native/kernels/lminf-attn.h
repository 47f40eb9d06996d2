// attention over [sinks | window] with two queries and one softmax: the operation GGML_OP_LMINF_ATTN
//
//   s[h, t, j]          = K_sink[j] · q_sink[h, t]     j <  n_sink
//   s[h, t, n_sink + c] = K[c]      · q[h, t]          c <  n_kv
//
//   s   = logit_softcap > 0 ? logit_softcap*tanh(s*scale/logit_softcap) : s*scale
//   s  += slope(h)*mask[t]         slope: 1, or with max_bias > 0 ALiBi's, as in ggml_soft_max_ext
//   p   = softmax(s)               with head_sinks exp(head_sinks[h]) joins the sum, as in ggml_soft_max_add_sinks
//   res = V_sink · p_sink + V · p
//
// Query head h reads the K and V of head h/(n_head/n_head_kv). Where the mask is -inf, K and V do not count, but what
// they hold must be finite; a query that may see nothing gets zeros. Sums are f32 or better on every backend.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// where a query finds its operands
enum lminf_attn_src {
    LMINF_ATTN_Q          = 0, // F32 [n_embd_head_k, n_q, n_head, n_stream]
    LMINF_ATTN_K          = 1, //     [n_embd_head_k, n_kv, n_head_kv, n_stream]
    LMINF_ATTN_V          = 2, //     [n_embd_head_v, n_kv, n_head_kv, n_stream]
    LMINF_ATTN_MASK       = 3, // F32 [n_sink + n_kv, n_q, 1, n_stream], rows contiguous
    LMINF_ATTN_HEAD_SINKS = 4, // F32 [n_head] or NULL
    LMINF_ATTN_Q_SINK     = 5, // F32, as q; NULL without sinks, as are the next two
    LMINF_ATTN_K_SINK     = 6, //     [n_embd_head_k, n_sink, n_head_kv, n_stream]
    LMINF_ATTN_V_SINK     = 7, //     [n_embd_head_v, n_sink, n_head_kv, n_stream]
};

// K, V: F32, F16, BF16, Q8_0 or Q4_0, each of the four its own; a row (one cell of one head) must be contiguous.
// Returns F32 [n_embd_head_v, n_head, n_q, n_stream], contiguous
GGML_API struct ggml_tensor * ggml_lminf_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * head_sinks,
        struct ggml_tensor  * q_sink,
        struct ggml_tensor  * k_sink,
        struct ggml_tensor  * v_sink,
        float                 scale,
        float                 max_bias,
        float                 logit_softcap);

// one operand's data and byte strides; rows are strided by nb1 (query or cell), nb2 (head), nb3 (stream)
struct lminf_attn_operand {
    const char * data;
    int64_t      nb1;
    int64_t      nb2;
    int64_t      nb3;
    int32_t      type; // enum ggml_type
};

// what every kernel needs to know of an operation
struct lminf_attn_args {
    int32_t n_embd_head_k;
    int32_t n_embd_head_v;
    int32_t n_q;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_stream;
    int32_t n_sink;
    int32_t n_kv;

    float scale;         // with soft-cap: divided by logit_softcap already
    float logit_softcap; // 0: none
    float max_bias;      // 0: no ALiBi
    float m0;            // ALiBi's slopes, see lminf_attn_slope
    float m1;
    int32_t n_head_log2;

    struct lminf_attn_operand q, k, v, mask, q_sink, k_sink, v_sink;

    const float * head_sinks; // [n_head] or NULL
    float       * dst;        // [n_embd_head_v, n_head, n_q, n_stream]
};

GGML_API struct lminf_attn_args lminf_attn_get_args(const struct ggml_tensor * op);

// what multiplies the mask for head h
GGML_API float lminf_attn_slope(const struct lminf_attn_args * args, int32_t h);

// a type that K or V may have
GGML_API bool lminf_attn_is_kv_type(enum ggml_type type);

// shapes and types every kernel can take; a backend may take less
GGML_API bool lminf_attn_is_valid(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
