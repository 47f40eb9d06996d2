// The scans for each instruction set, and the vector operations that they are written in. All of them are in every build,
// as wheels are compiled for old processors: which runs is decided when it runs. MSVC, which cannot compile functions for
// other processors than the file's, has plain C++ on x86.

#include "lminf-lanes-isa.h"

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

// What comes 2 KiB behind these n bytes, into the second level cache: processors fetch ahead by themselves, but not far enough
// for a scan that multiplies as it goes. Behind the end of an array this does nothing.
static inline void prefetch(const char * p, size_t n) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch((const void *) ((uintptr_t) p + 2048 + i), 0, 2);
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
constexpr int N_SKETCHES = 4;

static inline F    load     (const float * p)    { return _mm512_loadu_ps(p); }
static inline F    load_half(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline void store    (float * p, F x)     { _mm512_storeu_ps(p, x); }
static inline F    set      (float x)            { return _mm512_set1_ps(x); }
static inline F    add      (F a, F b)           { return _mm512_add_ps(a, b); }
static inline F    mul      (F a, F b)           { return _mm512_mul_ps(a, b); }
static inline F    fma      (F a, F b, F c)      { return _mm512_fmadd_ps(a, b, c); }
static inline F    max      (F a, F b)           { return _mm512_max_ps(a, b); }

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
static inline I low       (I x)            { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline I high      (I x)            { return low(_mm512_srli_epi16(x, 4)); }
static inline I minus_8   (I x)            { return _mm512_sub_epi8(x, _mm512_set1_epi8(8)); }

// a byte index from 128 on gives zero
template <int J>
static inline F expand(I x) {
    return to_float(_mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_set_epi32(
        ((12 + J) << 24) + 0x808080, ((8 + J) << 24) + 0x808080, ((4 + J) << 24) + 0x808080, (J << 24) + 0x808080))));
}

} // namespace avx512_ops

namespace avx512 {
using namespace avx512_ops;

static inline I dot4(I a, I b, I c) {
    return _mm512_add_epi32(c, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
}

#include "lminf-lanes-kernels.h"
} // namespace avx512
LMINF_END_ISA

LMINF_BEGIN_ISA(LMINF_AVX512 ",avx512vnni")
namespace avx512_vnni {
using namespace avx512_ops;

static inline I dot4(I a, I b, I c) { return _mm512_dpbusd_epi32(c, a, b); }

#include "lminf-lanes-kernels.h"
} // namespace avx512_vnni
LMINF_END_ISA

LMINF_BEGIN_ISA("avx2,fma,f16c")
namespace avx2 {

struct F { __m256  a, b; };
struct I { __m256i a, b; };

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;

static inline F    load     (const float * p)    { return { _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) }; }
static inline F    load_half(const uint16_t * p) {
    return { _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + 8))) };
}
static inline void store    (float * p, F x)     { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline F    set      (float x)            { return { _mm256_set1_ps(x), _mm256_set1_ps(x) }; }
static inline F    add      (F a, F b)           { return { _mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b) }; }
static inline F    mul      (F a, F b)           { return { _mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b) }; }
static inline F    fma      (F a, F b, F c)      { return { _mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b) }; }
static inline F    max      (F a, F b)           { return { _mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b) }; }

static inline int64_t append_ge(F a, F b, int32_t first, int32_t * found) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(a.a, b.a, _CMP_GE_OQ)) | _mm256_movemask_ps(_mm256_cmp_ps(a.b, b.b, _CMP_GE_OQ)) << 8;
    return append_bits(mask, first, found);
}

static inline I load_bytes(const char * p) {
    return { _mm256_loadu_si256((const __m256i *) p), _mm256_loadu_si256((const __m256i *) (p + 32)) };
}
static inline I set_int   (int32_t x) { return { _mm256_set1_epi32(x), _mm256_set1_epi32(x) }; }
static inline F to_float  (I x)       { return { _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b) }; }
static inline I low       (I x)       { return { _mm256_and_si256(x.a, _mm256_set1_epi8(15)), _mm256_and_si256(x.b, _mm256_set1_epi8(15)) }; }
static inline I high      (I x)       { return low({ _mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4) }); }
static inline I minus_8   (I x)       { return { _mm256_sub_epi8(x.a, _mm256_set1_epi8(8)), _mm256_sub_epi8(x.b, _mm256_set1_epi8(8)) }; }

template <int J>
static inline F expand(I x) {
    const __m256i index = _mm256_broadcastsi128_si256(_mm_set_epi32(
        ((12 + J) << 24) + 0x808080, ((8 + J) << 24) + 0x808080, ((4 + J) << 24) + 0x808080, (J << 24) + 0x808080));
    return to_float({ _mm256_shuffle_epi8(x.a, index), _mm256_shuffle_epi8(x.b, index) });
}

static inline __m256i dot4(__m256i a, __m256i b, __m256i c) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
static inline I dot4(I a, I b, I c) { return { dot4(a.a, b.a, c.a), dot4(a.b, b.b, c.b) }; }

#include "lminf-lanes-kernels.h"
} // namespace avx2
LMINF_END_ISA

#elif defined(LMINF_ARM)

#define LMINF_EACH(type, expr) type res; for (int i = 0; i < 4; ++i) { res.v[i] = expr; } return res

