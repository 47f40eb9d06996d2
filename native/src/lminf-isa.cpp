// The vector operations that lminf-isa-loops.h is written in, for each instruction set. MSVC, which cannot compile functions for
// other processors than the file's, has plain C++ on x86.

#include "lminf-isa.h"

#include "lminf-sketch.h"

#include <atomic>
#include <cmath>
#include <cstring>

#define LMINF_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define LMINF_BEGIN_ISA(isa) LMINF_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LMINF_END_ISA        LMINF_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define LMINF_BEGIN_ISA(isa) LMINF_PRAGMA(GCC push_options) LMINF_PRAGMA(GCC target(isa))
#define LMINF_END_ISA        LMINF_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define LMINF_X86
#include <cpuid.h>
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own immintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define LMINF_ARM
#include <arm_neon.h>
#if defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
#define LMINF_DOTPROD // chosen at run time: not by clang, whose arm_neon.h hid it from such functions for long
#include <sys/auxv.h>
#endif
#endif

// n bytes, into the second level cache
static inline void prefetch(const char * p, size_t n) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch((const void *) ((uintptr_t) p + i), 0, 2);
    }
#else
    (void) p;
    (void) n;
#endif
}

// found = first + i for each bit i that is set; returns how many are
static inline int64_t append_bits(uint32_t mask, int32_t first, int32_t * found) {
    int64_t n = 0;
    for (int32_t i = 0; mask != 0; ++i, mask >>= 1) {
        found[n] = first + i;
        n += mask & 1;
    }
    return n;
}

// ------------------------------------------------------------------------------------------------------------------------

#if defined(LMINF_X86)

#define LMINF_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"

