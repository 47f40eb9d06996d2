// the Λ memory: the window is llama.cpp's own KV cache with a standard sliding window, the sinks are a small store of
// the first n_global keys and values of each sequence, written once
//
//   cells   n_cells = n_local + slack + n_ubatch per sequence, recycled by llama_kv_cache::find_slot. A cell is free
//           for reuse only n_local + slack positions behind, so that the last `slack` tokens can be taken back.
//   sinks   K as finished by the model but un-rotated (position 0), V as the cache stores it; one row per sink

#pragma once

#include "llama-kv-cache.h"

#include "lminf-params.h"
#include "lminf-stream.h"

#include <map>
#include <vector>

class lminf_memory_context;

// how a layer rotates its queries and keys, read off its own RoPE node when the graph is built
struct lminf_rope {
    bool known = false; // the layer's attention has been built once

    ggml_type     type    = GGML_TYPE_F32;
    ggml_tensor * factors = nullptr; // per-frequency factors, owned by the model
    int32_t       n_dims  = 0;       // 0: no RoPE on this layer
    int32_t       op_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)] = { 0 };
};

class lminf_memory : public llama_memory_i {
public:
    lminf_memory(
            const llama_model         & model,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
            const layer_filter_cb     & filter);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // positions are moved by make_room alone
    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // the whole sequence or its last tokens; anything else, or a rollback past the cells that are left, is refused
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    // whole sequences only
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    // not supported: they log an error and change nothing
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    // before the next token: also while the window is empty, as it is after a skip
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // lminf
    //

    const lminf_cparams & get_params() const { return params; }

    bool is_fused() const { return params.attention == LMINF_ATTENTION_FUSED; }

    // graph position for n_tokens more, after rebasing if they would not fit below the bound; -1 if they never do
    llama_pos make_room(llama_context & lctx, llama_seq_id seq_id, int32_t n_tokens);

    // an empty sequence keeps this many sinks
    bool seq_set_sinks(llama_seq_id seq_id, int32_t n_global);

    // an empty sequence begins at this stream position
    bool seq_start(llama_seq_id seq_id, int64_t stream_pos);

    // the sequence goes on n_tokens further, with its sinks and an empty window
    bool skip(llama_seq_id seq_id, int64_t n_tokens);

    // graph position of a stream position; -1 if it lies before the graph's origin
    llama_pos graph_pos(llama_seq_id seq_id, int64_t stream_pos) const;

    bool is_valid(llama_seq_id seq_id) const { return seq_id >= 0 && (uint32_t) seq_id < n_seq_max; }

    lminf_info get_info(llama_seq_id seq_id) const;

    //
    // graph_build API
    //

    const lminf_stream   & get_stream(llama_seq_id seq_id) const { return streams[seq_id]; }
    const llama_kv_cells & get_cells (llama_seq_id seq_id) const { return window->get_cells(seq_id); }

    // rows of the sink store, n_global padded
    int64_t get_n_sink_rows() const { return n_sink_rows; }

    // rows of one sequence in the store: one more, where keys that are no sinks are written to
    int64_t get_n_store_rows() const { return n_sink_rows + 1; }

    // f32, f16 or bf16 [n_embd_gqa, n_store_rows, n_seq_max]
    ggml_tensor * get_sink_k(int32_t il) const { return sinks[map_layer_ids.at(il)].k; }
    ggml_tensor * get_sink_v(int32_t il) const { return sinks[map_layer_ids.at(il)].v; }

    lminf_rope & get_rope(int32_t il) { return sinks[map_layer_ids.at(il)].rope; }

private:
    friend class lminf_memory_context;
    friend class lminf_memory_update;

    struct sink_layer {
        int32_t il;

        ggml_tensor * k;
        ggml_tensor * v;

        // where the window keeps its keys and values
        ggml_tensor * window_k;
        ggml_tensor * window_v;

        std::vector<ggml_tensor *> k_seq; // one sequence's rows
        std::vector<ggml_tensor *> v_seq;

