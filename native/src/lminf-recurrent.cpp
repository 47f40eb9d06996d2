#include "lminf-recurrent.h"

#include "llama-model.h"

#include <algorithm>

// llama.cpp's models see its own context; with this one we know when a micro-batch gets its cells
class lminf_recurrent_context : public llama_memory_recurrent_context {
public:
    lminf_recurrent_context(lminf_recurrent * owner, std::vector<llama_ubatch> ubatches) :
        llama_memory_recurrent_context(&owner->get_memory(), std::move(ubatches)), owner(owner) {}

    bool apply() override {
        const auto before = owner->get_tails();

        const bool res = llama_memory_recurrent_context::apply();

        owner->applied(get_ubatch(), before);

        return res;
    }

private:
    lminf_recurrent * owner;
};

lminf_recurrent::lminf_recurrent(const llama_model & model, bool offload, uint32_t n_seq_max, uint32_t n_rs_seq, const std::vector<int32_t> & layers) :
    n_back(n_seq_max, 0) {
    mem = std::make_unique<llama_memory_recurrent>(model, GGML_TYPE_F32, GGML_TYPE_F32, offload, n_seq_max, n_seq_max, n_rs_seq,
            [&](int32_t il) { return std::count(layers.begin(), layers.end(), il) > 0; });
}

llama_memory_context_ptr lminf_recurrent::new_context(std::vector<llama_ubatch> ubatches) {
    return std::make_unique<lminf_recurrent_context>(this, std::move(ubatches));
}

std::vector<int32_t> lminf_recurrent::get_tails() const {
    std::vector<int32_t> res;
    for (size_t s = 0; s < n_back.size(); ++s) {
        res.push_back(mem->cells[s].tail);
    }
    return res;
}

void lminf_recurrent::applied(const llama_ubatch & ubatch, const std::vector<int32_t> & tails_before) {
    touched.assign(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);

    // the state of another sequence may be moved, its snapshots never are; or it goes back to one of them now
    for (llama_seq_id s = 0; s < (llama_seq_id) n_back.size(); ++s) {
        if (std::count(touched.begin(), touched.end(), s) > 0) {
            continue;
        }
        const int32_t tail = mem->cells[s].tail;

        const bool is_moved  = tail != tails_before[s];
        const bool goes_back = mem->rs_idx[s] != 0 && tail >= (int32_t) mem->head && tail < (int32_t) (mem->head + mem->n);
        if (is_moved) {
            n_back[s] = 0;
        }
        if (is_moved || goes_back) {
            touched.push_back(s);
        }
    }

    // a snapshot before the micro-batch's first token is not written
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        n_back[ubatch.seq_id_unq[s]] = std::min<int32_t>(mem->n_rs_seq, ubatch.n_seq_tokens - 1);
    }
}

void lminf_recurrent::rollback(llama_seq_id seq_id, int32_t n) {
    if (n == 0) {
        return;
    }
    GGML_ASSERT(n <= n_back[seq_id]);

    mem->set_rs_idx(seq_id, n);
    n_back[seq_id] = 0;
}

void lminf_recurrent::remove(llama_seq_id seq_id) {
    const int32_t tail = mem->cells[seq_id].tail;

    if (tail >= 0 && mem->cells[tail].seq_id.size() == 1) {
        zero_cell(tail);
    }

    mem->seq_rm(seq_id, -1, -1);
    n_back[seq_id] = 0;
}

void lminf_recurrent::zero_free_cells() {
    for (uint32_t i = 0; i < mem->size; ++i) {
        if (mem->cells[i].is_empty()) {
            zero_cell(i);
        }
    }
}

void lminf_recurrent::zero_cell(uint32_t i) {
    for (const auto * tensors : { &mem->r_l, &mem->s_l, &mem->p_l }) {
        for (ggml_tensor * t : *tensors) {
            for (uint32_t group = 0; t && group < 1 + mem->n_rs_seq; ++group) {
                ggml_backend_tensor_memset(t, 0, (group*mem->size + i)*t->nb[1], t->nb[1]);
            }
        }
    }
}

void lminf_recurrent::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    remove(seq_id_dst);
    mem->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    mem->set_rs_idx(seq_id_dst, mem->rs_idx[seq_id_src]);
}

void lminf_recurrent::skip_to(llama_seq_id seq_id, llama_pos pos) {
    set_pos(seq_id, pos - 1);
    n_back[seq_id] = 0;
}

void lminf_recurrent::set_pos(llama_seq_id seq_id, llama_pos pos) {
    if (!is_empty(seq_id)) {
        mem->cells[mem->cells[seq_id].tail].pos = pos;
    }
}

void lminf_recurrent::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    mem->state_read(io, seq_id, flags);
    n_back[seq_id] = 0;
}
