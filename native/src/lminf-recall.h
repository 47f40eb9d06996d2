// recall: for each layer the tokens that have left the window which its queries look for most, as further rows of the sinks
//
//   candidates   tokens j of the archive with n_global <= j <= p0 - n_local, p0 the first of the micro-batch: every one of its
//                queries has them behind its window
//   vote(j)      sum over heads h and queries i of softmax over the candidates of K[j] · q[h, i], K un-rotated as it is stored and q
//                rotated to recall_distance. The queries are the micro-batch's last n_votes.
//   hit          the candidate with the largest sum over its neighbors i, itself too, of vote(i)*(1 - |i - j|/n_near), ties to the lower j
//   chosen       the hit and the tokens around it, n_span = 16 of the stream, from 8 before it to 7 after; then the same with the hit
//                among those not chosen yet, until there are n_recall
//   left out     a hit, and the n_span tokens around it, if these read the same as n_span around a token less than n_near from an
//                earlier hit: until there are no others
//   confidence   the sum over those chosen of the softmax above, of the head that has the largest, in the mean over the voting queries.
//                log(min(1, confidence/sure)) is added to their scores: of many tokens some are like what is looked for by chance,
//                but not much more than others that are left out
//
// With the paper's rule each query head h of the newest query of a batch chooses for itself, by K[j] · q[h] alone.
//
// A layer's choice is a chain of nodes on the CPU, one for each phase, as a phase needs what all threads found in the one
// before. They are ggml's custom operations: no backend needs to know them. What they work on is filled in with the inputs.

#pragma once

#include "lminf-archive.h"
#include "lminf-params.h"

#include <functional>
#include <memory>
#include <vector>

// one sequence's part of a micro-batch
struct lminf_recall_seq {
    lminf_archive * archive = nullptr;

    int64_t index    = 0; // of its first token in the stream
    int64_t n_tokens = 0;

    std::vector<lminf_archive::range> candidates;

    int64_t n_candidates = 0;
    int64_t n_chosen     = 0;    // rows that are filled, in every layer
    bool    chooses      = true; // else what was chosen last time is taken again
};

// what a sequence chose last, so that several tokens can do with one choice
struct lminf_recall_choice {
    int64_t index    = 0; // of the token that chose
    int64_t n_tokens = 0; // that it has served; 0: none yet
    int64_t n_chosen = 0;
    int64_t n_changes = 0; // of the archive, that took tokens away

    // [n_layer][n_head_kv, or 1 where all heads have the same][n_chosen], indices of tokens
    std::vector<std::vector<std::vector<int64_t>>> tokens;

    std::vector<float> log_confidence; // [n_layer]
};

class lminf_recall {
public:
    lminf_recall(const lminf_cparams & params, std::shared_ptr<const lminf_archive_layout> layout, uint32_t n_seq_max);

    lminf_archive       & get_archive(llama_seq_id seq_id)       { return archives[seq_id]; }
    const lminf_archive & get_archive(llama_seq_id seq_id) const { return archives[seq_id]; }

    // at most this many are recalled for the sequence from now on; with the paper's rule all or none
    void    set_n_recall(llama_seq_id seq_id, int32_t n_recall) { n_recalls[seq_id] = n_recall; }
    int32_t get_n_recall(llama_seq_id seq_id) const             { return n_recalls[seq_id]; }

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    lminf_archive new_archive() const { return lminf_archive(layout, params.n_archive); }

    const lminf_archive_layout & get_layout() const { return *layout; }

    // queries of a micro-batch that vote, the last ones
    static constexpr int64_t n_votes = 32;

    // tokens that are recalled together, and how far a vote reaches
    static constexpr int64_t n_span = 16;
    static constexpr int64_t n_near = 8;

    // a layer that is at least this confident in what it recalls attends to it as to the window
    static constexpr double sure = 0.125;

    // where there are no more candidates than this, all are looked at
    static constexpr int64_t n_all = 2048;

    const lminf_cparams params;

private:
    friend class  lminf_recall_batch;
    friend struct lminf_recall_layer;

    std::shared_ptr<const lminf_archive_layout> layout;

    // [n_seq_max]
    std::vector<lminf_archive>       archives;
    std::vector<lminf_recall_choice> choices;
    std::vector<int32_t>             n_recalls;
};

// one layer's operation, what its nodes share; and what they find on their way, which the next layer uses again
struct lminf_recall_layer;
struct lminf_recall_work;

// what the nodes of one graph work on; filled for every micro-batch
class lminf_recall_batch {
public:
    lminf_recall_batch(lminf_recall & recall, int64_t n_stream);
    ~lminf_recall_batch();

    //   is_last  the micro-batch is the last of its batch
    void set_seq(int64_t stream, llama_seq_id seq_id, int64_t index, int64_t n_tokens, int32_t n_global, bool is_last);

    const lminf_recall_seq & get_seq(int64_t stream) const { return seqs[stream]; }

    // stores a layer's new tokens: k [n_embd_head_k, n_head_kv, n_tokens] un-rotated, v [n_embd_head_v, n_head_kv, n_tokens] or NULL
    // with MLA, both F32. The result has no contents.
    ggml_tensor * build_store(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, int il);

    // a layer's rows, those recalled in front of the sinks, F16 or F32: [n_embd_k_gqa + n_embd_v_gqa, n_rows + n_sink_rows, n_stream]
    //   q               F32 [n_embd_head_k, n_head, n_tokens] at recall_distance
    //   k_sink, v_sink  [n_embd_gqa, n_sink_rows, n_stream] or NULL; v_sink also NULL with MLA
    //   stored          what build_store made of the layer's keys
    //   on_cpu          called for each node
    ggml_tensor * build_rows(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k_sink, ggml_tensor * v_sink, ggml_tensor * stored,
            ggml_type type, int64_t n_rows, float scale, float logit_softcap, int il, const std::function<void(ggml_tensor *)> & on_cpu);

    // what is added to the scores of the layer whose rows were built last, F32 [n_columns, 1, 1, n_stream]: its confidence in what it
    // recalls, for the columns of that
    ggml_tensor * build_confidence(ggml_context * ctx, int64_t n_columns, const std::function<void(ggml_tensor *)> & on_cpu);

private:
    friend struct lminf_recall_layer;

    lminf_recall & recall;

    std::vector<lminf_recall_seq>    seqs;    // [n_stream]
    std::vector<llama_seq_id>        seq_ids; // [n_stream]

    std::vector<std::unique_ptr<lminf_recall_work>>  works; // [n_stream]
    std::vector<std::unique_ptr<lminf_recall_layer>> layers;
};
