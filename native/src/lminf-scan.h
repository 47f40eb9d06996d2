#pragma once
#include "ggml.h"
#include <cstdint>
#include <utility>
#include <vector>

constexpr int64_t lminf_n_lanes = 16;
constexpr int64_t lminf_n_dirs  = 16;

void lminf_rows_dot(ggml_type type, int64_t n_embd, const void * base, size_t stride, const int32_t * idxs, int64_t n_rows,
        const float * q, int64_t n_q, float * scores, int64_t ld_scores);
void lminf_row_load (ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst);
void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst);
size_t lminf_sketch_size();
void   lminf_sketch_store(void * block, int64_t lane, const float * x);
void   lminf_sketch_max(const void * blocks, int64_t n_blocks, const float * q, const float * offset, int64_t n_q, float * best);
struct lminf_axes { int64_t n_embd = 0; std::vector<float> mean, axes, var; };
lminf_axes lminf_find_axes(const float * k, int64_t n_rows, int64_t n_embd);
void lminf_project(const lminf_axes & axes, const float * k, float * x);
float lminf_exp_sum(const float * s, int64_t n, float max, float * p);
class lminf_best {
public:
    lminf_best(int64_t n) : n(n) {}
    void clear(int64_t n_) { n = n_; found.clear(); }
    void add(const float * scores, int64_t n_scores, int64_t first_index);
    const std::vector<std::pair<int64_t, float>> & finish();
private:
    int64_t n;
    std::vector<std::pair<int64_t, float>> found;
};
