// the Λ memory of a context, made of parts: the window of the layers with full attention (lminf-kv.h) and their sinks
// (lminf-sinks.h), the cells of layers that slide by training (lminf-kv.h again), the states of recurrent layers
// (lminf-recurrent.h), what a router has read (lminf-router.h), and where selectors write to (lminf-selector.h). A model has
// some of them. Saving and restoring is in lminf-state.cpp.

#pragma once

#include "llama-kv-cache.h"

#include "lminf-kv.h"
#include "lminf-model.h"
#include "lminf-params.h"
#include "lminf-recall.h"
#include "lminf-recurrent.h"
#include "lminf-rope.h"
#include "lminf-router.h"
#include "lminf-selector.h"
#include "lminf-sinks.h"
#include "lminf-stream.h"

#include <map>
#include <set>
#include <vector>

class lminf_memory_context;

struct lminf_state_header;

class lminf_memory : public llama_memory_i {
public:
    lminf_memory(
            const llama_model         & model,
            const llama_memory_params & params,
            const llama_cparams       & cparams,
                  lminf_layers          layers);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // positions are moved by make_room alone
    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // the whole sequence or its last tokens; anything else, or a rollback past what is left to go back to, is refused
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

    // graph position for n_tokens more, after rebasing if they would not fit below the bound; -1 if they never do
    llama_pos make_room(llama_context & lctx, llama_seq_id seq_id, int32_t n_tokens);

    // an empty sequence keeps this many sinks
    bool seq_set_sinks(llama_seq_id seq_id, int32_t n_global);

    // what is recalled for a sequence from now on
    bool seq_set_recall(llama_seq_id seq_id, int32_t n_recall);

    // gives a sequence what another one with the same tokens could recall, of another context as a copy
    bool seq_set_archive(llama_seq_id seq_id, const lminf_archive & archive, bool copies);

    // an empty sequence begins at this stream position
    bool seq_start(llama_seq_id seq_id, int64_t stream_pos);

    // The first stream position that the sequence can go back to if its window is made anew from the archive; its own if to none.
    // Only where that holds what the window did: keys are rounded once more at most, as a rebase rounds them.
    int64_t rebuild_min(llama_seq_id seq_id) const;
    // goes back so; false, and nothing changed, if that is not possible
    bool rebuild(llama_seq_id seq_id, int64_t stream_pos);

    // the sequence goes on n_tokens further, with its sinks and an empty window. Only a router asks which tokens they are: NULL
    // if none turns anything on
    bool skip(llama_seq_id seq_id, int64_t n_tokens, const llama_token * tokens);

    // graph position of a stream position; -1 if it lies before the graph's origin
    llama_pos graph_pos(llama_seq_id seq_id, int64_t stream_pos) const;

    bool is_valid(llama_seq_id seq_id) const { return seq_id >= 0 && (uint32_t) seq_id < n_seq_max; }

    lminf_info  get_info(llama_seq_id seq_id) const;
    lminf_parts get_parts() const;

    // the last micro-batch was not computed: what it touched of recurrent states cannot be taken back
    void batch_failed();

    // throws if a layer that keeps keys has an attention that never asked for the rule
    void check_layers() const;

    // called before anything can be stored
    void set_context(llama_context & lctx) { this->lctx = &lctx; }

    // waits for what is being computed, before anything that it works on is changed
    void wait() const;

    //
    // graph_build API
    //

    const lminf_stream   & get_stream(llama_seq_id seq_id) const { return streams[seq_id]; }
    const llama_kv_cells & get_cells (llama_seq_id seq_id) const { return window->get_cells(seq_id); }

    const llama_kv_cells & get_sliding_cells(llama_seq_id seq_id) const { return sliding->get_cells(seq_id); }

    // rows of the sink store, n_global padded
    int64_t get_n_sink_rows() const { return n_sink_rows; }

    // rows of one sequence in the store: one more, where keys that are no sinks are written to
    int64_t get_n_store_rows() const { return n_sink_rows + 1; }