LMINF_BEGIN_ISA(LMINF_AVX512)
namespace avx512_ops {

typedef __m512  F;
typedef __m512i I;

constexpr int N_SUMS     = 8;
constexpr int N_SKETCHES = 2;
constexpr int N_QUERIES  = 4;

static inline F    load     (const float * p)    { return _mm512_loadu_ps(p); }
static inline F    load_half(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline F    load_i8  (const char * p)     { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
static inline F    set_half (uint16_t x)         { return _mm512_cvtph_ps(_mm256_set1_epi16((short) x)); }
static inline void store    (float * p, F x)     { _mm512_storeu_ps(p, x); }
static inline void store_half(uint16_t * p, F x) { _mm256_storeu_si256((__m256i *) p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
static inline F    set      (float x)            { return _mm512_set1_ps(x); }
static inline F    add      (F a, F b)           { return _mm512_add_ps(a, b); }
static inline F    mul      (F a, F b)           { return _mm512_mul_ps(a, b); }
static inline F    fma      (F a, F b, F c)      { return _mm512_fmadd_ps(a, b, c); }
static inline F    max      (F a, F b)           { return _mm512_max_ps(a, b); }

static inline F scale_2(F n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(n), 23), _mm512_set1_epi32(0x3F800000)));
}

static inline __m512 load_halves(__m128i bytes) {
    const __m128i x = _mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
static inline F load_low (const char * p) { return load_halves(_mm_loadu_si128((const __m128i *) p)); }
static inline F load_high(const char * p) { return load_halves(_mm_srli_epi16(_mm_loadu_si128((const __m128i *) p), 4)); }

static inline void transpose(F * x) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i]     = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    F u[4][4]; // [j][i]: of rows 4*i to 4*i + 3 columns j, j + 4, j + 8 and j + 12
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[4*i + j]), b = _mm512_castps_pd(t[4*i + j + 2]);
            u[2*j    ][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[2*j + 1][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {
        const F even[2] = { _mm512_shuffle_f32x4(u[j][0], u[j][1], 0x88), _mm512_shuffle_f32x4(u[j][2], u[j][3], 0x88) };
        const F odd [2] = { _mm512_shuffle_f32x4(u[j][0], u[j][1], 0xDD), _mm512_shuffle_f32x4(u[j][2], u[j][3], 0xDD) };
        x[j]      = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
        x[j +  4] = _mm512_shuffle_f32x4(odd [0], odd [1], 0x88);
        x[j +  8] = _mm512_shuffle_f32x4(even[0], even[1], 0xDD);
        x[j + 12] = _mm512_shuffle_f32x4(odd [0], odd [1], 0xDD);
    }
}

static inline int64_t append_ge(F a, F b, int32_t first, int32_t * found) {
    const __mmask16 mask = _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
    if (mask == 0) {
        return 0;
    }
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_storeu_si512(found, _mm512_maskz_compress_epi32(mask, index));
    return __builtin_popcount(mask);
}

static inline I load_bytes(const char * p) { return _mm512_loadu_si512(p); }
static inline I set_int   (int32_t x)      { return _mm512_set1_epi32(x); }
static inline F to_float  (I x)            { return _mm512_cvtepi32_ps(x); }

template <int N>
static inline I twice(I x) { return _mm512_and_si512(N == 0 ? _mm512_slli_epi16(x, 1) : _mm512_srli_epi16(x, N - 1), _mm512_set1_epi8(6)); }

} // namespace avx512_ops

namespace avx512 {
using namespace avx512_ops;

constexpr const char * NAME = "avx512";

static inline I dot4(I a, I b, I c) {
    return _mm512_add_epi32(c, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
}

#include "lminf-isa-loops.h"
} // namespace avx512
LMINF_END_ISA

LMINF_BEGIN_ISA(LMINF_AVX512 ",avx512vnni")
namespace avx512_vnni {
using namespace avx512_ops;

constexpr const char * NAME = "avx512-vnni";

static inline I dot4(I a, I b, I c) { return _mm512_dpbusd_epi32(c, a, b); }

#include "lminf-isa-loops.h"
} // namespace avx512_vnni
LMINF_END_ISA

LMINF_BEGIN_ISA("avx2,fma,f16c")
namespace avx2 {

constexpr const char * NAME = "avx2";

struct F { __m256  a, b; };
struct I { __m256i a, b; };

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;
constexpr int N_QUERIES  = 1;

static inline F    load     (const float * p)    { return { _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) }; }
static inline F    load_half(const uint16_t * p) {
    return { _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + 8))) };
}
static inline F    set_half (uint16_t x)         { const __m256 f = _mm256_cvtph_ps(_mm_set1_epi16((short) x)); return { f, f }; }
static inline void store    (float * p, F x)     { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline void store_half(uint16_t * p, F x) {
    _mm_storeu_si128((__m128i *)  p,      _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *) (p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline F    set      (float x)            { return { _mm256_set1_ps(x), _mm256_set1_ps(x) }; }
static inline F    add      (F a, F b)           { return { _mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b) }; }
static inline F    mul      (F a, F b)           { return { _mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b) }; }
static inline F    fma      (F a, F b, F c)      { return { _mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b) }; }
static inline F    max      (F a, F b)           { return { _mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b) }; }

static inline __m256 scale_2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(n), 23), _mm256_set1_epi32(0x3F800000)));
}
static inline F scale_2(F n) { return { scale_2(n.a), scale_2(n.b) }; }

static inline F from_bytes(__m128i bytes) {
    return { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))) };
}
static inline F load_halves(__m128i bytes) { return from_bytes(_mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8))); }
static inline F load_i8  (const char * p) { return from_bytes(_mm_loadu_si128((const __m128i *) p)); }
static inline F load_low (const char * p) { return load_halves(_mm_loadu_si128((const __m128i *) p)); }
static inline F load_high(const char * p) { return load_halves(_mm_srli_epi16(_mm_loadu_si128((const __m128i *) p), 4)); }

static inline void transpose(__m256 * x) { // 8 rows of 8
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i]     = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    __m256 u[4][2]; // [j][i]: of rows 4*i to 4*i + 3 columns j and j + 4
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            const __m256d a = _mm256_castps_pd(t[4*i + j]), b = _mm256_castps_pd(t[4*i + j + 2]);
            u[2*j    ][i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            u[2*j + 1][i] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {
        x[j]     = _mm256_permute2f128_ps(u[j][0], u[j][1], 0x20);
        x[j + 4] = _mm256_permute2f128_ps(u[j][0], u[j][1], 0x31);
    }
}

static inline void transpose(F * x) {
    __m256 y[4][8];
    for (int i = 0; i < 16; ++i) {
        y[i/8    ][i % 8] = x[i].a;
        y[i/8 + 2][i % 8] = x[i].b;
    }
    for (int i = 0; i < 4; ++i) {
        transpose(y[i]);
    }
    for (int i = 0; i < 16; ++i) {
        x[i] = { y[i/8*2][i % 8], y[i/8*2 + 1][i % 8] };
    }
}

