// declares what lminf_attn.metal uses of Metal, with real address spaces: clang then refuses what mixes them up, which the
// CPU does not notice (metal.h has empty words for them). Nothing here can run; scripts/test_kernels.py compiles it so:
//
//   clang++ -std=c++14 -fsyntax-only -Wno-unknown-attributes -D__METAL_VERSION__=310 \
//       -DLMINF_METAL_SPACES -nostdinc -I native/tests/emulate -x c++ lminf_attn.metal

#pragma once

typedef __INT8_TYPE__   int8_t;
typedef __INT32_TYPE__  int32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef unsigned int    uint;
typedef unsigned short  ushort;

#define FLT_MAX __FLT_MAX__

#define kernel
#define device      __attribute__((address_space(1)))
#define constant    __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define LMINF_SHARED

namespace metal {

typedef float       float4  __attribute__((ext_vector_type(4)));
typedef ushort      ushort4 __attribute__((ext_vector_type(4)));
typedef signed char char2   __attribute__((ext_vector_type(2)));
typedef uint        uint3   __attribute__((ext_vector_type(3)));

enum class half : ushort {};
struct half4 { ushort x[4]; };

float4 make_float4(float x);
float4 make_float4(float x, float y, float z, float w);
float4 make_float4(device const half4 & x);

template <typename T, typename U> T as_type(U x);

int   min(int a, int b);
float min(float a, float b);
int   max(int a, int b);
float max(float a, float b);
float exp(float x);
float dot(float4 a, float4 b);

namespace precise {
float pow(float x, float y);
float tanh(float x);
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

float simd_sum(float x);
float simd_max(float x);
uint  simd_or(uint x);

template <typename T> T simd_shuffle(T x, ushort lane);
template <typename T> T simd_shuffle_xor(T x, ushort mask);

struct simdgroup_float8x8 { float x[2]; };

template <typename T, int N> simdgroup_float8x8 make_filled_simdgroup_matrix(T x);

void simdgroup_load (simdgroup_float8x8 & m, threadgroup const float * from, uint64_t n_row, int origin, bool transpose);
void simdgroup_store(simdgroup_float8x8   m, threadgroup float * to, uint64_t n_row, int origin, bool transpose);

void simdgroup_multiply           (simdgroup_float8x8 & d, simdgroup_float8x8 a, simdgroup_float8x8 b);
void simdgroup_multiply_accumulate(simdgroup_float8x8 & d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c);

} // namespace metal

#define float4(...) make_float4(__VA_ARGS__)
