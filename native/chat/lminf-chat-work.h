// A bound on the work of llama.cpp's chat library.
//
// What it is given comes from clients and from model files: templates may loop or grow strings without end, JSON and
// grammars may nest deeper than the stack reaches. Each call of lminf-chat.h gets so many units of work; where they run
// out, or where something nests too deep, it fails with lminf_chat_too_much. The hooks in common/ count.
//
// A unit is worth a few nanoseconds at most, and about as many bytes.

#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

// Not what a template's own error handling may turn into another one.
struct lminf_chat_too_much : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Takes units from what the present call has left. Throws lminf_chat_too_much when there are none, or when the call was
// cancelled.
void lminf_chat_charge(size_t n_units);

// For an array or an object of a template: chains of them are freed recursively.
inline void lminf_chat_charge_container(size_t n_items) {
    lminf_chat_charge(16384 + 64 * n_items);
}

// Throws lminf_chat_too_much for a text of JSON that nests deeper than what is done with it may recurse.
void lminf_chat_check_json(const std::string & text);

enum lminf_chat_weight {
    LMINF_CHAT_SHALLOW  = 1, // calls that need little of the stack
    LMINF_CHAT_TEMPLATE = 4, // a node of a template
};

// Held while a function calls itself. Throws lminf_chat_too_much where the stack might not last.
class lminf_chat_nesting {
public:
    explicit lminf_chat_nesting(int weight);
    ~lminf_chat_nesting();

    lminf_chat_nesting(const lminf_chat_nesting &) = delete;
    lminf_chat_nesting & operator=(const lminf_chat_nesting &) = delete;

private:
    const int weight;
};