static inline int64_t append_ge(F a, F b, int32_t first, int32_t * found) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GE_OQ)) | _mm256_movemask_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GE_OQ)) << 8;
    return append_bits(mask, first, found);
}

static inline I load_bytes(const char * p) {
    return { _mm256_loadu_si256((const __m256i *) p), _mm256_loadu_si256((const __m256i *) (p + 32)) };
}
static inline I set_int   (int32_t x) { return { _mm256_set1_epi32(x), _mm256_set1_epi32(x) }; }
static inline F to_float  (I x)       { return { _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b) }; }

template <int N>
static inline __m256i twice(__m256i x) { return _mm256_and_si256(N == 0 ? _mm256_slli_epi16(x, 1) : _mm256_srli_epi16(x, N - 1), _mm256_set1_epi8(6)); }
template <int N>
static inline I twice(I x) { return { twice<N>(x.a), twice<N>(x.b) }; }

static inline __m256i dot4(__m256i a, __m256i b, __m256i c) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline I dot4(I a, I b, I c) { return { dot4(a.a, b.a, c.a), dot4(a.b, b.b, c.b) }; }

#include "lminf-isa-loops.h"
} // namespace avx2
LMINF_END_ISA

#elif defined(LMINF_ARM)

#define LMINF_EACH(type, expr) type res; for (int i = 0; i < 4; ++i) { res.v[i] = expr; } return res

namespace neon_ops {

struct F { float32x4_t v[4]; };
struct I { int8x16_t   v[4]; };

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;
constexpr int N_QUERIES  = 1;

static inline F    load     (const float * p)    { LMINF_EACH(F, vld1q_f32(p + 4*i)); }
static inline F    load_half(const uint16_t * p) { LMINF_EACH(F, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4*i)))); }
static inline void store    (float * p, F x)     { for (int i = 0; i < 4; ++i) { vst1q_f32(p + 4*i, x.v[i]); } }
static inline F    set_half (uint16_t x)         { LMINF_EACH(F, vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x)))); }
static inline void store_half(uint16_t * p, F x) { for (int i = 0; i < 4; ++i) { vst1_u16(p + 4*i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i]))); } }
static inline F    set      (float x)            { LMINF_EACH(F, vdupq_n_f32(x)); }
static inline F    add      (F a, F b)           { LMINF_EACH(F, vaddq_f32(a.v[i], b.v[i])); }
static inline F    mul      (F a, F b)           { LMINF_EACH(F, vmulq_f32(a.v[i], b.v[i])); }
static inline F    fma      (F a, F b, F c)      { LMINF_EACH(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
static inline F    max      (F a, F b)           { LMINF_EACH(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }

static inline F scale_2(F n) {
    LMINF_EACH(F, vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(n.v[i]), 23), vdupq_n_s32(0x3F800000))));
}

static inline F from_bytes(int8x16_t bytes) {
    const int16x8_t x[2] = { vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)) };
    LMINF_EACH(F, vcvtq_f32_s32(vmovl_s16(i % 2 == 0 ? vget_low_s16(x[i/2]) : vget_high_s16(x[i/2]))));
}
static inline F load_halves(uint8x16_t halves) { return from_bytes(vsubq_s8(vreinterpretq_s8_u8(halves), vdupq_n_s8(8))); }
static inline F load_i8  (const char * p) { return from_bytes(vld1q_s8((const int8_t *) p)); }
static inline F load_low (const char * p) { return load_halves(vandq_u8(vld1q_u8((const uint8_t *) p), vdupq_n_u8(15))); }
static inline F load_high(const char * p) { return load_halves(vshrq_n_u8(vld1q_u8((const uint8_t *) p), 4)); }

static inline void transpose(float32x4_t & a, float32x4_t & b, float32x4_t & c, float32x4_t & d) {
    const float64x2_t even[2] = { vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn1q_f32(c, d)) };
    const float64x2_t odd [2] = { vreinterpretq_f64_f32(vtrn2q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(c, d)) };
    a = vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1]));
    b = vreinterpretq_f32_f64(vtrn1q_f64(odd [0], odd [1]));
    c = vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1]));
    d = vreinterpretq_f32_f64(vtrn2q_f64(odd [0], odd [1]));
}

