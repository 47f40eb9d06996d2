// between lminf-lanes.cpp and the scans for each instruction set

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// halves of bytes [2][16 tokens][4], numbers from 0 to 15 with an offset of 8: the first 4 of 16 directions are the lower
// halves of the first 64 bytes, the next 4 the upper ones; then f16 scales [16 tokens]
constexpr size_t LMINF_SKETCH_SIZE = 160;

struct lminf_sketch_query {
    int32_t x[4];   // 4 signed bytes each, as they lie in memory
    int32_t start;  // -8 times their sum
    float   scale;
    float   offset;
};

struct lminf_lanes_kernels {
    using dot_t = void (*)(int64_t n_embd, size_t size, const char * blocks, int64_t n_blocks, const float * q, int64_t n_q, float * scores);

    dot_t dot_f32;
    dot_t dot_f16;
    dot_t dot_q8_0;
    dot_t dot_q4_0;

    void    (*sketch_max)(const char * blocks, int64_t n_blocks, const lminf_sketch_query * q, int64_t n_q, float * best);
    int64_t (*find)(const float * scores, int64_t n, float threshold, int32_t * found);
    void    (*project)(int64_t n, const float * rows, const float * x, float * res);
};

struct lminf_lanes_isa {
    const char * name;

    const lminf_lanes_kernels * kernels;
};

// what this processor can run, best first
std::vector<lminf_lanes_isa> lminf_lanes_get_isas();
