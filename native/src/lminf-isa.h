// recall's loops (lminf-sketch.h, lminf-rows.h) for each instruction set. All are in every build, as wheels are compiled for old
// processors: which runs is decided when it runs.

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// quarters of bytes [2][16 tokens][4], numbers from 0 to 3 with an offset of 1.5: the first 4 of 32 coordinates are the lowest
// quarters of the first 64 bytes, the next 4 the second ones; then f16 scales [16 tokens]
constexpr size_t LMINF_SKETCH_SIZE = 160;

struct lminf_sketch_query;

struct lminf_isa {
    const char * name;

    // sketches
    void    (*sketch_max)(const char * const * parts, int64_t n_parts, int64_t n_blocks, const lminf_sketch_query * q, int64_t n_q, float scale, float * best);
    int64_t (*find)      (const float * scores, int64_t n, float threshold, int32_t * found);
    void    (*project)   (int64_t n, const float * rows, const float * x, float * res);

    // rows; k [n_embd][16] is room to work in
    void  (*to_floats) (ggml_type type, const char * src, int64_t n, float * dst);
    void  (*to_halves) (const float * src, int64_t n, uint16_t * dst);
    void  (*rows_dot)  (ggml_type type, int64_t n_embd, const char * const * rows, size_t offset, int64_t n_rows,
            const float * q, int64_t n_q, float * k, float * scores);
    float (*exp)       (float * x, int64_t n, float & max);
    void  (*add_scaled)(float * y, float a, const float * x, int64_t n);
};

// the one in use: at first the best
const lminf_isa & lminf_get_isa();

// for tests and benchmarks: what this build has and this processor can run, best first, and which is used from now on. Not while
// others use it
std::vector<const char *> lminf_isa_names();
bool                      lminf_set_isa(const char * name);