static inline void transpose(F * x) {
    F y[16];
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            transpose(x[4*i].v[j], x[4*i + 1].v[j], x[4*i + 2].v[j], x[4*i + 3].v[j]);
            for (int l = 0; l < 4; ++l) {
                y[4*j + l].v[i] = x[4*i + l].v[j];
            }
        }
    }
    for (int i = 0; i < 16; ++i) {
        x[i] = y[i];
    }
}

static inline int64_t append_ge(F a, F b, int32_t first, int32_t * found) {
    const uint32_t  bits[4] = { 1, 2, 4, 8 };
    const uint32x4_t weight = vld1q_u32(bits);

    uint32x4_t ge[4];
    for (int i = 0; i < 4; ++i) {
        ge[i] = vandq_u32(vcgeq_f32(a.v[i], b.v[i]), vshlq_u32(weight, vdupq_n_s32(4*i)));
    }
    return append_bits(vaddvq_u32(vorrq_u32(vorrq_u32(ge[0], ge[1]), vorrq_u32(ge[2], ge[3]))), first, found);
}

static inline I load_bytes(const char * p) { LMINF_EACH(I, vld1q_s8((const int8_t *) p + 16*i)); }
static inline I set_int   (int32_t x)      { LMINF_EACH(I, vreinterpretq_s8_s32(vdupq_n_s32(x))); }
static inline F to_float  (I x)            { LMINF_EACH(F, vcvtq_f32_s32(vreinterpretq_s32_s8(x.v[i]))); }

template <int N>
static inline I twice(I x) {
    const auto shift = [](uint8x16_t y) { return N == 0 ? vshlq_n_u8(y, 1) : vshrq_n_u8(y, N == 0 ? 1 : N - 1); };
    LMINF_EACH(I, vreinterpretq_s8_u8(vandq_u8(shift(vreinterpretq_u8_s8(x.v[i])), vdupq_n_u8(6))));
}

} // namespace neon_ops

namespace neon {
using namespace neon_ops;

constexpr const char * NAME = "neon";

static inline I dot4(I a, I b, I c) {
#if defined(__ARM_FEATURE_DOTPROD)
    LMINF_EACH(I, vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(c.v[i]), a.v[i], b.v[i])));
#else
    const auto pairs = [](int8x16_t x, int8x16_t y) {
        return vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_s8(vget_high_s8(x), vget_high_s8(y)));
    };
    LMINF_EACH(I, vreinterpretq_s8_s32(vpadalq_s16(vreinterpretq_s32_s8(c.v[i]), pairs(a.v[i], b.v[i]))));
#endif
}

#include "lminf-isa-loops.h"
} // namespace neon

#if defined(LMINF_DOTPROD)
LMINF_BEGIN_ISA("arch=armv8.2-a+dotprod")
namespace neon_dotprod {
using namespace neon_ops;

constexpr const char * NAME = "neon-dotprod";

static inline I dot4(I a, I b, I c) {
    LMINF_EACH(I, vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(c.v[i]), a.v[i], b.v[i])));
}

#include "lminf-isa-loops.h"
} // namespace neon_dotprod
LMINF_END_ISA
#endif

#undef LMINF_EACH

#endif

#define LMINF_EACH(type, expr) type res; for (int i = 0; i < 16; ++i) { res.v[i] = expr; } return res

