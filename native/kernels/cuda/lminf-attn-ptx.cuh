// what CUDA says in PTX only: products on tensor cores with a known layout, and copies to shared memory that go on by
// themselves. native/tests/emulate/cuda.h stands in for it.

#pragma once

#include <cuda_fp16.h>

#include <cstdint>

static __device__ __forceinline__ uint32_t lminf_shared_address(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

// two numbers in f16, the first in the low half
static __device__ __forceinline__ uint32_t lminf_pack_2_halves(float lo, float hi) {
    const __half2 x = __floats2half2_rn(lo, hi);
    return *(const uint32_t *) &x;
}

// d += a*b: 16 rows by 16, 16 by 8 columns, in f16; sums in f32. With g = lane/4 and t = lane%4 a lane holds
//
//   a  (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8): row and column of the first of two elements side by side
//   b  (2t, g) (2t + 8, g): of the first of two, one below the other
//   d  (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
static __device__ __forceinline__ void lminf_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else // Turing has half of it
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// four matrices of 8 by 8 halves from shared memory: lane l names row l%8 of matrix l/8, 16 bytes, aligned, and gets
// elements 2t and 2t + 1 of row g of each
static __device__ __forceinline__ void lminf_load_matrices(uint32_t (&res)[4], const __half * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(res[0]), "=r"(res[1]), "=r"(res[2]), "=r"(res[3]) : "r"(lminf_shared_address(row)) : "memory");
}

// the same, but gets element g of rows 2t and 2t + 1
static __device__ __forceinline__ void lminf_load_matrices_transposed(uint32_t (&res)[4], const __half * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(res[0]), "=r"(res[1]), "=r"(res[2]), "=r"(res[3]) : "r"(lminf_shared_address(row)) : "memory");
}

// 16 bytes, or zeros, to shared memory: there once this lane has waited for them, for other lanes after a barrier
static __device__ __forceinline__ void lminf_copy_16(void * to, const char * from, bool exists) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(lminf_shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0) : "memory");
#else
    *(uint4 *) to = exists ? __ldg((const uint4 *) from) : make_uint4(0, 0, 0, 0);
#endif
}

// for all copies of this lane
static __device__ __forceinline__ void lminf_wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
