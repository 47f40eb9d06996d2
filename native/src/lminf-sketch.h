// sketches of keys, from which recall makes its short lists: 16 tokens to a block and tokens as lanes, as a scan then sums within
// lanes, several times faster than across them
//
// Blocks lie at multiples of 4 bytes, best of 64, in the byte order of the machine. Different lanes of one may be stored at the
// same time; all else here may be called by any number of threads.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

constexpr int64_t lminf_n_lanes = 16;
constexpr int64_t lminf_n_dirs  = 32; // of a sketch

// --- sketches: 32 numbers of 2 bits and a scale per token, a key in the basis of lminf_axes, turned -------------------
//
// Two bits are enough for many directions, and more directions are worth more than more bits: among 32,000 keys of nano the
// 1,024 best by 32 directions of 2 bits have 99 % of the votes of the best 8, those by 16 directions of 4 bits 82 %. The turn is
// what allows it: it spreads a key over all coordinates alike, so that one scale fits them.

size_t lminf_sketch_size();
void   lminf_sketch_store(void * block, int64_t lane, const float * x); // x [32]
void   lminf_sketch_load (const void * block, int64_t lane, float * x);

// x [32] by a fixed orthogonal matrix
void lminf_turn(float * x);

// one of lminf_sketch_queries, at 8 bits
struct lminf_sketch_query {
    int32_t x[8];   // 4 signed bytes each, as they lie in memory
    int32_t start;  // -3 times their sum
    float   offset;
};

// queries that look into the same sketches: q [n][32], offset [n]. They have one scale, so that a scan multiplies with it once
struct lminf_sketch_queries {
    std::vector<lminf_sketch_query> each;
    float                           scale;

    lminf_sketch_queries(const float * q, const float * offset, int64_t n);
};

// best [n_parts][n_blocks*16] = max(best, max over i of q[i]·x + offset[i]); what is not a number loses. Parts that lie far from
// each other are read in turn: a processor fetches ahead in each of them
void lminf_sketch_max(const char * const * parts, int64_t n_parts, int64_t n_blocks, const lminf_sketch_queries & q, float * best);

// --- principal axes of one head's keys --------------------------------------------------------------------------------

struct lminf_axes {
    int64_t n_embd = 0;

    std::vector<float> mean; // [n_embd]
    std::vector<float> axes; // [32][n_embd], orthonormal, by falling variance; n_embd < 32: the rest are zeros
};

// of the rows of k [n_rows][n_embd] that are finite; the same rows give the same axes
lminf_axes lminf_find_axes(const float * k, int64_t n_rows, int64_t n_embd);

// x [32] = axes·(k - mean)
void lminf_project(const lminf_axes & axes, const float * k, float * x);

// y [32] = axes·q; returns q·mean: q·k is about y·x + q·mean
float lminf_project_query(const lminf_axes & axes, const float * q, float * y);

// --- choice of the best -----------------------------------------------------------------------------------------------

// the n best scores, exactly; of equal ones those with the lower index. An index is added once
class lminf_best {
public:
    using entry = std::pair<int64_t, float>; // index, score

    explicit lminf_best(int64_t n) { clear(n); }

    void clear(int64_t n);

    // scores of first_index, first_index + 1, ..., all below 2^32 - 1; -INFINITY and NaN don't count
    void add(const float * scores, int64_t n_scores, int64_t first_index);

    // what was found in another part, by another thread
    void add(const lminf_best & other);

    // the n best so far, fewer if there were fewer, by index; more may be added afterwards. Cheaper where they came in order
    const std::vector<entry> & finish();

private:
    void cut();

    int64_t  n;
    int64_t  n_keys;
    uint64_t border; // what is not above it is not among the n best

    std::vector<uint64_t> keys; // the first n_keys: the n best are among them, in the order they came in
    std::vector<uint64_t> scratch;

    std::vector<entry> found;
};