    const lminf_sinks & get_sinks() const { return *sinks; }

    // NULL if nothing is recalled
    lminf_recall * get_recall() const { return recall.get(); }

    // NULL if the model has none
    const lminf_router * get_router() const { return router.get(); }

    bool is_router(int32_t il) const { return il == layers.router; }

    // a layer with full attention that recalls; and the most rows that it needs for that
    bool    recalls(int32_t il) const;
    int64_t get_n_recall_rows() const;

    lminf_rope         & get_rope(int32_t il) { return ropes[il]; }
    lminf_text_factors & get_text_factors()   { return text_factors; }

    bool is_fused(int32_t il) const { return fused.count(il) > 0; }

    // window and, where there are any, the cells of sliding layers
    std::vector<lminf_kv *> caches() const;

private:
    friend class lminf_memory_context;
    friend class lminf_memory_update;

    // throws if layers that select would leave out a token in view
    void check_selection(ggml_type type_v) const;

    // which layers the fused operation computes; throws if it must compute all and cannot
    void choose_attention(const llama_cparams & cparams, ggml_type type_k, ggml_type type_v);

    // the parts' contexts, in the class that the model's graph expects
    llama_memory_context_ptr wrap(llama_memory_context_ptr ctx_window, llama_memory_context_ptr ctx_sliding,
            llama_memory_context_ptr ctx_selector, llama_memory_context_ptr ctx_recurrent, const std::vector<llama_ubatch> & ubatches) const;

    // graph position of the next token
    llama_pos next_pos(llama_seq_id seq_id) const;

    // called once per micro-batch, before its graph is built
    void apply_ubatch(const llama_ubatch & ubatch);

    // true if the tokens from p0 on can be forgotten and the next query still finds every key it needs
    bool can_truncate(llama_seq_id seq_id, llama_pos p0) const;

    // forgets a sequence's tokens from p0 on, which can_truncate allows: cells and sinks, not the recurrent states
    void truncate(llama_seq_id seq_id, llama_pos p0);

    // forgets all of a sequence
    void remove(llama_seq_id seq_id);

    // what an empty sequence is
    lminf_stream new_stream() const;

    // first graph position that cells and sinks can go back to
    llama_pos truncate_min(llama_seq_id seq_id) const;
    // the same of the whole sequence
    llama_pos rollback_min(llama_seq_id seq_id) const;

    // what must agree between a state and this memory
    lminf_state_header new_state_header(int32_t n_seq, llama_state_seq_flags flags) const;

    // one sequence of a state; it is empty if that throws after something was changed
    void state_read_seq(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);

    const llama_model   & model;
    const llama_hparams & hparams;

    lminf_cparams params;

    const lminf_layers layers;

    const uint32_t  n_seq_max;
    const llama_pos block; // positions move by multiples of it

    int64_t n_sink_rows;

    int32_t   n_rebase      = 0;
    llama_pos max_graph_pos = 0;

    std::unique_ptr<lminf_kv>        window;
    std::unique_ptr<lminf_kv>        sliding;   // NULL if no layer slides
    std::unique_ptr<lminf_sinks>     sinks;
    std::unique_ptr<lminf_recurrent> recurrent; // NULL if no layer recurs
    std::unique_ptr<lminf_selector>  selector;  // NULL if no layer selects
    std::unique_ptr<lminf_router>    router;    // NULL if the model has none
    std::unique_ptr<lminf_recall>    recall;    // NULL if nothing is recalled

    std::vector<lminf_stream> streams; // [n_seq_max]

    // of each layer that attends, by its index
    std::map<int32_t, lminf_rope> ropes;
    std::set<int32_t>             fused;

    lminf_text_factors text_factors;

    // the context that owns this memory
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

    // the micro-batch is the last of its batch
    bool is_last() const { return i_ubatch + 1 == spans.size(); }

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

// the Λ memory of a context, NULL if it has another one
lminf_memory * lminf_get_memory(const llama_context * lctx);
