// rows of an archive: keys and values as ggml stores them, a token's heads one after the other. Any number of threads may call this

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

// F32, F16, Q8_0 or Q4_0 to F32 or F16, and F32 to any of them; n is a multiple of the type's blocks. As ggml does it, to the bit, but
// a quantized block of which an element is not finite reads as NaN
void lminf_row_load (ggml_type type, const void * src, int64_t n, ggml_type dst_type, void * dst);
void lminf_row_store(ggml_type type, const float * src, int64_t n, void * dst);

// scores [n_q][n_rows]: of each query q [n_q][n_embd] with what begins at rows[r] + offset
void lminf_rows_dot(ggml_type type, int64_t n_embd, const char * const * rows, size_t offset, int64_t n_rows,
        const float * q, int64_t n_q, float * scores);

// x = exp(x - max), for their largest; returns the sum. What is not a number counts as -infinity, whose power is e^-87
float lminf_exp(float * x, int64_t n, float & max);

// y += a*x
void lminf_add_scaled(float * y, float a, const float * x, int64_t n);
