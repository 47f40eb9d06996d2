// where layers with sparse attention (DeepSeek's DSA, MiniMax's MSA) write the keys that they select tokens by. While a query
// has no more tokens in view than the model selects, it selects them all, and attention is full: sinks and window are that few.
// Nobody reads these keys then, but llama.cpp's graph stores them: in cells for one micro-batch.

#pragma once

#include "llama-hparams.h"
#include "llama-kv-cache.h"

class lminf_selector {
public:
    lminf_selector(const llama_model & model, const llama_cparams & cparams, const std::vector<int32_t> & layers);

    const llama_kv_cache & get_cache() const { return *cache; }
    llama_kv_cache       & get_cache()       { return *cache; }

    // NULL if there are too few cells
    llama_memory_context_ptr new_context(const std::vector<llama_ubatch> & ubatches);

private:
    llama_hparams hparams; // those of its keys, which the cache keeps a reference to

    std::unique_ptr<llama_kv_cache> cache;
};
