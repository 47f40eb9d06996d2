// stands in for <metal_stdlib>, so that Metal sources can be compiled as C++ and run by lanes.h
//
// Only what lminf_attn.metal and upstream's common.h use. Address spaces are empty words and attributes are ignored
// (-Wno-attributes, -Wno-unknown-attributes), so this says nothing of whether Apple's compiler takes a source.
// Include it after every other header: its words are short.
//
// 8x8 matrices live in their simdgroup as on a GPU: each lane owns two elements of a result. Loaded ones are kept whole
// by every lane, which read them at its own time; where a result is an operand again, the lanes exchange it.

#pragma once

#include "lanes.h"

#include "ggml.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __METAL_VERSION__ 310

// a Metal source is included inside of namespace msl: its exp() is then metal's, not the C library's
namespace msl {
namespace metal {

typedef unsigned int   uint;
typedef unsigned short ushort;

struct uint3 { uint x, y, z; };
struct char2 { int8_t x, y; };

struct alignas(8) ushort4 { ushort x, y, z, w; };

struct alignas(16) float4 {
    float x, y, z, w;

    float4() {}
    explicit float4(float s) : x(s), y(s), z(s), w(s) {}
    float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}

    float & operator[](int i)       { return (&x)[i]; }
    float   operator[](int i) const { return (&x)[i]; }
};

inline float4 operator+(float4 a, float4 b) { return { a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w }; }
inline float4 operator*(float a, float4 b)  { return { a*b.x, a*b.y, a*b.z, a*b.w }; }

inline float4 & operator+=(float4 & a, float4 b) { return a = a + b; }
inline float4 & operator*=(float4 & a, float b)  { return a = b*a; }

inline float dot(float4 a, float4 b) { return a.x*b.x + a.y*b.y + a.z*b.z + a.w*b.w; }

struct half {
    uint16_t bits;
    explicit operator float() const { return ggml_fp16_to_fp32(bits); }
};

struct alignas(8) half4 {
    half x, y, z, w;
    operator float4() const { return { (float) x, (float) y, (float) z, (float) w }; }
};

template <typename T, typename U> T as_type(U from) {
    static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
    T res;
    memcpy(&res, &from, sizeof(T));
    return res;
}

template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }

inline float exp (float x) { return expf(x); }
inline float fabs(float x) { return fabsf(x); }
inline float sign(float x) { return (x > 0.0f) - (x < 0.0f); }

namespace precise {
inline float pow (float x, float y) { return powf(x, y); }
inline float tanh(float x)          { return tanhf(x); }
}

//
// threads
//

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

float simd_sum(float x);
float simd_max(float x);
uint  simd_or (uint  x);

template <typename T> T simd_shuffle    (T x, ushort lane) { return lanes::shuffle(x, lane); }
template <typename T> T simd_shuffle_xor(T x, ushort mask) { return lanes::shuffle(x, lanes::lane() ^ mask); }

//
// 8x8 matrices
//

struct simdgroup_float8x8 {
    float x[64];
    bool  is_whole = false; // else this lane has its own two elements only
};

simdgroup_float8x8 simdgroup_filled(float x);

template <typename T, int N> simdgroup_float8x8 make_filled_simdgroup_matrix(T x) {
    static_assert(N == 8, "there are no others");
    return simdgroup_filled(x);
}

void simdgroup_load (simdgroup_float8x8 & m, const float * from, uint64_t n_row, int origin, bool transpose);
void simdgroup_store(const simdgroup_float8x8 & m, float * to, uint64_t n_row, int origin, bool transpose);

void simdgroup_multiply           (simdgroup_float8x8 & d, simdgroup_float8x8 & a, simdgroup_float8x8 & b);
void simdgroup_multiply_accumulate(simdgroup_float8x8 & d, simdgroup_float8x8 & a, simdgroup_float8x8 & b, const simdgroup_float8x8 & c);

} // namespace metal
} // namespace msl

#define kernel
#define device
#define constant
#define thread
#define threadgroup
#define LMINF_SHARED
