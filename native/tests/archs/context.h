// a context under test: reads texts, and throws what went wrong as a sentence

#pragma once

#include "lminf.h"

#include "llama-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

using tokens = std::vector<llama_token>;
using logits = std::vector<float>;

struct context_params {
    int32_t   n_local   = 64; // 0: llama.cpp's own cache, of n_ctx tokens
    int32_t   n_global  = 4;
    int32_t   pos_bound = 0;
    int32_t   attention = LMINF_ATTENTION_AUTO;
    int32_t   n_seq     = 1;
    int32_t   n_rs_seq  = 0;
    int32_t   n_recall  = 0;
    int32_t   n_ctx     = 1024;
    int32_t   n_batch   = 64;
    int32_t   n_ubatch  = 16; // a batch is several of these
    ggml_type type      = GGML_TYPE_F32;
    bool      flash     = false;

    // sees every node of every graph before it is computed
    std::function<void(const ggml_tensor * node)> on_node;
};

class context {
public:
    context(const context &) = delete;

    context(llama_model * model, const context_params & params) :
        n_vocab(llama_vocab_n_tokens(llama_model_get_vocab(model))), outputs_all(needs_outputs(model)), on_node(params.on_node) {
        llama_context_params cp = llama_context_default_params();
        cp.n_ctx           = params.n_ctx*params.n_seq;
        cp.n_batch         = params.n_batch;
        cp.n_ubatch        = params.n_ubatch;
        cp.n_seq_max       = params.n_seq;
        cp.n_rs_seq        = params.n_rs_seq;
        cp.n_threads       = 1;
        cp.n_threads_batch = 1;
        cp.type_k          = params.type;
        cp.type_v          = params.type;
        cp.flash_attn_type = params.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        cp.kv_unified      = false;
        cp.swa_full        = false; // llama.cpp's own cache as llama-server makes it

        if (on_node) {
            cp.cb_eval = [](ggml_tensor * node, bool ask, void * self) {
                if (ask) {
                    static_cast<const context *>(self)->on_node(node);
                }
                return !ask; // whether to stop there; afterwards, to go on
            };
            cp.cb_eval_user_data = this;
        }

        if (params.n_local > 0) {
            lminf_params lp = lminf_default_params();
            lp.n_local   = params.n_local;
            lp.n_global  = params.n_global;
            lp.n_recall  = params.n_recall;
            lp.recall_distance = params.n_local; // where sinks stand
            lp.recall_index   = LMINF_RECALL_EXACT;
            lp.archive_type_k = GGML_TYPE_F32;
            lp.archive_type_v = GGML_TYPE_F32;
            lp.pos_bound = params.pos_bound;
            lp.attention = params.attention;
            ctx.reset(lminf_init_from_model(model, cp, lp));
        } else {
            ctx.reset(llama_init_from_model(model, cp));
        }
        if (!ctx) {
            throw std::runtime_error(params.n_local > 0 ? lminf_last_error() : "llama.cpp cannot make a context of its own");
        }
    }

    llama_context * get() const { return ctx.get(); }

    // reads text[i0, i1) in batches of n_step tokens; the logits after each token, or after each batch
    logits read(const tokens & text, size_t i0, size_t i1, size_t n_step, llama_seq_id seq_id = 0, bool each = true) {
        logits res;
        for (size_t i = i0; i < i1; i += n_step) {
            const size_t n = std::min(n_step, i1 - i);
            append(res, decode({ { seq_id, tokens(text.begin() + i, text.begin() + i + n) } }, each)[seq_id]);
        }
        return res;
    }

    // one batch of several sequences' tokens, in turns
    std::map<llama_seq_id, logits> decode(const std::map<llama_seq_id, tokens> & parts, bool each = true) {
        std::map<llama_seq_id, llama_pos> next;
        size_t n_longest = 0;
        size_t n_all     = 0;
        for (const auto & [seq_id, text] : parts) {
            next[seq_id] = lminf_enabled(get()) ? lminf_next_pos(get(), seq_id, text.size()) : next_pos(seq_id);
            n_longest    = std::max(n_longest, text.size());
            n_all       += text.size();
        }

        llama_batch batch = llama_batch_init(n_all, 0, 1);
        std::vector<std::pair<llama_seq_id, int32_t>> outputs;
        for (size_t i = 0; i < n_longest; ++i) {
            for (const auto & [seq_id, text] : parts) {
                if (i >= text.size()) {
                    continue;
                }
                const int32_t j = batch.n_tokens++;

                batch.token[j]     = text[i];
                batch.pos[j]       = next[seq_id]++;
                batch.n_seq_id[j]  = 1;
                batch.seq_id[j][0] = seq_id;
                const bool wanted = each || i + 1 == text.size();
                if (wanted) {
                    outputs.push_back({ seq_id, j });
                }
                batch.logits[j] = wanted || outputs_all;
            }
        }

        const int rc = llama_decode(get(), batch);
        llama_batch_free(batch);
        if (rc != 0) {
            throw std::runtime_error("llama_decode returned " + std::to_string(rc));
        }

        std::map<llama_seq_id, logits> res;
        for (const auto & [seq_id, j] : outputs) {
            const float * row = llama_get_logits_ith(get(), j);
            append(res[seq_id], logits(row, row + n_vocab));
        }
        return res;
    }

    lminf_info info(llama_seq_id seq_id = 0) const {
        lminf_info res = {};
        if (!lminf_get_info(get(), seq_id, &res)) {
            throw std::runtime_error("lminf_get_info failed: " + std::string(lminf_last_error()));
        }
        return res;
    }

    std::vector<uint8_t> save(llama_seq_id seq_id = 0, llama_state_seq_flags flags = 0) const {
        std::vector<uint8_t> res(llama_state_seq_get_size_ext(get(), seq_id, flags));
        if (llama_state_seq_get_data_ext(get(), res.data(), res.size(), seq_id, flags) != res.size() || res.empty()) {
            throw std::runtime_error("the state has another size than was said");
        }
        return res;
    }

    void restore(const std::vector<uint8_t> & state, llama_seq_id seq_id = 0, llama_state_seq_flags flags = 0) {
        if (llama_state_seq_set_data_ext(get(), state.data(), state.size(), seq_id, flags) != state.size()) {
            throw std::runtime_error("a state that was just saved cannot be restored");
        }
    }

private:
    llama_pos next_pos(llama_seq_id seq_id) const {
        return llama_memory_seq_pos_max(llama_get_memory(get()), seq_id) + 1;
    }

    // llama.cpp's graph of this one cannot be built for a part of a batch without outputs
    static bool needs_outputs(const llama_model * model) {
        char arch[64];
        llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
        return std::string(arch) == "chameleon";
    }

    static void append(logits & to, const logits & from) { to.insert(to.end(), from.begin(), from.end()); }

    llama_context_ptr ctx;

    int32_t n_vocab;
    bool    outputs_all;

    std::function<void(const ggml_tensor * node)> on_node;
};
