// which adapter a token is computed with (Granite Switch). llama.cpp's model has a layer for it, whose one head attends to
// all tokens so far: adapters' own tokens score router_gain and have their adapter's number as value, all others score as
// much below 0 and have 0. So it is a mean, which follows from how many there were of each: a state of constant size, and
// like a recurrent layer a router sees every token once. Unlike one it can be taken back, as counts are kept at each token
// of an adapter.

#pragma once

#include "llama.h"

#include <memory>
#include <vector>

struct llama_model;
struct llama_model_granite_switch;

class lminf_router {
public:
    // of one sequence, at a token that turns an adapter on: how many there were up to it, and the sum of their numbers
    struct mark {
        int64_t index; // in the stream
        int64_t n;
        int64_t sum;
    };

    // NULL if the model has no router
    static std::unique_ptr<lminf_router> create(const llama_model & model, uint32_t n_seq_max);

    // a token has this index in the stream, after all that are there
    void append(llama_seq_id seq_id, int64_t index, llama_token token);

    // tokens from this index on are gone
    void truncate(llama_seq_id seq_id, int64_t index);

    // truncate will not be called with less: what led to there is not needed any more
    void settle(llama_seq_id seq_id, int64_t index);

    // the first index that truncate can be called with, but for 0
    int64_t truncate_min(llama_seq_id seq_id) const;

    void copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) { marks[seq_id_dst] = marks[seq_id_src]; }

    // what the router's attention gives for the token with this index
    float get(llama_seq_id seq_id, int64_t index) const;

    const std::vector<mark> & get_marks(llama_seq_id seq_id) const { return marks[seq_id]; }

    // false, and nothing changed, if a stream of n tokens cannot have these
    bool set_marks(llama_seq_id seq_id, std::vector<mark> all, int64_t n_tokens);

private:
    lminf_router(const llama_model_granite_switch & model, uint32_t n_seq_max) : model(model), marks(n_seq_max) {}

    const llama_model_granite_switch & model;

    std::vector<std::vector<mark>> marks; // [n_seq_max], of each sequence in the stream's order
};