namespace plain {

constexpr const char * NAME = "plain";

struct F { float    v[16]; };
struct I { uint32_t v[16]; }; // of four bytes the first is the lowest: see load_bytes

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;
constexpr int N_QUERIES  = 1;

static inline F    load     (const float * p)    { LMINF_EACH(F, p[i]); }
static inline F    load_half(const uint16_t * p) { LMINF_EACH(F, ggml_fp16_to_fp32(p[i])); }
static inline F    load_i8  (const char * p)     { LMINF_EACH(F, (float) (int8_t) p[i]); }
static inline F    load_low (const char * p)     { LMINF_EACH(F, (float) (((uint8_t) p[i] & 15) - 8)); }
static inline F    load_high(const char * p)     { LMINF_EACH(F, (float) (((uint8_t) p[i] >> 4) - 8)); }
static inline F    set_half (uint16_t x)         { const float f = ggml_fp16_to_fp32(x); LMINF_EACH(F, f); }
static inline void store    (float * p, F x)     { memcpy(p, x.v, sizeof(x.v)); }
static inline void store_half(uint16_t * p, F x) { for (int i = 0; i < 16; ++i) { p[i] = ggml_fp32_to_fp16(x.v[i]); } }
static inline F    set      (float x)            { LMINF_EACH(F, x); }
static inline F    add      (F a, F b)           { LMINF_EACH(F, a.v[i] + b.v[i]); }
static inline F    mul      (F a, F b)           { LMINF_EACH(F, a.v[i]*b.v[i]); }
static inline F    fma      (F a, F b, F c)      { LMINF_EACH(F, a.v[i]*b.v[i] + c.v[i]); }
static inline F    max      (F a, F b)           { LMINF_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }

static inline F scale_2(F n) {
    uint32_t bits[16];
    memcpy(bits, n.v, sizeof(bits));
    for (uint32_t & x : bits) {
        x = (x << 23) + 0x3F800000;
    }
    return load((const float *) memcpy(n.v, bits, sizeof(bits)));
}

static inline void transpose(F * x) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < i; ++j) {
            const float f = x[i].v[j];
            x[i].v[j] = x[j].v[i];
            x[j].v[i] = f;
        }
    }
}

static inline int64_t append_ge(F a, F b, int32_t first, int32_t * found) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) {
        mask |= (uint32_t) (a.v[i] >= b.v[i]) << i;
    }
    return append_bits(mask, first, found);
}

static inline I load_bytes(const char * p) {
    const uint8_t * b = (const uint8_t *) p;
    LMINF_EACH(I, b[4*i] | b[4*i + 1] << 8 | b[4*i + 2] << 16 | (uint32_t) b[4*i + 3] << 24);
}
static inline I set_int (int32_t x) { LMINF_EACH(I, (uint32_t) x); }
static inline F to_float(I x)       { LMINF_EACH(F, (float) (int32_t) x.v[i]); }

template <int N>
static inline I twice(I x) { LMINF_EACH(I, (N == 0 ? x.v[i] << 1 : x.v[i] >> (N == 0 ? 0 : N - 1)) & 0x06060606); }

static inline int32_t byte(uint32_t x, int j) { return (int8_t) (x >> 8*j); }
static inline I dot4(I a, I b, I c) {
    LMINF_EACH(I, c.v[i] + byte(a.v[i], 0)*byte(b.v[i], 0) + byte(a.v[i], 1)*byte(b.v[i], 1)
                         + byte(a.v[i], 2)*byte(b.v[i], 2) + byte(a.v[i], 3)*byte(b.v[i], 3));
}

#include "lminf-isa-loops.h"
} // namespace plain

// ------------------------------------------------------------------------------------------------------------------------

// what this processor can run, best first
static std::vector<const lminf_isa *> get_isas() {
    std::vector<const lminf_isa *> res;
#if defined(LMINF_X86)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx, edx; // older compilers cannot be asked for F16C
    const bool f16c   = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    const bool avx2   = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                             && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) {
        res.push_back(&avx512_vnni::isa);
    }
    if (avx512) {
        res.push_back(&avx512::isa);
    }
    if (avx2) {
        res.push_back(&avx2::isa);
    }
#elif defined(LMINF_ARM)
#if defined(LMINF_DOTPROD)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        res.push_back(&neon_dotprod::isa);
    }
#endif
    res.push_back(&neon::isa);
#endif
    res.push_back(&plain::isa);
    return res;
}

static std::atomic<const lminf_isa *> chosen{nullptr};

const lminf_isa & lminf_get_isa() {
    const lminf_isa * res = chosen.load(std::memory_order_acquire);
    if (!res) {
        res = get_isas()[0];
        chosen.store(res, std::memory_order_release);
    }
    return *res;
}

std::vector<const char *> lminf_isa_names() {
    std::vector<const char *> res;
    for (const auto * isa : get_isas()) {
        res.push_back(isa->name);
    }
    return res;
}

bool lminf_set_isa(const char * name) {
    for (const auto * isa : get_isas()) {
        if (strcmp(isa->name, name) == 0) {
            chosen = isa;
            return true;
        }
    }
    return false;
}
