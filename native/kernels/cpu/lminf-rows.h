// rows of K and V in their own number format, 16 elements at a time as f32

#pragma once

#include "lminf-simd.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cstddef>

namespace lminf_simd {

constexpr int N16 = 16/LANES; // vectors in 16 elements

static inline float f16_to_f32(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    return ggml_fp16_to_fp32(x);
#endif
}

// elements [i, i + 16) of a row, i a multiple of 16
template <ggml_type T> static inline void load16(const char * row, int i, vf * x);

template <> inline void load16<GGML_TYPE_F32>(const char * row, int i, vf * x) {
    for (int j = 0; j < N16; ++j) {
        x[j] = vf_load((const float *) row + i + j*LANES);
    }
}

template <> inline void load16<GGML_TYPE_F16>(const char * row, int i, vf * x) {
    for (int j = 0; j < N16; ++j) {
        x[j] = vf_load_f16((const uint16_t *) row + i + j*LANES);
    }
}

template <> inline void load16<GGML_TYPE_BF16>(const char * row, int i, vf * x) {
    for (int j = 0; j < N16; ++j) {
        x[j] = vf_load_bf16((const uint16_t *) row + i + j*LANES);
    }
}

template <> inline void load16<GGML_TYPE_Q8_0>(const char * row, int i, vf * x) {
    const block_q8_0 & block = ((const block_q8_0 *) row)[i/QK8_0];

    const vf d = vf_set(f16_to_f32(block.d));
    for (int j = 0; j < N16; ++j) {
        x[j] = vf_mul(d, vf_load_i8(block.qs + i%QK8_0 + j*LANES));
    }
}

// the first half of a block lies in the low nibbles of its bytes, the second in the high ones
template <> inline void load16<GGML_TYPE_Q4_0>(const char * row, int i, vf * x) {
    const block_q4_0 & block = ((const block_q4_0 *) row)[i/QK4_0];

    const vf d = vf_set(f16_to_f32(block.d));

    vf_load16_i4(block.qs, i%QK4_0 == 0 ? 0 : 4, x);
    for (int j = 0; j < N16; ++j) {
        x[j] = vf_mul(d, x[j]);
    }
}

// types in blocks of 32 integers with a common factor in front of them, in f16
constexpr bool has_integers(int type) { return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0; }

static_assert(offsetof(block_q8_0, d) == 0 && offsetof(block_q4_0, d) == 0 && QK8_0 == 32 && QK4_0 == 32, "blocks of q8_0 and q4_0");

// the integers of a block of N_PARTS cells each: its first 16, and the others
template <ggml_type T> static inline void load32_i8(const char * const * block, vi8 * x) {
    const char * p[N_PARTS];
    for (int i = 0; i < N_PARTS; ++i) {
        p[i] = block[i] + (T == GGML_TYPE_Q8_0 ? offsetof(block_q8_0, qs) : offsetof(block_q4_0, qs));
    }
    x[0] = vi8_load(p);
    if constexpr (T == GGML_TYPE_Q8_0) {
        for (int i = 0; i < N_PARTS; ++i) {
            p[i] += 16;
        }
        x[1] = vi8_load(p);
    } else {
        x[1] = vi8_i4(x[0], 4);
        x[0] = vi8_i4(x[0], 0);
    }
}

// 2*LANES integers of a block, from number i on
template <ggml_type T> static inline vi16 load_i16(const char * block, int i) {
    if constexpr (T == GGML_TYPE_Q8_0) {
        return vi16_load_i8(block + offsetof(block_q8_0, qs) + i);
    } else {
        return vi16_load_i4(block + offsetof(block_q4_0, qs) + i%16, i < 16 ? 0 : 4);
    }
}

// bytes of 16 elements
template <ggml_type T> constexpr int get_size16() {
    return T == GGML_TYPE_F32 ? 64 : T == GGML_TYPE_Q8_0 ? sizeof(block_q8_0)/2 : T == GGML_TYPE_Q4_0 ? sizeof(block_q4_0)/2 : 32;
}

// one row as f32, up to a multiple of 16 filled with zeros
template <ggml_type T> static void load_row(const char * row, int n, float * res) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        vf x[N16];
        load16<T>(row, i, x);
        for (int j = 0; j < N16; ++j) {
            vf_store(res + i + j*LANES, x[j]);
        }
    }
    if (i < n) { // never with blocks of 32
        float rest[16] = {0};
        for (int j = 0; i + j < n; ++j) {
            rest[j] =
                T == GGML_TYPE_F32 ? ((const float *) row)[i + j] :
                T == GGML_TYPE_F16 ? f16_to_f32(((const uint16_t *) row)[i + j]) :
                                     ggml_bf16_to_fp32({ ((const uint16_t *) row)[i + j] });
        }
        memcpy(res + i, rest, sizeof(rest));
    }
}

} // namespace lminf_simd
