// the states of recurrent layers: llama.cpp's own, constant in size. A state sees every token once and cannot be undone, but
// for snapshots (llama_context_params.n_rs_seq) of the last tokens, on the architectures that can write them.

#pragma once

#include "llama-memory-recurrent.h"

class lminf_recurrent {
public:
    lminf_recurrent(const llama_model & model, bool offload, uint32_t n_seq_max, uint32_t n_rs_seq, const std::vector<int32_t> & layers);

    llama_memory_recurrent       & get_memory()       { return *mem; }
    const llama_memory_recurrent & get_memory() const { return *mem; }

    llama_memory_context_ptr new_context(std::vector<llama_ubatch> ubatches);

    // tokens at the end of the last micro-batch that have a snapshot before them
    int32_t n_rollback(llama_seq_id seq_id) const { return n_back[seq_id]; }

    bool is_empty(llama_seq_id seq_id) const { return mem->cells[seq_id].tail < 0; }

    // sequences whose states the last micro-batch wrote or moved: if it failed, they are lost
    const std::vector<llama_seq_id> & get_touched() const { return touched; }

    // takes back n tokens, n_rollback() at most; possible once until the next token
    void rollback(llama_seq_id seq_id, int32_t n);

    // forgets the sequence, and zeroes its state: the graph clears one by multiplying with zero, which NaN would survive
    void remove(llama_seq_id seq_id);

    // after a micro-batch that failed: what it would have moved may still lie where it was
    void zero_free_cells();

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    // the next token has this graph position, and none before it can be taken back
    void skip_to(llama_seq_id seq_id, llama_pos pos);

    // the graph position of the last token, which only llama.cpp's warnings depend on
    void set_pos(llama_seq_id seq_id, llama_pos pos);

    void state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);

private:
    friend class lminf_recurrent_context;

    // of each sequence the cell with its state, -1 without
    std::vector<int32_t> get_tails() const;

    // a micro-batch has its cells
    void applied(const llama_ubatch & ubatch, const std::vector<int32_t> & tails_before);

    void zero_cell(uint32_t i);

    std::unique_ptr<llama_memory_recurrent> mem;

    std::vector<int32_t> n_back; // [n_seq_max]

    std::vector<llama_seq_id> touched;
};
