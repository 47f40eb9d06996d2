#include "lminf-selector.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>

lminf_selector::lminf_selector(const llama_model & model, const llama_cparams & cparams, const std::vector<int32_t> & layers) :
    hparams(model.hparams) {
    // one head of keys, as llama.cpp makes them; as they are never shifted, their rotation does not matter
    std::fill(hparams.n_head_kv_arr.begin(), hparams.n_head_kv_arr.end(), 1);
    hparams.n_embd_head_k_full = model.hparams.indexer_head_size;

    const auto filter = [&](int32_t il) { return std::count(layers.begin(), layers.end(), il) > 0; };

    // with a sliding window of one token, each micro-batch takes the cells of the one before
    cache = std::make_unique<llama_kv_cache>(
            model, hparams, GGML_TYPE_F16, GGML_TYPE_F16, /*v_trans =*/ false, cparams.offload_kqv, /*unified =*/ false,
            GGML_PAD(cparams.n_ubatch, 256), cparams.n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 1, LLAMA_SWA_TYPE_STANDARD,
            /*mem_other =*/ nullptr, filter, /*reuse =*/ nullptr, /*share =*/ nullptr);
}

llama_memory_context_ptr lminf_selector::new_context(const std::vector<llama_ubatch> & ubatches) {
    cache->clear(false); // positions may have moved, and tokens been taken back

    auto sinfos = cache->prepare(ubatches);
    if (sinfos.empty()) {
        return nullptr;
    }
    return std::make_unique<llama_kv_cache_context>(cache.get(), std::move(sinfos), ubatches);
}
