// the sinks: the first n_global keys and values of each sequence, for every layer with full attention. Keys are as finished by
// the model but un-rotated (position 0), values as the cache stores them; each row is written once.

#pragma once

#include "llama.h"

#include "ggml-cpp.h"

#include <map>
#include <vector>

struct llama_model;

class lminf_sinks {
public:
    lminf_sinks(const llama_model & model, ggml_type type_k, ggml_type type_v, bool offload, int64_t n_rows, uint32_t n_seq_max,
            const std::vector<int32_t> & layers);

    // few rows: they are kept at the cache's own precision, and at f16 where that is quantized
    static ggml_type store_type(ggml_type type) { return ggml_is_quantized(type) ? GGML_TYPE_F16 : type; }

    // f32, f16 or bf16 [n_embd_gqa, n_rows, n_seq_max]; with MLA there are no values of their own: v is k
    ggml_tensor * get_k(int32_t il) const { return layers[map_layer_ids.at(il)].k; }
    ggml_tensor * get_v(int32_t il) const { return layers[map_layer_ids.at(il)].v; }

    // layer il attends to the keys of another one
    void reuse(int32_t il, int32_t il_keys) { map_layer_ids[il] = map_layer_ids.at(il_keys); }

    // one sequence's rows of every tensor, [n_embd_gqa, n_rows], in an order that does not change
    const std::vector<ggml_tensor *> & get_rows(llama_seq_id seq_id) const { return rows[seq_id]; }

    // rows that are not sinks hold zeros: attention multiplies what it masks by zero, so NaN must not lie there
    void zero(llama_seq_id seq_id, int32_t i0, int32_t i1);

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    void clear();

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

private:
    struct layer {
        ggml_tensor * k;
        ggml_tensor * v;
    };

    std::vector<layer> layers;
    std::map<int32_t, int32_t> map_layer_ids; // il -> index into layers

    std::vector<std::vector<ggml_tensor *>> rows; // [n_seq_max]

    const bool no_alloc; // sizes only

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};
