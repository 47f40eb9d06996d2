#include "lminf-rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define LMINF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LMINF_CLONES // as the build says
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

// compilers do not vectorize conversions from and to half
__attribute__((target("avx,f16c"))) static void halves_to_floats(const ggml_fp16_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (src + i))));
    }
}

__attribute__((target("avx,f16c"))) static void floats_to_halves(const float * src, ggml_fp16_t * dst, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        _mm_storeu_si128((__m128i *) (dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    }
}

static bool has_halves() {
    static const bool res = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
    return res;
}

// four queries at a time: the sums across lanes, which compilers leave in memory, are the slow part
__attribute__((target("avx2,fma"))) static int64_t dot_fours(const float * k, const float * q, int64_t n_embd, int64_t n_q, float * scores, int64_t n_scores) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) {
        const float * qi = q + i*n_embd;

        __m256 a = _mm256_setzero_ps();
        __m256 b = _mm256_setzero_ps();
        __m256 c = _mm256_setzero_ps();
        __m256 d = _mm256_setzero_ps();
        for (int64_t e = 0; e < n_embd; e += 8) {
            const __m256 x = _mm256_loadu_ps(k + e);
            a = _mm256_fmadd_ps(x, _mm256_loadu_ps(qi + e),            a);
            b = _mm256_fmadd_ps(x, _mm256_loadu_ps(qi + e + n_embd),   b);
            c = _mm256_fmadd_ps(x, _mm256_loadu_ps(qi + e + n_embd*2), c);
            d = _mm256_fmadd_ps(x, _mm256_loadu_ps(qi + e + n_embd*3), d);
        }
        const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));

        float sum[4];
        _mm_storeu_ps(sum, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
        for (int j = 0; j < 4; ++j) {
            scores[(i + j)*n_scores] = sum[j];
        }
    }
    return i;
}

static bool has_fours() {
    static const bool res = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return res;
}
#else
static int64_t dot_fours(const float *, const float *, int64_t, int64_t, float *, int64_t) { return 0; }
static bool has_fours() { return false; }

static void halves_to_floats(const ggml_fp16_t * src, float * dst, int64_t n) { ggml_fp16_to_fp32_row(src, dst, n); }
static void floats_to_halves(const float * src, ggml_fp16_t * dst, int64_t n) { ggml_fp32_to_fp16_row(src, dst, n); }
static bool has_halves() { return false; }
#endif

static float to_float(uint16_t half) {
    return ggml_fp16_to_fp32(half);
}

// ggml's blocks, whose layout is a file format
struct block_8 { uint16_t d; int8_t  qs[32]; };
struct block_4 { uint16_t d; uint8_t qs[16]; };

LMINF_CLONES static void load_8(const int8_t * qs, float d, float * dst) {
    for (int i = 0; i < 32; ++i) {
        dst[i] = d*qs[i];
    }
}

LMINF_CLONES static void load_4(const uint8_t * qs, float d, float * dst) {
    for (int i = 0; i < 16; ++i) {
        dst[i]      = d*((qs[i] & 15) - 8);
        dst[i + 16] = d*((qs[i] >> 4) - 8);
    }
}

static void load_floats(ggml_type type, const void * src, int64_t n, float * dst) {
    switch (type) {
        case GGML_TYPE_F32:
            memcpy(dst, src, n*sizeof(float));
            break;
        case GGML_TYPE_F16:
            {
                const int64_t n_fast = has_halves() ? n/8*8 : 0;
                halves_to_floats((const ggml_fp16_t *) src, dst, n_fast);
                ggml_fp16_to_fp32_row((const ggml_fp16_t *) src + n_fast, dst + n_fast, n - n_fast);
            } break;
        case GGML_TYPE_Q8_0:
            for (int64_t i = 0; i < n/32; ++i) {
                const auto * block = (const block_8 *) src + i;
                load_8(block->qs, to_float(block->d), dst + i*32);
            }
            break;
        case GGML_TYPE_Q4_0:
            for (int64_t i = 0; i < n/32; ++i) {
                const auto * block = (const block_4 *) src + i;
                load_4(block->qs, to_float(block->d), dst + i*32);
            }
            break;
        default:
            GGML_ABORT("an archive has no rows of type %s", ggml_type_name(type));
    }
}

static void store_halves(const float * src, ggml_fp16_t * dst, int64_t n) {
    const int64_t n_fast = has_halves() ? n/8*8 : 0;
    floats_to_halves(src, dst, n_fast);
    ggml_fp32_to_fp16_row(src + n_fast, dst + n_fast, n - n_fast);
}