namespace neon_ops {

struct F { float32x4_t v[4]; };
struct I { int8x16_t   v[4]; };

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;

static inline F    load     (const float * p)    { LMINF_EACH(F, vld1q_f32(p + 4*i)); }
static inline F    load_half(const uint16_t * p) { LMINF_EACH(F, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4*i)))); }
static inline void store    (float * p, F x)     { for (int i = 0; i < 4; ++i) { vst1q_f32(p + 4*i, x.v[i]); } }
static inline F    set      (float x)            { LMINF_EACH(F, vdupq_n_f32(x)); }
static inline F    add      (F a, F b)           { LMINF_EACH(F, vaddq_f32(a.v[i], b.v[i])); }
static inline F    mul      (F a, F b)           { LMINF_EACH(F, vmulq_f32(a.v[i], b.v[i])); }
static inline F    fma      (F a, F b, F c)      { LMINF_EACH(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
static inline F    max      (F a, F b)           { LMINF_EACH(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }

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
static inline I low       (I x)            { LMINF_EACH(I, vandq_s8(x.v[i], vdupq_n_s8(15))); }
static inline I high      (I x)            { LMINF_EACH(I, vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x.v[i]), 4))); }
static inline I minus_8   (I x)            { LMINF_EACH(I, vsubq_s8(x.v[i], vdupq_n_s8(8))); }

template <int J>
static inline F expand(I x) {
    const int32x4_t mask = vdupq_n_s32(-(1 << 24));
    LMINF_EACH(F, vcvtq_f32_s32(vandq_s32(vshlq_n_s32(vreinterpretq_s32_s8(x.v[i]), 24 - 8*J), mask)));
}

} // namespace neon_ops

namespace neon {
using namespace neon_ops;

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

#include "lminf-lanes-kernels.h"
} // namespace neon

#if defined(LMINF_DOTPROD)
LMINF_BEGIN_ISA("arch=armv8.2-a+dotprod")
namespace neon_dotprod {
using namespace neon_ops;

static inline I dot4(I a, I b, I c) {
    LMINF_EACH(I, vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(c.v[i]), a.v[i], b.v[i])));
}

#include "lminf-lanes-kernels.h"
} // namespace neon_dotprod
LMINF_END_ISA
#endif

#undef LMINF_EACH

#endif

#define LMINF_EACH(type, expr) type res; for (int i = 0; i < 16; ++i) { res.v[i] = expr; } return res

namespace plain {

struct F { float    v[16]; };
struct I { uint32_t v[16]; }; // of four bytes the first is the lowest: see load_bytes

constexpr int N_SUMS     = 4;
constexpr int N_SKETCHES = 1;

static inline F    load     (const float * p)    { LMINF_EACH(F, p[i]); }
static inline F    load_half(const uint16_t * p) { LMINF_EACH(F, ggml_fp16_to_fp32(p[i])); }
static inline void store    (float * p, F x)     { memcpy(p, x.v, sizeof(x.v)); }
static inline F    set      (float x)            { LMINF_EACH(F, x); }
static inline F    add      (F a, F b)           { LMINF_EACH(F, a.v[i] + b.v[i]); }
static inline F    mul      (F a, F b)           { LMINF_EACH(F, a.v[i]*b.v[i]); }
static inline F    fma      (F a, F b, F c)      { LMINF_EACH(F, a.v[i]*b.v[i] + c.v[i]); }
static inline F    max      (F a, F b)           { LMINF_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }

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
static inline I low     (I x)       { LMINF_EACH(I, x.v[i] & 0x0F0F0F0F); }
static inline I high    (I x)       { LMINF_EACH(I, x.v[i] >> 4 & 0x0F0F0F0F); }
static inline I minus_8 (I x)       { LMINF_EACH(I, ((x.v[i] | 0x80808080) - 0x08080808) ^ 0x80808080); } // bytes below 128

template <int J>
static inline F expand(I x) { LMINF_EACH(F, (float) (int32_t) (x.v[i] << (24 - 8*J) & 0xFF000000)); }

static inline int32_t byte(uint32_t x, int j) { return (int8_t) (x >> 8*j); }
static inline I dot4(I a, I b, I c) {
    LMINF_EACH(I, c.v[i] + byte(a.v[i], 0)*byte(b.v[i], 0) + byte(a.v[i], 1)*byte(b.v[i], 1)
                         + byte(a.v[i], 2)*byte(b.v[i], 2) + byte(a.v[i], 3)*byte(b.v[i], 3));
}

#include "lminf-lanes-kernels.h"
} // namespace plain

// ------------------------------------------------------------------------------------------------------------------------

std::vector<lminf_lanes_isa> lminf_lanes_get_isas() {
    std::vector<lminf_lanes_isa> res;
#if defined(LMINF_X86)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx, edx; // older compilers cannot be asked for F16C
    const bool f16c   = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    const bool avx2   = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                             && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) {
        res.push_back({ "avx512-vnni", &avx512_vnni::kernels });
    }
    if (avx512) {
        res.push_back({ "avx512", &avx512::kernels });
    }
    if (avx2) {
        res.push_back({ "avx2", &avx2::kernels });
    }
#elif defined(LMINF_ARM)
#if defined(LMINF_DOTPROD)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        res.push_back({ "neon-dotprod", &neon_dotprod::kernels });
    }
#endif
    res.push_back({ "neon", &neon::kernels });
#endif
    res.push_back({ "plain", &plain::kernels });
    return res;
}
