// stands in for cuda_runtime.h, cuda_fp16.h and lminf-attn-ptx.cuh, as far as native/kernels/cuda uses them: a C++ compiler
// then builds the kernels' source, and lanes.h runs it
//
//   lanes::launch(grid, block, n_shared, rng, [&] { kernel(params); })
//
// Shuffles, ldmatrix and mma are exchanges of a whole warp, whatever the mask says.

#pragma once

#include "lanes.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (lanes::thread_index())
#define blockIdx  (lanes::block_index())
#define blockDim  (lanes::block_size())
#define gridDim   (lanes::grid_size())

#define LMINF_CUDA_SHARED(name) char * name = lanes::shared()

using std::max;
using std::min;

// --- vectors: aligned as on the device, which -fsanitize=alignment then checks --------------------------------------

struct alignas(16) uint4  { uint32_t x, y, z, w; };
struct alignas(16) float4 { float    x, y, z, w; };
struct alignas(8)  float2 { float    x, y; };

static inline uint4  make_uint4 (uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }
static inline float4 make_float4(float    x, float    y, float    z, float    w) { return { x, y, z, w }; }
static inline float2 make_float2(float    x, float    y)                         { return { x, y }; }

static inline float __uint_as_float(uint32_t x) {
    float res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

template <typename T> T __ldg(const T * p) { return *p; }

// --- half -----------------------------------------------------------------------------------------------------------

struct __half {
    ggml_fp16_t bits;
};

static inline __half         __float2half_rn(float x)            { return { ggml_fp32_to_fp16(x) }; }
static inline float          __half2float(__half x)              { return ggml_fp16_to_fp32(x.bits); }
static inline __half         __ushort_as_half(unsigned short x)  { return { x }; }
static inline unsigned short __half_as_ushort(__half x)          { return x.bits; }

// --- barriers and exchanges -----------------------------------------------------------------------------------------

static inline void __syncthreads() { lanes::block_barrier(); }
static inline void __syncwarp()    { lanes::warp_barrier(); }

static inline int __syncthreads_or(int x) {
    static const char key = 0;
    const lanes::index3 size = lanes::block_size();

    char * flags = lanes::shared_static(&key, size.x);
    flags[lanes::thread_index().x] = x != 0;
    lanes::block_barrier();
    bool res = false;
    for (uint32_t i = 0; i < size.x; ++i) {
        res = res || flags[i];
    }
    lanes::block_barrier();
    return res;
}

template <typename T> T __shfl_sync(uint32_t, T x, int from)     { return lanes::shuffle(x, from); }
template <typename T> T __shfl_xor_sync(uint32_t, T x, int mask) { return lanes::shuffle(x, lanes::lane() ^ mask); }

static inline uint32_t __ballot_sync(uint32_t mask, bool x) {
    uint32_t res = (uint32_t) x << lanes::lane();
    for (int i = 1; i < lanes::WARP; i *= 2) {
        res |= __shfl_xor_sync(mask, res, i);
    }
    return res;
}

static inline int __ffs(uint32_t x) { return x == 0 ? 0 : 1 + __builtin_ctz(x); }

// --- lminf-attn-ptx.cuh ---------------------------------------------------------------------------------------------

static inline uint32_t lminf_pack_2_halves(float lo, float hi) {
    return ggml_fp32_to_fp16(lo) | (uint32_t) ggml_fp32_to_fp16(hi) << 16;
}

static inline float emulated_half(uint32_t pair, int i) { return ggml_fp16_to_fp32((ggml_fp16_t) (pair >> 16*i)); }

static inline void lminf_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static float all_a[32][16][16], all_b[32][16][8]; // [warp]

    const int g = lanes::lane()/4;
    const int t = lanes::lane()%4;

    auto & my_a = all_a[lanes::warp()];
    auto & my_b = all_b[lanes::warp()];
    for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) {
            my_a[g + r%2*8][2*t + r/2*8 + i] = emulated_half(a[r], i);
        }
        my_b[2*t + i][g]     = emulated_half(b0, i);
        my_b[2*t + i + 8][g] = emulated_half(b1, i);
    }
    lanes::warp_barrier();
    for (int i = 0; i < 4; ++i) {
        for (int e = 0; e < 16; ++e) {
            d[i] += my_a[g + i/2*8][e]*my_b[e][2*t + i%2];
        }
    }
    lanes::warp_barrier();
}

static inline const uint16_t * emulated_matrix_row(const __half * row, int from) {
    const ptrdiff_t offset = (const char *) row - lanes::shared();
    if (offset % 16 != 0) {
        fprintf(stderr, "ldmatrix: %td bytes into shared memory: not aligned\n", offset);
        abort();
    }
    return (const uint16_t *) lanes::shuffle(row, from);
}

static inline void lminf_load_matrices(uint32_t (&res)[4], const __half * row) {
    for (int i = 0; i < 4; ++i) {
        memcpy(&res[i], emulated_matrix_row(row, 8*i + lanes::lane()/4) + 2*(lanes::lane()%4), 4);
    }
}

static inline void lminf_load_matrices_transposed(uint32_t (&res)[4], const __half * row) {
    for (int i = 0; i < 4; ++i) {
        const uint16_t * row0 = emulated_matrix_row(row, 8*i + 2*(lanes::lane()%4));
        const uint16_t * row1 = emulated_matrix_row(row, 8*i + 2*(lanes::lane()%4) + 1);
        res[i] = row0[lanes::lane()/4] | (uint32_t) row1[lanes::lane()/4] << 16;
    }
}

// copies are made as late as may be, when they are waited for
struct emulated_copy {
    void       * to;
    const char * from; // NULL: zeros
};

static inline std::vector<emulated_copy> & emulated_copies() {
    static std::vector<emulated_copy> copies[1024]; // by thread
    return copies[lanes::thread_index().x];
}

static inline void lminf_copy_16(void * to, const char * from, bool exists) {
    if ((uintptr_t) to % 16 != 0 || (exists && (uintptr_t) from % 16 != 0)) {
        fprintf(stderr, "cp.async: not aligned\n");
        abort();
    }
    emulated_copies().push_back({ to, exists ? from : nullptr });
}

static inline void lminf_wait_for_copies() {
    for (const auto & copy : emulated_copies()) {
        if (copy.from) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    emulated_copies().clear();
}
