// the few vector operations the CPU kernels are written in: AVX-512, AVX2, NEON, or plain C
//
//   vf       LANES floats
//   N_ACC    accumulators that fit in registers beside their operands; a multiple of LANES
//   vf_sums  N_ACC vectors -> the sum of each
//
// vf_load_* convert to f32; vf_load16_i4: 16 numbers of 4 bits with their offset of 8, at `shift` of each byte
//
// and in integers, where each 128 bits of a vector are of a cell of their own:
//
//   N_PARTS  of 128 bits: as many cells
//   vi8      16 numbers of each, vi16 8, vi32 4
//   vi16_of  half of the 16; element e is then number i16_place(e) of both halves
//   vi32_dot adds products, two by two
//   vf_parts 4 vectors -> the sum over each part of each, part by part
//   vi16_load_*      2*LANES numbers of 8 or 4 bits
//   vi16_zip         of two cells, so that with vi16_pair, two weights, vi32_dot adds each cell's numbers times its weight
//   vf_unzip         those sums in order
//   vi16_store_pairs weights, rounded: one of a, one of b, in N_PAIR numbers
//   vf_f16s  the LANES/N numbers in f16 that lie at p + at[..], each N times

#pragma once

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

// into the second level cache: the first has miss buffers for half of the memory's bandwidth only
#if defined(__GNUC__)
#define LMINF_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#elif defined(_MSC_VER) && defined(__AVX2__)
#define LMINF_PREFETCH(p) _mm_prefetch((const char *) (p), _MM_HINT_T1)
#else
#define LMINF_PREFETCH(p) (void) (p)
#endif

namespace lminf_simd {

static inline uint16_t load_u16(const char * p) {
    uint16_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

typedef __m512 vf;

constexpr int LANES = 16;
constexpr int N_ACC = 16;
constexpr int N_REG = 32;

static inline vf vf_zero()                         { return _mm512_setzero_ps(); }
static inline vf vf_set(float x)                   { return _mm512_set1_ps(x); }
static inline vf vf_load(const float * p)          { return _mm512_loadu_ps(p); }
static inline void vf_store(float * p, vf x)       { _mm512_storeu_ps(p, x); }
static inline vf vf_add(vf a, vf b)                { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b)                { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b)                { return _mm512_mul_ps(a, b); }
static inline vf vf_max(vf a, vf b)                { return _mm512_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c)          { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_round(vf a)                    { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_scale2(vf a, vf n)             { return _mm512_scalef_ps(a, n); } // a*2^n

static inline vf vf_load_f16(const uint16_t * p)   { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vf vf_load_bf16(const uint16_t * p)  {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
static inline vf vf_load_i8(const int8_t * p)      { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
static inline void vf_load16_i4(const uint8_t * p, int shift, vf * res) {
    const __m128i x = _mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i *) p), shift), _mm_set1_epi8(0xF));
    res[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(x, _mm_set1_epi8(8))));
}

static inline void vf_sums(const vf * a, float * res) {
    // each step adds halves of two vectors into one: 16 lanes of one sum become 4, then 1
    __m512 x[4];
    for (int j = 0; j < 4; ++j) {
        const __m512 s01 = _mm512_add_ps(_mm512_shuffle_f32x4(a[j    ], a[j +  4], 0x44), _mm512_shuffle_f32x4(a[j    ], a[j +  4], 0xEE));
        const __m512 s23 = _mm512_add_ps(_mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x44), _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xEE));
        x[j] = _mm512_add_ps(_mm512_shuffle_f32x4(s01, s23, 0x88), _mm512_shuffle_f32x4(s01, s23, 0xDD));
    }
    const __m512d y0 = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
    const __m512d y1 = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
    _mm512_storeu_ps(res, _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(y0, y1)), _mm512_castpd_ps(_mm512_unpackhi_pd(y0, y1))));
}

typedef __m512i vi8;
typedef __m512i vi16;
typedef __m512i vi32;

