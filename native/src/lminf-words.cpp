#include "lminf-words.h"

#include "lminf.h"

#include <cstdint>

static constexpr uint32_t STEPS_BETWEEN_QUESTIONS = 1 << 16; // a few milliseconds

struct cancelled {};

struct question {
    lminf_is_cancelled is_cancelled = nullptr;
    void *             data         = nullptr;
    uint32_t           n_steps      = 0;
};

static thread_local question asked;

void lminf_tokenize_go_on() {
    if (asked.is_cancelled && ++asked.n_steps % STEPS_BETWEEN_QUESTIONS == 0 && asked.is_cancelled(asked.data)) {
        throw cancelled();
    }
}

int32_t lminf_tokenize(
        const llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special, lminf_is_cancelled is_cancelled, void * data) {
    int32_t n_tokens = INT32_MIN;
    asked = { is_cancelled, data, 0 };
    try {
        n_tokens = llama_tokenize(vocab, text, text_len, tokens, n_tokens_max, add_special, parse_special);
    } catch (const cancelled &) {
    } catch (...) {
        asked = {};
        throw;
    }
    asked = {};
    return n_tokens;
}
