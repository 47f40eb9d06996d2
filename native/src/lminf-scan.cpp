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
size_t lminf_sketch_size() { return 16*16*4; }
void lminf_sketch_store(void * block, int64_t lane, const float * x) {
    float s = 0;
    for (int d = 0; d < 16; ++d) s = std::max(s, fabsf(x[d]));
    s /= 7;
    for (int d = 0; d < 16; ++d) ((float *) block)[d*16 + lane] = s > 0 ? roundf(x[d]/s)*s : 0;
}
void lminf_sketch_max(const void * blocks, int64_t n_blocks, const float * q, const float * offset, int64_t n_q, float * best) {
    for (int64_t b = 0; b < n_blocks; ++b) for (int64_t i = 0; i < n_q; ++i) for (int l = 0; l < 16; ++l) {
        float s = offset[i];
        for (int d = 0; d < 16; ++d) s += q[i*16 + d]*((const float *) blocks)[b*256 + d*16 + l];
        best[b*16 + l] = std::max(best[b*16 + l], s);
    }
}
lminf_axes lminf_find_axes(const float * k, int64_t n_rows, int64_t n) {
    lminf_axes a; a.n_embd = n; a.mean.assign(n, 0); a.axes.assign(16*n, 0); a.var.assign(16, 0);
    for (int64_t r = 0; r < n_rows; ++r) for (int64_t e = 0; e < n; ++e) a.mean[e] += k[r*n + e]/n_rows;
    std::vector<float> c(n*n, 0);
    for (int64_t r = 0; r < n_rows; ++r) for (int64_t e = 0; e < n; ++e) for (int64_t f = 0; f < n; ++f) c[e*n + f] += (k[r*n+e]-a.mean[e])*(k[r*n+f]-a.mean[f])/n_rows;
    for (int d = 0; d < 16 && d < n; ++d) {
        std::vector<float> v(n), w(n);
        for (int64_t e = 0; e < n; ++e) v[e] = 1.0f/(1 + ((e*7 + d*13) % 17));
        float lambda = 0;
        for (int it = 0; it < 50; ++it) {
            for (int64_t e = 0; e < n; ++e) { w[e] = 0; for (int64_t f = 0; f < n; ++f) w[e] += c[e*n+f]*v[f]; }
            lambda = 0; for (int64_t e = 0; e < n; ++e) lambda += w[e]*w[e];
            lambda = sqrtf(lambda);
            for (int64_t e = 0; e < n; ++e) v[e] = lambda > 0 ? w[e]/lambda : 0;
        }
        for (int64_t e = 0; e < n; ++e) for (int64_t f = 0; f < n; ++f) c[e*n+f] -= lambda*v[e]*v[f];
        a.var[d] = lambda;
        std::copy(v.begin(), v.end(), a.axes.begin() + d*n);
    }
    return a;
}
void lminf_project(const lminf_axes & a, const float * k, float * x) {
    for (int d = 0; d < 16; ++d) { x[d] = 0; for (int64_t e = 0; e < a.n_embd; ++e) x[d] += a.axes[d*a.n_embd + e]*(k[e] - a.mean[e]); }
}
float lminf_exp_sum(const float * s, int64_t n, float max, float * p) {
    float res = 0;
    for (int64_t i = 0; i < n; ++i) { p[i] = s[i] == -INFINITY ? 0 : expf(s[i] - max); res += p[i]; }
    return res;
}
void lminf_best::add(const float * scores, int64_t n_scores, int64_t first) {
    for (int64_t i = 0; i < n_scores; ++i) if (scores[i] > -INFINITY) found.push_back({ first + i, scores[i] });
}
const std::vector<std::pair<int64_t, float>> & lminf_best::finish() {
    std::sort(found.begin(), found.end(), [](auto & a, auto & b) { return a.second > b.second || (a.second == b.second && a.first < b.first); });
    if ((int64_t) found.size() > n) found.resize(n);
    std::sort(found.begin(), found.end());
    return found;
}