constexpr int N_PARTS = 4;
constexpr int N_PAIR  = 2;

static inline int  i16_place(int e)                { return e%2*8 + e/2; }
static inline vi8  vi8_load(const char * const * p) {
    const auto load = [&](int i) { return _mm_loadu_si128((const __m128i *) p[i]); };
    return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(load(0)), load(1), 1), load(2), 2), load(3), 3);
}
static inline vi8  vi8_i4(vi8 x, int shift)        {
    return _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(x, shift), _mm512_set1_epi8(0xF)), _mm512_set1_epi8(8));
}
static inline vi16 vi16_of(vi8 x, int half)        { return _mm512_srai_epi16(half == 0 ? _mm512_slli_epi16(x, 8) : x, 8); }
static inline vi16 vi16_set(const int16_t * p)     { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)); }
static inline vi16 vi16_load_i8(const char * p)    { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) p)); }
static inline vi16 vi16_load_i4(const char * p, int) { // all of a block
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    const __m256i y = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1), _mm256_set1_epi8(0xF));
    return _mm512_cvtepi8_epi16(_mm256_sub_epi8(y, _mm256_set1_epi8(8)));
}
static inline void vi16_zip(vi16 a, vi16 b, vi16 * res) {
    res[0] = _mm512_unpacklo_epi16(a, b);
    res[1] = _mm512_unpackhi_epi16(a, b);
}
static inline vi16 vi16_pair(const int16_t * p)    {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
}
static inline void vi16_store_pairs(int16_t * res, vf a, vf b) {
    const vi32 x = _mm512_and_si512(_mm512_cvtps_epi32(a), _mm512_set1_epi32(0xFFFF));
    _mm512_storeu_si512((vi32 *) res, _mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtps_epi32(b), 16)));
}
static inline void vf_unzip(const vi32 * a, vf * res) {
    const __m512i lo = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i hi = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    res[0] = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(a[0], lo, a[1]));
    res[1] = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(a[0], hi, a[1]));
}
static inline vi32 vi32_zero()                     { return _mm512_setzero_si512(); }
static inline vi32 vi32_dot(vi32 sum, vi16 a, vi16 b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
static inline vf vf_parts(const vi32 * a) {
    const __m512i x = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i y = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y)));
}
template <int N> static inline vf vf_f16s(const char * p, const int64_t * at) {
    const auto get = [&](int i) { return (short) (i < LANES/N ? load_u16(p + at[i]) : 0); };
    const __m256i x = _mm256_set_epi16(get(15), get(14), get(13), get(12), get(11), get(10), get(9), get(8),
        get(7), get(6), get(5), get(4), get(3), get(2), get(1), get(0));
    const __m512i place = _mm512_set_epi32(15/N, 14/N, 13/N, 12/N, 11/N, 10/N, 9/N, 8/N, 7/N, 6/N, 5/N, 4/N, 3/N, 2/N, 1/N, 0);
    return _mm512_permutexvar_ps(place, _mm512_cvtph_ps(x));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

typedef __m256 vf;

constexpr int LANES = 8;
constexpr int N_ACC = 8;
constexpr int N_REG = 16;

static inline vf vf_zero()                         { return _mm256_setzero_ps(); }
static inline vf vf_set(float x)                   { return _mm256_set1_ps(x); }
static inline vf vf_load(const float * p)          { return _mm256_loadu_ps(p); }
static inline void vf_store(float * p, vf x)       { _mm256_storeu_ps(p, x); }
static inline vf vf_add(vf a, vf b)                { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b)                { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b)                { return _mm256_mul_ps(a, b); }
static inline vf vf_max(vf a, vf b)                { return _mm256_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c)          { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_round(vf a)                    { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vf_scale2(vf a, vf n)             {
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

static inline vf vf_load_f16(const uint16_t * p)   { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline vf vf_load_bf16(const uint16_t * p)  {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
static inline vf vf_load_i8(const int8_t * p)      { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }
static inline void vf_load16_i4(const uint8_t * p, int shift, vf * res) {
    const __m128i x = _mm_sub_epi8(
        _mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i *) p), shift), _mm_set1_epi8(0xF)), _mm_set1_epi8(8));
    res[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
    res[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x)));
}

static inline void vf_sums(const vf * a, float * res) {
    // as above; half of a sum is taken where it lies, as blending is cheaper than shuffling
    __m256 x[4];
    for (int j = 0; j < 4; ++j) {
        x[j] = _mm256_add_ps(_mm256_blend_ps(a[2*j], a[2*j + 1], 0xCC), _mm256_shuffle_ps(a[2*j], a[2*j + 1], 0x4E));
    }
    const __m256 lo = _mm256_add_ps(_mm256_shuffle_ps(x[0], x[1], 0x88), _mm256_shuffle_ps(x[0], x[1], 0xDD));
    const __m256 hi = _mm256_add_ps(_mm256_shuffle_ps(x[2], x[3], 0x88), _mm256_shuffle_ps(x[2], x[3], 0xDD));
    _mm256_storeu_ps(res, _mm256_add_ps(_mm256_blend_ps(lo, hi, 0xF0), _mm256_permute2f128_ps(lo, hi, 0x21)));
}

typedef __m256i vi8;
typedef __m256i vi16;
typedef __m256i vi32;

constexpr int N_PARTS = 2;
constexpr int N_PAIR  = 2;

static inline int  i16_place(int e)                { return e%2*8 + e/2; }
static inline vi8  vi8_load(const char * const * p) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p[0])), _mm_loadu_si128((const __m128i *) p[1]), 1);
}
static inline vi8  vi8_i4(vi8 x, int shift)        {
    return _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi8(0xF)), _mm256_set1_epi8(8));
}
static inline vi16 vi16_of(vi8 x, int half)        { return _mm256_srai_epi16(half == 0 ? _mm256_slli_epi16(x, 8) : x, 8); }
static inline vi16 vi16_set(const int16_t * p)     { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)); }
static inline vi16 vi16_load_i8(const char * p)    { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) p)); }
static inline vi16 vi16_load_i4(const char * p, int shift) {
    const __m128i x = _mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i *) p), shift), _mm_set1_epi8(0xF));
    return _mm256_cvtepi8_epi16(_mm_sub_epi8(x, _mm_set1_epi8(8)));
}
static inline void vi16_zip(vi16 a, vi16 b, vi16 * res) {
    res[0] = _mm256_unpacklo_epi16(a, b);
    res[1] = _mm256_unpackhi_epi16(a, b);
}
static inline vi16 vi16_pair(const int16_t * p)    {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return _mm256_set1_epi32(pair);
}
static inline void vi16_store_pairs(int16_t * res, vf a, vf b) {
    const vi32 x = _mm256_and_si256(_mm256_cvtps_epi32(a), _mm256_set1_epi32(0xFFFF));
    _mm256_storeu_si256((vi32 *) res, _mm256_or_si256(x, _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16)));
}
static inline void vf_unzip(const vi32 * a, vf * res) {
    res[0] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a[0], a[1], 0x20));
    res[1] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a[0], a[1], 0x31));
}
static inline vi32 vi32_zero()                     { return _mm256_setzero_si256(); }
static inline vi32 vi32_dot(vi32 sum, vi16 a, vi16 b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
static inline vf vf_parts(const vi32 * a) {
    const __m256i x = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
    const __m256i y = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y)));
}
template <int N> static inline vf vf_f16s(const char * p, const int64_t * at) {
    const auto get = [&](int i) { return (short) (i < LANES/N ? load_u16(p + at[i]) : 0); };
    const __m128i x = _mm_set_epi16(get(7), get(6), get(5), get(4), get(3), get(2), get(1), get(0));
    return _mm256_permutevar8x32_ps(_mm256_cvtph_ps(x), _mm256_set_epi32(7/N, 6/N, 5/N, 4/N, 3/N, 2/N, 1/N, 0));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

typedef float32x4_t vf;

constexpr int LANES = 4;
constexpr int N_ACC = 16;
constexpr int N_REG = 32;

static inline vf vf_zero()                         { return vdupq_n_f32(0.0f); }
static inline vf vf_set(float x)                   { return vdupq_n_f32(x); }
static inline vf vf_load(const float * p)          { return vld1q_f32(p); }
static inline void vf_store(float * p, vf x)       { vst1q_f32(p, x); }
static inline vf vf_add(vf a, vf b)                { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b)                { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b)                { return vmulq_f32(a, b); }
static inline vf vf_max(vf a, vf b)                { return vmaxq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c)          { return vfmaq_f32(c, a, b); }
static inline vf vf_round(vf a)                    { return vrndnq_f32(a); }
static inline vf vf_scale2(vf a, vf n)             {
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}

static inline vf vf_load_f16(const uint16_t * p)   { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vf vf_load_bf16(const uint16_t * p)  { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vf vf_load_i8(const int8_t * p)      {
    int32_t four;
    memcpy(&four, p, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
static inline void vf_load16_i4(const uint8_t * p, int shift, vf * res) {
    const uint8x16_t bytes = vandq_u8(vshlq_u8(vld1q_u8(p), vdupq_n_s8(-shift)), vdupq_n_u8(0xF));
    const int8x16_t  x     = vsubq_s8(vreinterpretq_s8_u8(bytes), vdupq_n_s8(8));
    const int16x8_t  lo    = vmovl_s8(vget_low_s8(x));
    const int16x8_t  hi    = vmovl_s8(vget_high_s8(x));
    res[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo)));
    res[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo)));
    res[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi)));
    res[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)));
}

