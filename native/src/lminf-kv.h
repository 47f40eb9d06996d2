// one of llama.cpp's own KV caches with a stream for each sequence, of which a query sees the last n_seen tokens and of which
// n_slack more can be taken back: the window of the layers with full attention, and those of layers that slide by training
//
//   cells   n_cells = n_seen + n_slack + n_ubatch per sequence, recycled by llama_kv_cache::find_slot. A cell is free for
//           reuse only n_seen + n_slack positions behind; the mask decides what is seen (lminf-graph.cpp).

#pragma once

#include "llama-kv-cache.h"

#include <functional>
#include <vector>

class lminf_kv {
public:
    struct params {
        ggml_type type_k;
        ggml_type type_v;
        bool      v_trans; // values are stored transposed
        bool      offload;
        uint32_t  n_cells;
        uint32_t  n_seen;
        uint32_t  n_slack;
        uint32_t  n_seq_max;
    };

    //   layers   those that store keys
    //   reuse    of a layer that attends to another one's keys: which
    lminf_kv(const llama_model & model, const params & p, const std::vector<int32_t> & layers, const llama_memory_i::layer_reuse_cb & reuse);

    llama_kv_cache       & get_cache()       { return *cache; }
    const llama_kv_cache & get_cache() const { return *cache; }

    const llama_kv_cells & get_cells(llama_seq_id seq_id) const { return cache->get_cells(seq_id); }

    const params & get_params() const { return p; }

    // first graph position that a rollback can go back to, of a sequence whose window can begin at pos_resume
    llama_pos rollback_min(llama_seq_id seq_id, int64_t pos_resume) const;

    // frees a sequence's cells from a graph position on, or all of them for -1. Attention multiplies what it masks by zero,
    // so what is free must not hold NaN or infinity: it is zeroed
    void free_cells(llama_seq_id seq_id, llama_pos p0);

    // moves all positions of a sequence back; its keys are rotated by the next update
    void shift(llama_seq_id seq_id, llama_pos by);

    // the streams of these keys that the next update has to rotate; none if they are another cache's
    std::vector<uint32_t> shifted_streams(const ggml_tensor * k) const;

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    // a sequence has these n tokens from now on, from graph position p0 on, and no others. Their keys come un-rotated, and are rotated
    // by the next update:
    //   load(layer, i, k, v)  writes the i-th token's rows of the layer with this index, v NULL with MLA
    // The cache's types must be F32 or F16: others are stored under a Hadamard rotation.
    void fill(llama_seq_id seq_id, llama_pos p0, int64_t n, const std::function<void(size_t layer, int64_t i, char * k, char * v)> & load);

    // to be called before cells that a sequence uses can be recycled
    void mark_dirty(llama_seq_id seq_id);

    // cells that llama_kv_cache::state_write saves of one sequence, in its order
    std::vector<uint32_t> saved_cells(llama_seq_id seq_id) const;

private:
    struct layer {
        ggml_tensor * k;
        ggml_tensor * v; // NULL with MLA: values are a part of the keys
    };

    void zero_cells(llama_seq_id seq_id, uint32_t i0, uint32_t n);

    const params p;

    std::unique_ptr<llama_kv_cache> cache;

    std::vector<layer> layers;

    // [n_seq_max], first cell that no cell in use has reached since the sequence was empty: the rest is zero
    std::vector<uint32_t> dirty;
};
