#include "lminf-scan.h"
#include <algorithm>
#include <cmath>
#include <cstring>
static void to_f32(ggml_type type, const void * src, int64_t n, float * dst) {
    if (type == GGML_TYPE_F32) { memcpy(dst, src, n*4); return; }
    ggml_get_type_traits(type)->to_float(src, dst, n);
}
void lminf_rows_dot(ggml_type type, int64_t n_embd, const void * base, size_t stride, const int32_t * idxs, int64_t n_rows,
        const float * q, int64_t n_q, float * scores, int64_t ld) {
    std::vector<float> k(n_embd);
    for (int64_t r = 0; r < n_rows; ++r) {
        to_f32(type, (const char *) base + (idxs ? idxs[r] : r)*stride, n_embd, k.data());
        for (int64_t i = 0; i < n_q; ++i) {
            float s = 0;
            for (int64_t e = 0; e < n_embd; ++e) s += q[i*n_embd + e]*k[e];
            scores[i*ld + r] = s;
        }
    }
}
void lminf_row_load(ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst) {
    if (type == dst_type) { memcpy(dst, src, ggml_row_size(type, n)); return; }
    std::vector<float> t(n);
    to_f32(type, src, n, t.data());
    if (dst_type == GGML_TYPE_F32) memcpy(dst, t.data(), n*4); else ggml_fp32_to_fp16_row(t.data(), (ggml_fp16_t *) dst, n);
}
void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst) {
    if (type == GGML_TYPE_F32) { memcpy(dst, src, n*4); return; }
    ggml_quantize_chunk(type, src, dst, 0, 1, n, nullptr);
}
float lminf_exp_sum(const float * s, int64_t n, float max, float * p) {
    float res = 0;
    for (int64_t i = 0; i < n; ++i) { p[i] = s[i] == -INFINITY ? 0 : expf(s[i] - max); res += p[i]; }
    return res;
}