        lminf_rope rope;
    };

    struct seq_copy {
        llama_seq_id src;
        llama_seq_id dst;
    };

    // graph position of the next token
    llama_pos next_pos(llama_seq_id seq_id) const;

    // called once per micro-batch, before its graph is built
    void apply_ubatch(const llama_ubatch & ubatch);

    // true if the tokens from p0 on can be forgotten and the next query still finds every key it needs
    bool can_truncate(llama_seq_id seq_id, llama_pos p0) const;

    // what an empty sequence is
    lminf_stream new_stream() const;

    // first graph position that a rollback can go back to
    llama_pos rollback_min(llama_seq_id seq_id) const;

    // one sequence of a state; it is empty if that throws after something was changed
    void state_read_seq(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);

    // frees the window's cells from a graph position on, or all of them for -1
    void free_cells(llama_seq_id seq_id, llama_pos p0);

    // Attention multiplies what it masks by zero, so what is free must not hold NaN or infinity: it is zeroed.
    // The window's cells [i0, i0 + n) of one sequence
    void zero_cells(llama_seq_id seq_id, uint32_t i0, uint32_t n);
    // a sequence's sinks [i0, i1)
    void zero_sinks(llama_seq_id seq_id, int32_t i0, int32_t i1);
    // waits for what is being computed; false while copies have yet to run that read what would be zeroed
    bool begin_zero();

    // the window has written its cells
    void mark_dirty(llama_seq_id seq_id);

    void copy_sinks(const std::vector<seq_copy> & copies);

    const llama_hparams & hparams;

    lminf_cparams params;

    const uint32_t n_seq_max;

    uint32_t n_cells;
    int64_t  n_sink_rows;
    bool     v_trans; // the window's values are stored transposed

    int32_t   n_rebase      = 0;
    llama_pos max_graph_pos = 0;

    std::unique_ptr<llama_kv_cache> window;

    std::vector<lminf_stream> streams; // [n_seq_max]

    // [n_seq_max], first cell that no cell in use has reached since the sequence was empty: the rest is zero
    std::vector<uint32_t> dirty;

    std::vector<sink_layer> sinks;
    std::map<int32_t, int32_t> map_layer_ids; // il -> index into sinks

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;

    // sink rows to copy before the next graph runs, after llama_kv_cache's own way with cells
    std::vector<seq_copy> pending_copies;

    // the context that owns this memory, known from its first decode on
    llama_context * lctx = nullptr;
};

// llama.cpp's models see a plain KV cache context; the graph hooks see the sinks as well
class lminf_memory_context : public llama_kv_cache_context {
public:
    // status only
    explicit lminf_memory_context(llama_memory_status status);

    // the worst case, for reserving buffers
    explicit lminf_memory_context(lminf_memory * mem);

    lminf_memory_context(lminf_memory * mem, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches);

    bool next()  override;
    bool apply() override;

    lminf_memory & get_memory() const { return *mem; }

    // the micro-batch holds tokens that become sinks
    bool get_stores_sinks() const { return stores_sinks; }

    // rows of the sink store that attention reads: the most that one of the micro-batch's sequences keeps, padded;
    // rows past a sequence's n_sink are masked
    int64_t get_n_sink_rows() const;

    // sequences [s0, s0 + ns) take part in the micro-batch
    uint32_t get_s0() const { return spans[i_ubatch].s0; }
    uint32_t get_ns() const { return spans[i_ubatch].ns; }

private:
    struct span {
        uint32_t s0;
        uint32_t ns;
    };

    lminf_memory * mem = nullptr;

    bool   stores_sinks = false;
    size_t i_ubatch     = 0;

    std::vector<span> spans;
};

// the Λ memory for a model, or an exception with one sentence that says why not
llama_memory_i * lminf_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// the Λ memory of a context, NULL if it has another one
lminf_memory * lminf_get_memory(const llama_context * lctx);
