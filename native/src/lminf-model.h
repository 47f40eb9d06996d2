// what a model needs of a Λ cache, by llama.cpp's own decision: which of its layers attend to everything, slide, recur, or
// attend to another layer's keys

#pragma once

#include "llama.h"

#include <map>
#include <vector>

struct lminf_layers {
    std::vector<int32_t> full;      // full attention: the Λ rule
    std::vector<int32_t> sliding;   // a sliding window of their own, as trained
    std::vector<int32_t> recurrent; // a state of constant size

    // of those with full attention: they select the tokens to attend to, also for others, by keys of a second cache
    std::vector<int32_t> selecting;
    bool selects_blocks = false; // of hparams.indexer_block_size positions each

    int32_t router = -1; // picks adapters (lminf-router.h): llama.cpp's graph stores keys and values of it, and nobody reads them

    // of a layer without keys of its own: whose it attends to
    std::map<int32_t, int32_t> reuse;

    // those with cells in the window
    std::vector<int32_t> in_window() const;
};

// llama.cpp's graph of it takes tokens of several sequences for one another's: a micro-batch must have those of one
bool lminf_mixes_sequences(const llama_model & model);

// of a model that lminf_refusal has nothing against
lminf_layers lminf_find_layers(const llama_model & model);
