// attention over [sinks | window] with two queries and one softmax: one fused operation (native/kernels/lminf-attn.h), or
// stock ggml operations where a backend does not have it
//
//   kq      = [ K_sink · q_sink | K_window · q ]       scale, soft-cap, ALiBi, mask, softmax as llama.cpp does them
//   kqv     =   V_sink · p_sink + V_window · p_window
//   q_sink  = q rotated on from its position i to where the rule wants it, e.g. to max_distance: by (D - i)
//   K_sink  = keys rotated back by their own position: as if at 0
//
// With recall, tokens of the archive are further rows in front of the sinks (lminf-recall.h), q_sink stands at recall_distance, and
// the layer's confidence in them joins the mask.
//
// The rotation is read off the model's own RoPE node, so no architecture needs to be known here.

#pragma once

#include "llama-graph.h"

#include "lminf-memory.h"

// inputs of one graph, filled for every micro-batch
class lminf_graph_input : public llm_graph_input_i {
public:
    explicit lminf_graph_input(const llm_graph_context & graph);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * q_shift   = nullptr; // I32 [n_tokens]  rotation of the second query
    ggml_tensor * k_shift   = nullptr; // I32 [n_tokens]  rotation of a key on its way into the store
    ggml_tensor * sink_rows = nullptr; // I64 [n_tokens]  where a key goes in the store
    ggml_tensor * mask      = nullptr; // F32 [n_recall_rows + n_sink_rows + n_kv, n_tokens/n_stream, 1, n_stream]

    // F32 [n_kv of the sliding layers, n_tokens/n_stream, 1, n_stream], NULL if no layer slides
    ggml_tensor * mask_sliding = nullptr;

    ggml_tensor * k_plain_shift = nullptr; // I32 [n_tokens]  rotation of a key on its way into the archive; NULL without recall

    ggml_tensor * router = nullptr; // F32 [n_tokens]  what a router gives; NULL without

    // with the paper's rule, which of a group's rows are a head's: F32 [n_recall_rows + n_sink_rows, n_tokens/n_stream, n_head, n_stream]
    ggml_tensor * get_head_mask(const llm_graph_context & graph, int64_t n_head, int64_t n_head_kv);

    const lminf_memory_context * mctx;

    std::unique_ptr<lminf_recall_batch> recall; // NULL if nothing is recalled

private:
    std::map<std::pair<int64_t, int64_t>, ggml_tensor *> head_masks;

    bool stores_sinks;
    bool use_alibi;

    uint32_t       n_swa;
    llama_swa_type swa_type;
};

// one layer's attention with a Λ cache; without one it does nothing. Layers that slide by training have a mask like the
// window's, and no sinks. A router's answers are made elsewhere: they take the place of its values, and come out as they are.
class lminf_attn {
public:
    // before anything is done to the model's q and k: reads the rotation, makes the second query and the keys to store
    //   q_cur [n_embd_head_k, n_head,    n_tokens]
    //   k_cur [n_embd_head_k, n_head_kv, n_tokens], NULL if the layer attends to another one's keys
    //   v_cur [n_embd_head_v, n_head_kv, n_tokens], given this shape if the model merged its heads (PLM); NULL as k_cur
    //   k_rot the Hadamard matrix that keys are stored under, or NULL
    lminf_attn(const llm_graph_context & graph, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor *& v_cur, ggml_tensor * kq_b,
            ggml_tensor * k_rot, int il);

    // before build_attn_mha: stores new sinks, puts in the mask, and V of the window in a type that stock operations can
    // transpose. NULL without a Λ cache
    //   v_cur [n_embd_head_v, n_head_kv, n_tokens], in the basis of the V cache; NULL if values are a part of the keys
    const lminf_attn * finish(ggml_tensor * v_cur, ggml_tensor *& v, ggml_tensor *& kq_mask) const;

    // the whole attention in one operation; the rest of this class is for stock operations
    bool is_fused() const;

    // q [n_embd_head_k, n_tokens/n_stream, n_head, n_stream], k and v alike, as flash attention takes them; head_sinks
    // [n_head] or NULL; v_mla [n_embd_head_v, n_embd_head_v_mla, n_head], which values are decompressed by, or NULL
    // -> [n_embd_head_v*n_head, n_tokens], or with n_embd_head_v_mla
    ggml_tensor * build_fused(
            ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * v_mla, ggml_tensor * head_sinks, float kq_scale) const;

    // kq [n_kv, n_tokens, n_head, n_stream] -> [n_rows + n_kv, n_tokens, n_head, n_stream]; kq_mask becomes the one for it
    ggml_tensor * build_kq(ggml_tensor * kq, ggml_tensor *& kq_mask, float kq_scale) const;

    // v [n_kv, n_embd_head_v, n_head_kv, n_stream], kq the softmax over all -> [n_embd_head_v, n_tokens, n_head, n_stream]
    ggml_tensor * build_kqv(ggml_tensor * v, ggml_tensor * kq) const;

private:
    bool is_sliding() const;

    // of the layer in front of its window: tokens recalled, and sinks
    int64_t n_rows() const;

    // makes `rows` if the layer recalls
    void build_rows(float kq_scale) const;

    void on_cpu(ggml_tensor * t) const;

    // as the model does it
    float score_scale(float kq_scale) const;
    float logit_softcap() const;

    // the layer's mask, without the rows that it does not have
    ggml_tensor * layer_mask() const;

    // with its confidence in what it recalls, if `rows` are such
    ggml_tensor * add_confidence(ggml_tensor * mask) const;

    // keys or values of these rows, [n_embd_head, n_rows, n_head_kv, n_stream]
    ggml_tensor * view_k_rows() const;
    ggml_tensor * view_v_rows() const;

    // the second query, as build_attn_mha permutes the first: [n_embd_head_k, n_tokens/n_stream, n_head, n_stream]
    ggml_tensor * view_q_sink(int64_t n_stream) const;

    const llm_graph_context & graph;

    lminf_graph_input * inp; // NULL without a Λ cache

    ggml_tensor * q = nullptr; // the second query, [n_embd_head_k, n_head, n_tokens]
    ggml_tensor * k = nullptr; // keys as the store wants them, [n_embd_head_k, n_head_kv, n_tokens]

    ggml_tensor * k_plain = nullptr; // keys as the archive wants them, of the same shape

    bool is_router = false;

    mutable ggml_tensor * routed = nullptr; // of a router: its answers, in the basis of the V cache

    mutable ggml_tensor * stored = nullptr; // once k_plain is in the archive, NULL without
    mutable ggml_tensor * rows   = nullptr; // recalled tokens and sinks, as lminf_recall_batch::build_rows makes them; NULL: the sinks alone

    int il;
};

// the Λ memory that this graph works on, NULL without one
const lminf_memory * lminf_find_memory(const llm_graph_context & graph);

// how many tokens before it a query at this position can see, once more than sinks, window and recall have room for have gone
// by: what stands for its position where a model scales queries by that
int64_t lminf_n_in_view(const lminf_memory & mem, llama_seq_id seq_id, llama_pos pos);
