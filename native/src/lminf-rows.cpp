#include "lminf-rows.h"

#include "lminf-isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static void check_type(ggml_type type) {
    GGML_ASSERT(type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0);
}

void lminf_row_load(ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst) {
    check_type(type);
    GGML_ASSERT(dst_type == GGML_TYPE_F32 || dst_type == GGML_TYPE_F16);

    if (type == dst_type) {
        memcpy(dst, src, ggml_row_size(type, n));
        return;
    }
    const auto & isa = lminf_get_isa();

    if (dst_type == GGML_TYPE_F32) {
        isa.to_floats(type, (const char *) src, n, (float *) dst);
        return;
    }
    constexpr int64_t n_part = 256;

    float part[n_part];
    for (int64_t i = 0; i < n; i += n_part) {
        isa.to_floats(type, (const char *) src + ggml_row_size(type, i), std::min(n_part, n - i), part);
        isa.to_halves(part, std::min(n_part, n - i), (uint16_t *) dst + i);
    }
}

void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst) {
    check_type(type);

    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
        return;
    }
    if (type == GGML_TYPE_F16) {
        lminf_get_isa().to_halves(src, n, (uint16_t *) dst);
        return;
    }
    constexpr ggml_fp16_t f16_nan = 0x7E00;

    for (int64_t i = 0; i < n; i += 32) {
        char * block = (char *) dst + ggml_row_size(type, i);
        if (std::all_of(src + i, src + i + 32, [](float x) { return std::isfinite(x); })) {
            ggml_get_type_traits(type)->from_float_ref(src + i, block, 32);
        } else {
            memset(block, 0xFF, ggml_row_size(type, 32));
            memcpy(block, &f16_nan, sizeof(f16_nan));
        }
    }
}

void lminf_rows_dot(ggml_type type, int64_t n_embd, const char * const * rows, size_t offset, int64_t n_rows,
        const float * q, int64_t n_q, float * scores) {
    check_type(type);

    std::vector<float> k(16*n_embd);
    lminf_get_isa().rows_dot(type, n_embd, rows, offset, n_rows, q, n_q, k.data(), scores);
}

float lminf_exp(float * x, int64_t n, float & max) {
    return lminf_get_isa().exp(x, n, max);
}

void lminf_add_scaled(float * y, float a, const float * x, int64_t n) {
    lminf_get_isa().add_scaled(y, a, x, n);
}