void lminf_row_load(ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst) {
    if (type == dst_type) {
        memcpy(dst, src, ggml_row_size(type, n));
        return;
    }
    if (dst_type == GGML_TYPE_F32) {
        load_floats(type, src, n, (float *) dst);
        return;
    }
    constexpr int64_t n_part = 256;

    float part[n_part];
    for (int64_t i = 0; i < n; i += n_part) {
        load_floats(type, (const char *) src + ggml_row_size(type, i), std::min(n_part, n - i), part);
        store_halves(part, (ggml_fp16_t *) dst + i, std::min(n_part, n - i));
    }
}

void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst) {
    switch (type) {
        case GGML_TYPE_F32: memcpy(dst, src, n*sizeof(float));                            break;
        case GGML_TYPE_F16: store_halves(src, (ggml_fp16_t *) dst, n);                    break;
        default:            ggml_get_type_traits(type)->from_float_ref(src, dst, n);      break;
    }
}

// [n_q] dot products with one row, in sums of 16 lanes
LMINF_CLONES static void dot_row(const float * k, const float * q, int64_t n_embd, int64_t n_q, float * scores, int64_t n_scores) {
    for (int64_t i = 0; i < n_q; ++i) {
        float sum[16] = { 0.0f };
        for (int64_t e = 0; e + 16 <= n_embd; e += 16) {
            for (int l = 0; l < 16; ++l) {
                sum[l] += k[e + l]*q[i*n_embd + e + l];
            }
        }
        for (int64_t e = n_embd/16*16; e < n_embd; ++e) {
            sum[e % 16] += k[e]*q[i*n_embd + e];
        }
        for (int n = 8; n > 0; n /= 2) {
            for (int l = 0; l < n; ++l) {
                sum[l] += sum[l + n];
            }
        }
        scores[i*n_scores] = sum[0];
    }
}

void lminf_rows_dot(ggml_type type, int64_t n_embd, const char * base, size_t stride, const int32_t * idxs, int64_t n_rows,
        const float * q, int64_t n_q, float * scores) {
    std::vector<float> k(n_embd);
    for (int64_t r = 0; r < n_rows; ++r) {
        if (r + 8 < n_rows) {
            for (size_t i = 0; i < ggml_row_size(type, n_embd); i += 64) {
                __builtin_prefetch(base + idxs[r + 8]*stride + i);
            }
        }
        load_floats(type, base + idxs[r]*stride, n_embd, k.data());

        const int64_t n_done = has_fours() && n_embd % 8 == 0 ? dot_fours(k.data(), q, n_embd, n_q, scores + r, n_rows) : 0;
        dot_row(k.data(), q + n_done*n_embd, n_embd, n_q - n_done, scores + n_done*n_rows + r, n_rows);
    }
}

// 2^n * e^r, r within +-ln(2)/2: the series to r^6 is exact to 2e-7
static inline float exp_below_0(float x) {
    const float t = x > -87.0f ? x : -87.0f;
    const float n = rintf(t*1.44269504f);
    const float r = t - n*0.693359375f + n*2.12194440e-4f;
    const float p = 1.0f + r*(1.0f + r*(0.5f + r*(1.66666667e-1f + r*(4.16666667e-2f + r*(8.33333333e-3f + r*1.38888889e-3f)))));

    const int32_t bits = ((int32_t) n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));

    return p*scale;
}

LMINF_CLONES float lminf_exp(float * x, int64_t n, float & max) {
    float lanes[16];
    std::fill(lanes, lanes + 16, -INFINITY);
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        for (int l = 0; l < 16; ++l) {
            lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
        }
    }
    for (int64_t i = n/16*16; i < n; ++i) {
        lanes[i % 16] = x[i] > lanes[i % 16] ? x[i] : lanes[i % 16];
    }
    max = *std::max_element(lanes, lanes + 16);

    const float from = max == -INFINITY ? 0.0f : max;

    std::fill(lanes, lanes + 16, 0.0f);
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        for (int l = 0; l < 16; ++l) {
            x[i + l] = exp_below_0(x[i + l] - from);
            lanes[l] += x[i + l];
        }
    }
    for (int64_t i = n/16*16; i < n; ++i) {
        x[i] = exp_below_0(x[i] - from);
        lanes[i % 16] += x[i];
    }
    float res = 0.0f;
    for (int l = 0; l < 16; ++l) {
        res += lanes[l];
    }
    return res;
}

LMINF_CLONES void lminf_add_scaled(float * y, float a, const float * x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] += a*x[i];
    }
}
