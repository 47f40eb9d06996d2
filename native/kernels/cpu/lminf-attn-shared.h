// what the CPU kernels share: where K, V and the mask lie, and the parts of rows that are merged at the end
//
// A "row" is one query of one head. Kernels keep for each row the maximum m of its scores so far, the sum l of exp(s - m)
// and the sum of exp(s - m)*v; where several threads share a row, each has such a part of it.

#pragma once

#include "lminf-attn.h"
#include "lminf-rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace lminf_simd;

// below every real score, and unlike -inf it can be subtracted from itself
static constexpr float NO_SCORE = -1e30f;

static int pad16(int n) { return (n + 15)/16*16; }

//
// K and V: the window, or the sinks in front of it
//

struct kv_part {
    lminf_attn_operand q, k, v;

    int n;    // cells
    int mask; // the column of the first one
};

// sinks, then window
static int get_parts(const lminf_attn_args & args, kv_part * parts) {
    int n_parts = 0;
    if (args.n_sink > 0) {
        parts[n_parts++] = { args.q_sink, args.k_sink, args.v_sink, args.n_sink, 0 };
    }
    if (args.n_kv > 0) {
        parts[n_parts++] = { args.q, args.k, args.v, args.n_kv, args.n_sink };
    }
    return n_parts;
}

static const char * get_row(const lminf_attn_operand & t, int64_t i1, int64_t i2, int64_t i3) {
    return t.data + i1*t.nb1 + i2*t.nb2 + i3*t.nb3;
}

static const float * get_mask(const lminf_attn_args & args, int i_q, int i_stream) {
    return (const float *) get_row(args.mask, i_q, 0, i_stream);
}

enum mask_state { MASK_CLOSED, MASK_OPEN, MASK_MIXED };

// of n cells from column i0 on, for the queries [q0, q1)
static mask_state get_mask_state(const lminf_attn_args & args, int i0, int n, int q0, int q1, int i_stream) {
    int n_open = 0; // exactly 0: nothing to add
    int n_shut = 0;
    for (int t = q0; t < q1; ++t) {
        const float * mask = get_mask(args, t, i_stream) + i0;
        for (int c = 0; c < n; ++c) {
            n_open += mask[c] == 0.0f;
            n_shut += mask[c] == -INFINITY;
        }
    }
    const int n_all = n*(q1 - q0);
    return n_shut == n_all ? MASK_CLOSED : n_open == n_all ? MASK_OPEN : MASK_MIXED;
}

typedef void (*load_row_t)(const char * row, int n_embd, float * res);

static load_row_t get_load_row(int type) {
    switch (type) {
        case GGML_TYPE_F32:  return load_row<GGML_TYPE_F32>;
        case GGML_TYPE_F16:  return load_row<GGML_TYPE_F16>;
        case GGML_TYPE_BF16: return load_row<GGML_TYPE_BF16>;
        case GGML_TYPE_Q8_0: return load_row<GGML_TYPE_Q8_0>;
        case GGML_TYPE_Q4_0: return load_row<GGML_TYPE_Q4_0>;
        default: GGML_ABORT("no K or V of this type");
    }
}

// n rows as f32, res [n][pad16(n_embd)]
static void load_rows(const char * rows, int64_t nb1, int type, int n, int n_embd, float * res) {
    const load_row_t load = get_load_row(type);
    for (int i = 0; i < n; ++i) {
        load(rows + i*nb1, n_embd, res + (size_t) i*pad16(n_embd));
    }
}

static void load_q(const lminf_attn_args & args, const char * row, float * res) {
    for (int e = 0; e < args.n_embd_head_k; ++e) {
        res[e] = args.scale*((const float *) row)[e];
    }
}

static void soft_cap(float cap, float * s, int n) {
    for (int i = 0; i < n; ++i) {
        s[i] = cap*tanhf(s[i]);
    }
}

//
// parts of rows, and their sum
//

// in wdata: [n_split][n_stream*n_q*n_head][2 + n_embd_head_v], being m, l and the sum of values
static size_t get_part_size(const lminf_attn_args & args) {
    return 2 + args.n_embd_head_v;
}

static int64_t get_n_rows(const lminf_attn_args & args) {
    return (int64_t) args.n_stream*args.n_q*args.n_head;
}

static int64_t get_row_index(const lminf_attn_args & args, int i_stream, int i_q, int i_head) {
    return ((int64_t) i_stream*args.n_q + i_q)*args.n_head + i_head;
}

static void merge_parts(const lminf_attn_args & args, const float * parts, int n_split, int64_t row) {
    const int64_t stride = get_n_rows(args)*get_part_size(args);

    const float * part = parts + row*get_part_size(args);
    const float   sink = args.head_sinks ? args.head_sinks[row % args.n_head] : NO_SCORE;

    float m = sink;
    for (int i = 0; i < n_split; ++i) {
        m = std::max(m, part[i*stride]);
    }

    float   l   = args.head_sinks ? expf(sink - m) : 0.0f;
    float * dst = args.dst + row*args.n_embd_head_v;
    std::fill_n(dst, args.n_embd_head_v, 0.0f);

    for (int i = 0; i < n_split; ++i) {
        const float * p = part + i*stride;
        const float   w = expf(p[0] - m);
        l += w*p[1];
        for (int e = 0; e < args.n_embd_head_v; ++e) {
            dst[e] += w*p[2 + e];
        }
    }

    const float inv = l == 0.0f ? 0.0f : 1.0f/l; // nothing seen; NaN stays NaN
    for (int e = 0; e < args.n_embd_head_v; ++e) {
        dst[e] *= inv;
    }
}
