#include "lminf-grammar.h"

#include "lminf-stack.h"
#include "lminf.h"

#include "llama-grammar.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <unordered_map>
#include <utility>

// An enumeration of 3000 words takes most of them, a schema of 200 fields or a grammar of C a tenth; classes of many
// ranges take up to fifty for each candidate. All of them are spent in a few tens of milliseconds.
static constexpr size_t UNITS_PER_GRAMMAR   = 4 << 20;
static constexpr size_t UNITS_PER_TOKEN     = 3 << 20;
static constexpr size_t UNITS_PER_CANDIDATE = 64;

// Bytes: threads have two million at least, other callers some of them. Schemas with maxLength 1000 nest as many parentheses.
static constexpr size_t MAX_STACK = 1 << 20;

struct grammar_work {
    size_t    n_left    = SIZE_MAX;
    uintptr_t stack_end = 0;
    bool      overran   = false;
};

static thread_local grammar_work work;

namespace {

// The units of one call.
struct grammar_budget {
    explicit grammar_budget(size_t n_units) {
        work = { n_units, lminf_stack_here() - MAX_STACK, false };
    }

    ~grammar_budget() {
        work.n_left    = SIZE_MAX;
        work.stack_end = 0;
    }
};

} // namespace

[[noreturn]] static void overrun() {
    work.overran = true;
    throw std::runtime_error("the grammar takes too much work");
}

void lminf_grammar_charge(size_t n_units) {
    if (n_units > work.n_left || lminf_stack_here() < work.stack_end) {
        overrun();
    }
    work.n_left -= n_units;
}

void lminf_grammar_charge_repetition(size_t n_elements, uint64_t min_times, uint64_t max_times) {
    if (max_times < min_times) {
        throw std::runtime_error("a repetition ends before it begins");
    }
    lminf_grammar_charge((8 * n_elements + 32) * (1 + max_times));
}

void lminf_grammar_charge_stack(const llama_grammar_rules & rules, const llama_grammar_stack & stack, size_t n_before) {
    const auto * pos = stack.back();
    lminf_grammar_charge(pos->type == LLAMA_GRETYPE_RULE_REF
        ? rules[pos->value].size()
        : n_before * (1 + stack.size() / 8) / 2);
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
    return std::exchange(work.overran, false);
}

llama_grammar_candidates lminf_grammar_reject_by_char(
        const llama_grammar_rules & rules, const llama_grammar_stacks & stacks, const llama_grammar_candidates & candidates) {
    std::unordered_map<uint32_t, std::vector<const llama_grammar_stack *>> taking_one; // by the one character
    std::vector<const llama_grammar_stack *> others;
    for (const auto & stack : stacks) {
        const auto * pos = stack.empty() ? nullptr : stack.back();
        if (pos && pos->type == LLAMA_GRETYPE_CHAR && pos->value != 0 &&
                pos[1].type != LLAMA_GRETYPE_CHAR_RNG_UPPER && pos[1].type != LLAMA_GRETYPE_CHAR_ALT) {
            taking_one[pos->value].push_back(&stack);
        } else {
            others.push_back(&stack);
        }
    }

    std::unordered_map<uint32_t, llama_grammar_candidates> groups;
    for (const auto & tok : candidates) {
        groups[*tok.code_points].push_back(tok);
    }
    lminf_grammar_charge(16 * stacks.size() + 8 * candidates.size());

    llama_grammar_candidates rejects;
    for (auto & [chr, group] : groups) {
        auto show = [&, chr = chr](const llama_grammar_stack * stack) {
            if (!group.empty()) {
                group = llama_grammar_reject_candidates_for_stack(rules, *stack, group);
            }
        };
        const auto found = taking_one.find(chr);
        if (chr == 0) { // at the end of a token, which may have the beginning of a character left
            for (const auto & stack : stacks) {
                show(&stack);
            }
        } else {
            if (found != taking_one.end()) {
                std::for_each(found->second.begin(), found->second.end(), show);
            }
            std::for_each(others.begin(), others.end(), show);
        }
        rejects.insert(rejects.end(), group.begin(), group.end());
    }
    return rejects;
}

lminf_grammar_class::lminf_grammar_class(
        const llama_grammar_element * pos, matcher match, const llama_grammar_candidates & candidates) :
        pos(pos), match(match), n_ascii(candidates.size() > 256 ? 128 : 0) {
    const size_t n_elements = match(pos, 0).second - pos;
    const size_t n_walked   = n_ascii + std::count_if(candidates.begin(), candidates.end(), [this](const auto & tok) {
        return *tok.code_points >= n_ascii;
    });
    lminf_grammar_charge(n_walked * (1 + n_elements / 4));
    for (uint32_t chr = 0; chr < n_ascii; ++chr) {
        takes_ascii[chr] = match(pos, chr).first;
    }
}
