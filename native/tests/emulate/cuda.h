// stands in for cuda_runtime.h, cuda_fp16.h and mma.h, as far as native/kernels/cuda uses them: a C++ compiler then builds
// the kernels' source, and lanes.h runs it
//
//   lanes::launch(grid, block, n_shared, rng, [&] { kernel(params); })
//
// Shuffles and wmma are exchanges of a whole warp, whatever the mask says. wmma operations do not order memory accesses:
// a __syncwarp that is missing before or after them shows.

#pragma once

#include "lanes.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

static inline uint4  make_uint4 (uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }
static inline float4 make_float4(float    x, float    y, float    z, float    w) { return { x, y, z, w }; }

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

// --- tensor cores: 16x16 fragments, 8 elements per lane --------------------------------------------------------------

namespace nvcuda {
namespace wmma {

struct matrix_a    {};
struct matrix_b    {};
struct accumulator {};
struct row_major   {};
struct col_major   {};

enum layout_t { mem_row_major, mem_col_major };

// the hardware holds matrix_a and matrix_b twice, 16 elements per lane; nobody may look at them
template <typename USE, int M, int N, int K, typename T, typename LAYOUT = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "");
    static constexpr int num_elements = 8;
    T x[num_elements];
};

// where element i of a lane lies in the matrix: no layout of real hardware, so that nothing can lean on one
static inline int emulated_index(int i) {
    return (lanes::lane()*8 + i)*37 % 256;
}

// pointers must be aligned to 32 bytes, rows to 16
template <typename T> void check(const T * p, unsigned ld) {
    const ptrdiff_t offset = (const char *) p - lanes::shared();
    if (offset % 32 != 0 || ld*sizeof(T) % 16 != 0) {
        fprintf(stderr, "wmma: %td bytes into shared memory, rows of %zu bytes: not aligned\n", offset, ld*sizeof(T));
        abort();
    }
}

template <typename USE, typename T> void fill_fragment(fragment<USE, 16, 16, 16, T> & f, T value) {
    std::fill_n(f.x, 8, value);
}

template <typename T> void load(T (&x)[8], const T * p, unsigned ld, bool is_row_major) {
    check(p, ld);
    for (int i = 0; i < 8; ++i) {
        const int row = emulated_index(i)/16;
        const int col = emulated_index(i)%16;
        x[i] = is_row_major ? p[row*ld + col] : p[col*ld + row];
    }
}

template <typename USE, typename T> void load_matrix_sync(fragment<USE, 16, 16, 16, T, row_major> & f, const T * p, unsigned ld) { load(f.x, p, ld, true); }
template <typename USE, typename T> void load_matrix_sync(fragment<USE, 16, 16, 16, T, col_major> & f, const T * p, unsigned ld) { load(f.x, p, ld, false); }

template <typename T> void load_matrix_sync(fragment<accumulator, 16, 16, 16, T> & f, const T * p, unsigned ld, layout_t layout) {
    load(f.x, p, ld, layout == mem_row_major);
}

template <typename T> void store_matrix_sync(T * p, const fragment<accumulator, 16, 16, 16, T> & f, unsigned ld, layout_t layout) {
    check(p, ld);
    for (int i = 0; i < 8; ++i) {
        const int row = emulated_index(i)/16;
        const int col = emulated_index(i)%16;
        p[layout == mem_row_major ? row*ld + col : col*ld + row] = f.x[i];
    }
}

template <typename LA, typename LB>
void mma_sync(
        fragment<accumulator, 16, 16, 16, float> & d, const fragment<matrix_a, 16, 16, 16, __half, LA> & a,
        const fragment<matrix_b, 16, 16, 16, __half, LB> & b, const fragment<accumulator, 16, 16, 16, float> & c) {
    static float all_a[32][256], all_b[32][256]; // [warp][element]

    float * my_a = all_a[lanes::warp()];
    float * my_b = all_b[lanes::warp()];
    for (int i = 0; i < 8; ++i) {
        my_a[emulated_index(i)] = __half2float(a.x[i]);
        my_b[emulated_index(i)] = __half2float(b.x[i]);
    }
    lanes::warp_barrier();
    for (int i = 0; i < 8; ++i) {
        const int row = emulated_index(i)/16;
        const int col = emulated_index(i)%16;
        float sum = c.x[i];
        for (int e = 0; e < 16; ++e) {
            sum += my_a[16*row + e]*my_b[16*e + col];
        }
        d.x[i] = sum;
    }
    lanes::warp_barrier();
}

} // namespace wmma
} // namespace nvcuda
