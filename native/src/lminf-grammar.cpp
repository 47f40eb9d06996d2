#include "lminf-grammar.h"

#include "lminf.h"

#include "llama-grammar.h"
#include "llama-impl.h"

#include <cmath>
#include <cstdint>
#include <exception>
#include <stdexcept>

// An enumeration of 3000 words takes most of them, a schema of 200 fields or a grammar of C a tenth; classes of many
// ranges take up to fifty for each candidate. All of them are spent in a few tens of milliseconds.
static constexpr size_t UNITS_PER_GRAMMAR   = 4 << 20;
static constexpr size_t UNITS_PER_TOKEN     = 3 << 20;
static constexpr size_t UNITS_PER_CANDIDATE = 64;

static constexpr int MAX_NESTING = 5000; // 1250 parentheses: schemas with maxLength 1000 nest so deep

struct grammar_work {
    size_t n_left  = SIZE_MAX;
    int    nesting = 0;
    bool   overran = false;
};

static thread_local grammar_work work;

namespace {

// The units of one call.
struct grammar_budget {
    explicit grammar_budget(size_t n_units) {
        work = { n_units, 0, false };
    }

    ~grammar_budget() {
        work.n_left = SIZE_MAX;
    }
};

} // namespace

[[noreturn]] static void overrun() {
    work.overran = true;
    throw std::runtime_error("the grammar takes too much work");
}

void lminf_grammar_charge(size_t n_units) {
    if (n_units > work.n_left) {
        overrun();
    }
    work.n_left -= n_units;
}

lminf_grammar_nesting::lminf_grammar_nesting(int weight) : weight(weight) {
    if (work.nesting + weight > MAX_NESTING) {
        overrun();
    }
    work.nesting += weight;
}

lminf_grammar_nesting::~lminf_grammar_nesting() {
    work.nesting -= weight;
}

llama_grammar * lminf_grammar_init(
        const llama_vocab * vocab,
               const char * text,
               const char * root,
                       bool lazy,
              const char ** trigger_patterns,
                     size_t n_trigger_patterns,
        const llama_token * trigger_tokens,
                     size_t n_trigger_tokens) {
    grammar_budget budget(UNITS_PER_GRAMMAR);
    try {
        return llama_grammar_init_impl(
                vocab, text, root, lazy, trigger_patterns, n_trigger_patterns, trigger_tokens, n_trigger_tokens);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return nullptr;
    }
}

// A grammar has failed when it has no stack: it allows no token.
void lminf_grammar_apply(const llama_grammar & grammar, llama_token_data_array * candidates) {
    grammar_budget budget(UNITS_PER_TOKEN + UNITS_PER_CANDIDATE * candidates->size);
    try {
        llama_grammar_apply_impl(grammar, candidates);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        for (size_t i = 0; i < candidates->size; ++i) {
            candidates->data[i].logit = -INFINITY;
        }
    }
}

void lminf_grammar_accept(llama_grammar & grammar, llama_token token) {
    grammar_budget budget(UNITS_PER_TOKEN);
    try {
        llama_grammar_accept_impl(grammar, token);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        grammar.stacks.clear();
        grammar.awaiting_trigger = false;
    }
}

bool lminf_grammar_overran(void) {
    return work.overran;
}