static inline void vf_sums(const vf * a, float * res) {
    for (int i = 0; i < N_ACC; i += 4) {
        vst1q_f32(res + i, vpaddq_f32(vpaddq_f32(a[i], a[i + 1]), vpaddq_f32(a[i + 2], a[i + 3])));
    }
}

typedef int8x16_t vi8;
typedef int16x8_t vi16;
typedef int32x4_t vi32;

constexpr int N_PARTS = 1;
constexpr int N_PAIR  = 8;

static inline int  i16_place(int e)                { return e; }
static inline vi8  vi8_load(const char * const * p) { return vld1q_s8((const int8_t *) p[0]); }
static inline vi8  vi8_i4(vi8 x, int shift)        {
    const uint8x16_t bytes = vandq_u8(vshlq_u8(vreinterpretq_u8_s8(x), vdupq_n_s8(-shift)), vdupq_n_u8(0xF));
    return vsubq_s8(vreinterpretq_s8_u8(bytes), vdupq_n_s8(8));
}
static inline vi16 vi16_of(vi8 x, int half)        { return vmovl_s8(half == 0 ? vget_low_s8(x) : vget_high_s8(x)); }
static inline vi16 vi16_set(const int16_t * p)     { return vld1q_s16(p); }
static inline vi16 vi16_load_i8(const char * p)    { return vmovl_s8(vld1_s8((const int8_t *) p)); }
static inline vi16 vi16_load_i4(const char * p, int shift) {
    const uint8x8_t x = vand_u8(vshl_u8(vld1_u8((const uint8_t *) p), vdup_n_s8(-shift)), vdup_n_u8(0xF));
    return vsubq_s16(vreinterpretq_s16_u16(vmovl_u8(x)), vdupq_n_s16(8));
}
static inline void vi16_zip(vi16 a, vi16 b, vi16 * res) {
    res[0] = vcombine_s16(vget_low_s16(a), vget_low_s16(b));
    res[1] = vcombine_s16(vget_high_s16(a), vget_high_s16(b));
}
static inline vi16 vi16_pair(const int16_t * p)    { return vld1q_s16(p); }
static inline void vi16_store_pairs(int16_t * res, vf a, vf b) {
    const int16x4_t x = vmovn_s32(vcvtnq_s32_f32(a));
    const int16x4_t y = vmovn_s32(vcvtnq_s32_f32(b));
    vst1q_s16(res,      vcombine_s16(vdup_lane_s16(x, 0), vdup_lane_s16(y, 0)));
    vst1q_s16(res + 8,  vcombine_s16(vdup_lane_s16(x, 1), vdup_lane_s16(y, 1)));
    vst1q_s16(res + 16, vcombine_s16(vdup_lane_s16(x, 2), vdup_lane_s16(y, 2)));
    vst1q_s16(res + 24, vcombine_s16(vdup_lane_s16(x, 3), vdup_lane_s16(y, 3)));
}
static inline void vf_unzip(const vi32 * a, vf * res) {
    res[0] = vcvtq_f32_s32(a[0]);
    res[1] = vcvtq_f32_s32(a[1]);
}
static inline vi32 vi32_zero()                     { return vdupq_n_s32(0); }
static inline vi32 vi32_dot(vi32 sum, vi16 a, vi16 b) {
    return vmlal_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), vget_high_s16(a), vget_high_s16(b));
}
static inline vf vf_parts(const vi32 * a) {
    return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])));
}
template <int N> static inline vf vf_f16s(const char * p, const int64_t * at) {
    const uint16_t x[4] = { load_u16(p + at[0]), load_u16(p + at[1/N]), load_u16(p + at[2/N]), load_u16(p + at[3/N]) };
    return vf_load_f16(x);
}

