// the parameters of a context as the graph and the memory see them: one field of llama_cparams, off by default

#pragma once

#include "lminf.h"

#include <cstdint>
#include <string>

struct llama_context;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;

struct lminf_cparams {
    bool enabled = false;

    int32_t n_global     = 0; // G
    int32_t n_local      = 0; // L
    int32_t max_distance = 0; // D
    int32_t n_slack      = 0;
    int32_t pos_bound    = 0; // 0: the memory chooses
    int32_t n_seq_max    = 0; // 0: as llama_context_params says

    lminf_sink_mode sink_mode = LMINF_SINK_CEILING;
    lminf_attention attention = LMINF_ATTENTION_AUTO;

    int32_t n_recall        = 0; // R
    int32_t recall_distance = 0; // d; D without recall
    int32_t recall_from     = 0;
    int32_t recall_every    = 1;
    int32_t n_archive       = 0;

    lminf_recall_rule  recall_rule  = LMINF_RECALL_LAYER;
    lminf_recall_index recall_index = LMINF_RECALL_SKETCH;

    ggml_type archive_type_k = GGML_TYPE_Q8_0;
    ggml_type archive_type_v = GGML_TYPE_Q8_0;

    uint64_t archive_bytes = 0; // 0: half of the machine's memory
    uint64_t archive_disk  = 0; // 0: not in files

    // where the sinks' keys stand, so that the query at recall_distance has them at max_distance
    int32_t sink_pos() const { return recall_distance - max_distance; }
};

// what lminf_set_next left for this thread's next context, taken once, and what of the context follows from it
void lminf_take_next(const llama_model & model, llama_cparams & cparams);

// the Λ memory for a model, or an exception with one sentence that says why not
llama_memory_i * lminf_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// rotates the keys of a layer, if it has RoPE, by shift, one entry per cell, of the sequences whose positions have been moved; false
// without a Λ cache
//   rot: the Hadamard matrix that quantized keys are stored under, or NULL
bool lminf_build_shift(ggml_context * ctx, const llama_context & lctx, ggml_cgraph * gf, ggml_tensor * k, ggml_tensor * shift,
        ggml_tensor * rot, int il);

// rebases every sequence of a batch that leaves its positions to llama.cpp, before they are filled in
void lminf_before_decode(llama_context & lctx, const llama_batch & batch);

// the context size that picks long or short RoPE factors: the largest distance a query can meet, as the stream has none
uint32_t lminf_n_ctx_rope(const llama_cparams & cparams);

// a micro-batch failed or was aborted: sequences whose recurrent states it may have left half written are emptied
void lminf_batch_failed(llama_context & lctx);

// after a context has built a graph: throws if a layer with keys went without the rule. The first time is in the making of the
// context, which its memory knows from then on
void lminf_check_graph(llama_context & lctx);

// one sentence for lminf_last_error, also logged; returns it for a throw
std::string lminf_set_error(std::string msg);
