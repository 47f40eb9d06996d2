// which models can have a Λ cache: those whose memory is llama.cpp's plain KV cache, by llama.cpp's own decision

#include "lminf-memory.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <stdexcept>

// the smallest memory that llama.cpp itself would make for this model, to see which kind it is
static llama_memory_ptr create_stock_memory(const llama_model & model) {
    const llama_memory_params params = {
        /*.type_k    =*/ GGML_TYPE_F16,
        /*.type_v    =*/ GGML_TYPE_F16,
        /*.swa_full  =*/ false,
        /*.ctx_type  =*/ LLAMA_CONTEXT_TYPE_DEFAULT,
        /*.mem_other =*/ nullptr,
    };

    llama_cparams cparams = {};
    cparams.n_ctx     = 1;
    cparams.n_ctx_seq = 1;
    cparams.n_batch   = 1;
    cparams.n_ubatch  = 1;
    cparams.n_seq_max = 1;

    return llama_memory_ptr(model.create_memory(params, cparams));
}

static const char * find_reason(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.vocab_only) {
        return "only its vocabulary was loaded, and there is nothing to run";
    }
    if (llama_model_has_encoder(&model)) {
        return "it has an encoder, which reads its whole input at once";
    }
    if (llama_model_is_recurrent(&model)) {
        return "it is recurrent, and has a constant-size memory of its own";
    }
    if (llama_model_is_hybrid(&model)) {
        return "it mixes attention with recurrent layers, and rolling back or restarting those is not possible here";
    }
    if (!hparams.causal_attn) {
        return "its attention is not causal, so it reads its whole input at once";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "some of its layers have a sliding window of their own, trained without sinks";
    }
    if (hparams.is_mla()) {
        return "it keeps compressed keys (MLA), which cannot be rotated back";
    }
    if (hparams.n_pos_per_embd() > 1) {
        return "it has several positions per token (M-RoPE)";
    }
    if (hparams.router_layer >= 0) {
        return "it reads which adapter is on from a token that may be far back, and has left the cache by then";
    }
    if (model.pos_embd != nullptr) {
        return "it adds learned absolute positions, which end where its training ended";
    }

    const llama_memory_ptr memory = create_stock_memory(model);
    if (!memory) {
        return "it has no KV cache";
    }
    if (dynamic_cast<llama_kv_cache *>(memory.get()) == nullptr) {
        return "its memory is not llama.cpp's plain KV cache";
    }

    return nullptr;
}

const char * lminf_refusal(const llama_model * model) {
    static thread_local std::string res;

    const char * reason = find_reason(*model);
    if (!reason) {
        return nullptr;
    }

    res = format("models of architecture '%s' cannot run with a Λ cache: %s", llm_arch_name(model->arch), reason);
    return res.c_str();
}

llama_memory_i * lminf_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (const char * refusal = lminf_refusal(&model)) {
        throw std::runtime_error(lminf_set_error(refusal));
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        throw std::runtime_error(lminf_set_error("a draft context (MTP) cannot have a Λ cache"));
    }

    // layers that only predict further tokens are never attended by the model itself
    const uint32_t n_layer = model.hparams.n_layer();
    const llama_memory_i::layer_filter_cb filter = [n_layer](int32_t il) { return (uint32_t) il < n_layer; };

    try {
        return new lminf_memory(model, params, cparams, filter);
    } catch (const std::exception & err) {
        if (lminf_last_error()[0] == '\0') {
            lminf_set_error(err.what());
        }
        throw;
    }
}
