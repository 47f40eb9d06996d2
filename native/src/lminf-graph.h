// attention over [sinks | window] with two queries and one softmax: one fused operation (native/kernels/lminf-attn.h), or
// stock ggml operations where a backend does not have it
//
//   kq      = [ K_sink · q_sink | K_window · q ]       scale, soft-cap, ALiBi, mask, softmax as llama.cpp does them
//   kqv     =   V_sink · p_sink + V_window · p_window
//   q_sink  = q rotated on from its position i to where the rule wants it, e.g. to max_distance: by (D - i)
//   K_sink  = keys rotated back by their own position: as if at 0
//
// The rotation is read off the model's own RoPE node, so no architecture needs to be known here.

#pragma once

#include "llama-graph.h"

#include "lminf-memory.h"

// inputs of one graph, filled for every micro-batch
class lminf_graph_input : public llm_graph_input_i {
public:
    lminf_graph_input(const llm_graph_context & graph, const lminf_memory_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * q_shift   = nullptr; // I32 [n_tokens]  rotation of the second query
    ggml_tensor * k_shift   = nullptr; // I32 [n_tokens]  rotation of a key on its way into the store
    ggml_tensor * sink_rows = nullptr; // I64 [n_tokens]  where a key goes in the store
    ggml_tensor * mask      = nullptr; // F32 [n_sink_rows + n_kv, n_tokens/n_stream, 1, n_stream]

    const lminf_memory_context * mctx;

private:
    bool stores_sinks;
    bool use_alibi;
};

// the sinks' half of one layer's attention; does nothing without sinks
class lminf_attn {
public:
    lminf_attn(const llm_graph_context & graph, lminf_graph_input * inp);

    // before anything is done to the model's q and k: remember the rotation, make the second query, store new sinks.
    //   q_cur [n_embd_head_k, n_head,    n_tokens]
    //   k_cur [n_embd_head_k, n_head_kv, n_tokens]
    //   v_cur [n_embd_head_v, n_head_kv, n_tokens], in the basis of the V cache
    void begin(ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * kq_b, int il);
    void store(ggml_tensor * v_cur);

    // the whole attention in one operation; the rest of this class is for stock operations
    bool is_fused() const;

    // q [n_embd_head_k, n_tokens/n_stream, n_head, n_stream], k and v alike, as flash attention takes them; head_sinks
    // [n_head] or NULL -> [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_fused(ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * head_sinks, float kq_scale) const;

    // V of the window in a type that stock operations can transpose
    ggml_tensor * readable_v(ggml_tensor * v) const;

    // kq [n_kv, n_tokens, n_head, n_stream] -> [n_sink_rows + n_kv, n_tokens, n_head, n_stream]
    ggml_tensor * build_kq(ggml_tensor * kq) const;

    // v [n_kv, n_embd_head_v, n_head_kv, n_stream], kq the softmax over both -> [n_embd_head_v, n_tokens, n_head, n_stream]
    ggml_tensor * build_kqv(ggml_tensor * v, ggml_tensor * kq) const;

    ggml_tensor * mask() const { return inp->mask; }

private:
    // the second query, as build_attn_mha permutes the first: [n_embd_head_k, n_tokens/n_stream, n_head, n_stream]
    ggml_tensor * view_q_sink(int64_t n_stream) const;

    const llm_graph_context & graph;

    lminf_graph_input * inp;

    ggml_tensor * q = nullptr; // the second query, [n_embd_head_k, n_head, n_tokens]
    ggml_tensor * k = nullptr; // keys as the store wants them, [n_embd_head_k, n_head_kv, n_tokens]

    int il = -1;
};

lminf_graph_input * lminf_build_input(const llm_graph_context & graph);

// rotates a layer's whole K cache by shift, one entry per cell; NULL if the layer has no RoPE
//   rot: the Hadamard matrix that quantized keys are stored under, or NULL
ggml_tensor * lminf_build_shift(
        ggml_context * ctx, const llama_context & lctx, ggml_tensor * k, ggml_tensor * shift, ggml_tensor * rot, int il);