#else

struct vf { float x[4]; };

constexpr int LANES = 4;
constexpr int N_ACC = 4;
constexpr int N_REG = 16;

#define LMINF_LANES(expr) vf r; for (int i = 0; i < 4; ++i) { r.x[i] = (expr); } return r

static inline vf vf_zero()                         { LMINF_LANES(0.0f); }
static inline vf vf_set(float x)                   { LMINF_LANES(x); }
static inline vf vf_load(const float * p)          { LMINF_LANES(p[i]); }
static inline void vf_store(float * p, vf a)       { memcpy(p, a.x, sizeof(a.x)); }
static inline vf vf_add(vf a, vf b)                { LMINF_LANES(a.x[i] + b.x[i]); }
static inline vf vf_sub(vf a, vf b)                { LMINF_LANES(a.x[i] - b.x[i]); }
static inline vf vf_mul(vf a, vf b)                { LMINF_LANES(a.x[i] * b.x[i]); }
static inline vf vf_max(vf a, vf b)                { LMINF_LANES(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); } // as on x86
static inline vf vf_fma(vf a, vf b, vf c)          { LMINF_LANES(a.x[i] * b.x[i] + c.x[i]); }
static inline vf vf_round(vf a)                    { LMINF_LANES(nearbyintf(a.x[i])); }
static inline vf vf_scale2(vf a, vf n)             { LMINF_LANES(ldexpf(a.x[i], (int) n.x[i])); }

