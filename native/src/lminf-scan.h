#pragma once
#include "lminf-lanes.h"

void lminf_rows_dot(ggml_type type, int64_t n_embd, const void * base, size_t stride, const int32_t * idxs, int64_t n_rows,
        const float * q, int64_t n_q, float * scores, int64_t ld_scores);
void lminf_row_load (ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst);
void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst);
float lminf_exp_sum(const float * s, int64_t n, float max, float * p);
