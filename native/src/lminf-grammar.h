// A bound on the work of llama.cpp's grammars.
//
// A grammar of a few characters can ask for any time and any memory: while it is parsed, before its first token, at
// each one. Here each call gets so many units of work; where they run out, a grammar is refused, or fails: it allows no
// token any more. What goes wrong inside a call stays inside libllama, where llama.cpp would end the process.
//
// A unit is worth a few nanoseconds, and about as many bytes. The hooks in llama-grammar.cpp count them.

#pragma once

#include "llama-grammar.h"

#include <cstddef>
#include <cstdint>
#include <utility>

// Takes units from what the present call has left. Throws std::runtime_error when there are none, or when the stack might
// not last: so whatever calls itself must charge.
void lminf_grammar_charge(size_t n_units);

// For what is repeated. Throws std::runtime_error, too, for a repetition that ends before it begins.
void lminf_grammar_charge_repetition(size_t n_elements, uint64_t min_times, uint64_t max_times);

// For a step of a stack: the rule at its top is walked, or it is compared with those that were there before.
void lminf_grammar_charge_stack(const llama_grammar_rules & rules, const llama_grammar_stack & stack, size_t n_before);

// What llama-sampler.cpp calls in place of llama_grammar_init_impl, llama_grammar_apply_impl, llama_grammar_accept_impl.

llama_grammar * lminf_grammar_init(
        const llama_vocab * vocab,
               const char * text,
               const char * root,
                       bool lazy,
              const char ** trigger_patterns,
                     size_t n_trigger_patterns,
        const llama_token * trigger_tokens,
                     size_t n_trigger_tokens); // nullptr for a grammar that is none, or too much

void lminf_grammar_apply(const llama_grammar & grammar, llama_token_data_array * candidates);
void lminf_grammar_accept(llama_grammar & grammar, llama_token token);

// What llama_grammar_reject_candidates does, for many stacks: shows each candidate only to those that may take its first
// character.
llama_grammar_candidates lminf_grammar_reject_by_char(
        const llama_grammar_rules & rules, const llama_grammar_stacks & stacks, const llama_grammar_candidates & candidates);

// Which of the candidates' first characters a class takes. What it says of ASCII is looked up where they are many.
class lminf_grammar_class {
public:
    using matcher = std::pair<bool, const llama_grammar_element *> (*)(const llama_grammar_element * pos, uint32_t chr);

    lminf_grammar_class(const llama_grammar_element * pos, matcher match, const llama_grammar_candidates & candidates);

    bool operator()(uint32_t chr) const {
        return chr < n_ascii ? takes_ascii[chr] : match(pos, chr).first;
    }

private:
    const llama_grammar_element * const pos;
    const matcher match;

    const uint32_t n_ascii;
    bool takes_ascii[128];
};