static inline vf vf_load_f16(const uint16_t * p)   { LMINF_LANES(ggml_fp16_to_fp32(p[i])); }
static inline vf vf_load_bf16(const uint16_t * p)  { LMINF_LANES(ggml_bf16_to_fp32({ p[i] })); }
static inline vf vf_load_i8(const int8_t * p)      { LMINF_LANES((float) p[i]); }
static inline void vf_load16_i4(const uint8_t * p, int shift, vf * res) {
    for (int i = 0; i < 16; ++i) {
        res[i/4].x[i%4] = (float) ((p[i] >> shift & 0xF) - 8);
    }
}

static inline void vf_sums(const vf * a, float * res) {
    for (int i = 0; i < N_ACC; ++i) {
        res[i] = (a[i].x[0] + a[i].x[1]) + (a[i].x[2] + a[i].x[3]);
    }
}

struct vi8  { int8_t  x[16]; };
struct vi16 { int16_t x[8];  };
struct vi32 { int32_t x[4];  };

constexpr int N_PARTS = 1;
constexpr int N_PAIR  = 8;

static inline int  i16_place(int e) { return e; }
static inline vi8  vi8_load(const char * const * p) {
    vi8 r;
    memcpy(r.x, p[0], sizeof(r.x));
    return r;
}
static inline vi8  vi8_i4(vi8 a, int shift) {
    for (int8_t & x : a.x) {
        x = (int8_t) (((uint8_t) x >> shift & 0xF) - 8);
    }
    return a;
}
static inline vi16 vi16_of(vi8 a, int half) {
    vi16 r;
    std::copy_n(a.x + 8*half, 8, r.x);
    return r;
}
static inline vi16 vi16_set(const int16_t * p) {
    vi16 r;
    memcpy(r.x, p, sizeof(r.x));
    return r;
}
static inline vi16 vi16_load_i8(const char * p) {
    vi16 r;
    std::copy_n((const int8_t *) p, 8, r.x);
    return r;
}
static inline vi16 vi16_load_i4(const char * p, int shift) {
    vi16 r;
    for (int i = 0; i < 8; ++i) {
        r.x[i] = (int16_t) (((uint8_t) p[i] >> shift & 0xF) - 8);
    }
    return r;
}
static inline void vi16_zip(vi16 a, vi16 b, vi16 * res) {
    for (int i = 0; i < 8; ++i) {
        res[i/4].x[i%4*2]     = a.x[i];
        res[i/4].x[i%4*2 + 1] = b.x[i];
    }
}
static inline vi16 vi16_pair(const int16_t * p) { return vi16_set(p); }
static inline void vi16_store_pairs(int16_t * res, vf a, vf b) {
    for (int i = 0; i < 32; ++i) { // NaN cannot be converted
        const float x = i%2 == 0 ? a.x[i/8] : b.x[i/8];
        res[i] = std::isnan(x) ? 0 : (int16_t) nearbyintf(x);
    }
}
static inline void vf_unzip(const vi32 * a, vf * res) {
    for (int i = 0; i < 8; ++i) {
        res[i/4].x[i%4] = (float) a[i/4].x[i%4];
    }
}
static inline vi32 vi32_zero() { return { { 0, 0, 0, 0 } }; }
static inline vi32 vi32_dot(vi32 sum, vi16 a, vi16 b) {
    for (int i = 0; i < 8; ++i) {
        sum.x[i/2] += a.x[i]*b.x[i];
    }
    return sum;
}
static inline vf vf_parts(const vi32 * a) {
    LMINF_LANES((float) (a[i].x[0] + a[i].x[1] + a[i].x[2] + a[i].x[3]));
}
template <int N> static inline vf vf_f16s(const char * p, const int64_t * at) {
    LMINF_LANES(ggml_fp16_to_fp32(load_u16(p + at[i/N])));
}

#undef LMINF_LANES

#endif

static_assert(N_ACC % LANES == 0 && 16 % LANES == 0, "the kernels walk 16 elements at a time");

// e^x for x <= 0, within 2 units in the last place and 1e-26; 0 below -60 and for -inf. Of the weights of a softmax the
// largest is 1, and what is lost does not count beside it; further down, numbers would be subnormal, which Intel's
// processors compute some hundred times slower.
// Cody-Waite reduction to |r| <= ln(2)/2, then the polynomial of Cephes' expf (S. L. Moshier)
static inline vf vf_exp(vf x) {
    const vf lowest = vf_set(-60.0f);

    const vf y = vf_max(lowest, x); // on x86 the second one is the answer where one is NaN: it stays NaN
    const vf n = vf_round(vf_mul(y, vf_set(1.44269504088896341f)));
    const vf r = vf_fma(n, vf_set(2.12194440e-4f), vf_fma(n, vf_set(-0.693359375f), y));

    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.0f)));

    // e^-60, and a little more, taken off makes the floor a true zero and costs nothing elsewhere
    return vf_max(vf_zero(), vf_sub(vf_scale2(p, n), vf_set(8.7566e-27f)));
}

} // namespace lminf_simd
