// random cases of GGML_OP_LMINF_ATTN, and what comes out of them in float64

#pragma once

#include "ggml.h"

#include <cstdint>
#include <random>
#include <string>
#include <vector>

enum attn_mask_kind {
    ATTN_MASK_WINDOW,    // a ring of cells that has gone round: each query sees the n_local cells up to its own, and the sinks
    ATTN_MASK_FILLING,   // the same before the ring is full: sinks closed, cells behind the newest query empty
    ATTN_MASK_RANDOM,    // each cell with probability 1/2
    ATTN_MASK_SINKS,     // nothing but sinks
    ATTN_MASK_NOTHING,   // some queries see nothing at all
    ATTN_MASK_ONE,       // each query sees a single cell
    ATTN_MASK_OPEN,      // everything
    ATTN_MASK_COUNT,
};

struct attn_case {
    int32_t n_embd_head_k = 64;
    int32_t n_embd_head_v = 64;
    int32_t n_q           = 1;
    int32_t n_head        = 8;
    int32_t n_head_kv     = 2;
    int32_t n_stream      = 1;
    int32_t n_sink        = 8;
    int32_t n_kv          = 256;

    ggml_type type_k      = GGML_TYPE_F16;
    ggml_type type_v      = GGML_TYPE_F16;
    ggml_type type_k_sink = GGML_TYPE_F16;
    ggml_type type_v_sink = GGML_TYPE_F16;

    float max_bias      = 0.0f;
    float logit_softcap = 0.0f;
    float sharpness     = 1.0f; // scores are about this large
    bool  head_sinks    = false;
    bool  v_in_k        = false; // V: the first n_embd_head_v elements of K's rows, of sinks too, as in multi-head latent attention

    attn_mask_kind mask = ATTN_MASK_WINDOW;

    std::string str() const;
};

// the operation on fresh random data, all of it in host memory; its result poisoned with NaN
class attn_problem {
public:
    attn_problem(const attn_case & c, std::mt19937 & rng);
    ~attn_problem();

    attn_problem(const attn_problem &) = delete;

    ggml_tensor * op() const { return res; }

    // by the formulas in lminf-attn.h, from K and V as dequantized: [n_embd_head_v, n_head, n_q, n_stream]
    std::vector<double> reference() const;

private:
    attn_case c;

    ggml_context * ctx;
    ggml_tensor  * res;
};

// sum of squared differences over the sum of squares; infinite if anything is not finite, or where zeros were expected
// and something else came
double attn_nmse(const std::vector<double> & expected, const float * found);

// every head size with every pair of K and V types at 1, a few and many queries, all else drawn at random; then what
// kernels trip over: single cells, sizes next to those of tiles, the largest groups and heads, V that is a part of K
std::vector<attn_case> attn_grid(std::mt19937 & rng);

// the largest NMSE that is right, by the types of K and V alone; of kernels that compute in f32 throughout; and of those
// that round queries to 16 bits where K is in blocks of integers, and weights where V is
double attn_limit(const attn_case & c);
double attn_limit_f32(const attn_case & c);
double attn_limit_i16(const attn_case & c);

// runs `cases` through `compute`, which fills op->data and returns false to decline; prints failures and a summary.
// Returns the exit status: 1 if any NMSE is above its limit, or nothing was run
int attn_run(const char * name, const std::vector<attn_case> & cases, std::mt19937 & rng, bool (*compute)(ggml_tensor * op),
        double (*limit)(const attn_case & c) = attn_limit);

// the random state for this run: LMINF_TEST_SEED if set, else a new one; printed
std::mt19937 attn_seed();
