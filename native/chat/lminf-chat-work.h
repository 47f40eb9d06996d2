// A bound on the work of llama.cpp's chat library.
//
// What it is given comes from clients and from model files: templates may loop or grow strings without end, JSON and
// grammars may nest deeper than the stack reaches. Each call of lminf-chat.h gets so many units of work and so much of the
// stack; where one of them runs out, it fails with lminf_chat_too_much. The hooks in common/ count.
//
// A unit is worth a few nanoseconds at most, and about as many bytes.

#pragma once

#include "lminf-chat-calls.h"  // the other hooks in common/
#include "lminf-chat-hash.h"
#include "lminf-chat-parsers.h"
#include "lminf-chat-render.h"
#include "lminf-chat-schema.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

// No std::exception: the library catches those, to go on or to say something else.
struct lminf_chat_too_much {
    std::string reason;
};

// Takes units from what the present call has left. Throws lminf_chat_too_much when there are none, when the stack might not
// last (so whatever calls itself must charge), or when the call was cancelled.
void lminf_chat_charge(size_t n_units);

// Throws lminf_chat_too_much for a text of JSON that nests deeper than what is done with it may recurse.
void lminf_chat_check_json(const std::string & text);

// For all replacements in a text, done one after the other in place.
void lminf_chat_charge_replacement(const std::string & text, const std::string & from, const std::string & to);

// --- repeated work ----------------------------------------------------------------------------------------------------

// What `make` returns for a key; the first time, it is called.
template <typename Made, typename Key, typename F>
auto lminf_chat_once(Made & made, const Key & key, F && make) {
    lminf_chat_charge(128);
    auto found = made.find(key);
    if (found == made.end()) {
        auto value = make(); // which may add others
        found = made.emplace(key, std::move(value)).first;
    }
    return found->second;
}

// --- values of templates ----------------------------------------------------------------------------------------------

// Values that hold each other are freed one after the other: in place, the calls would nest as deep as they do.
void lminf_chat_free_value(void * value, void (*destroy)(void * value));

template <typename T, typename... Args>
std::shared_ptr<T> lminf_chat_made(Args &&... args) {
    std::shared_ptr<T> made(new T(std::forward<Args>(args)...), [](T * value) {
        lminf_chat_free_value(value, [](void * freed) { delete static_cast<T *>(freed); });
    });
    lminf_chat_charge(sizeof(T) + 64 + 32 * made->val_arr.size() + 128 * made->val_obj.size() + made->val_str.length());
    return made;
}

// For a function that looks at each part of its arguments.
template <typename Values>
void lminf_chat_charge_values(const Values & values) {
    for (const auto & value : values) {
        lminf_chat_charge(16 * (value->val_arr.size() + value->val_obj.size()));
    }
}

// For spaces, or a text, before each line.
template <typename Value>
void lminf_chat_charge_indent(const Value & text, const Value & width) {
    const auto input    = text.val_str.str();
    const auto n_spaces = width.is_numeric() ? std::max<int64_t>(width.as_int(), 0) : static_cast<int64_t>(width.val_str.length());
    const auto n_lines  = 2 + std::count(input.begin(), input.end(), '\n');
    lminf_chat_charge(static_cast<size_t>(n_lines) * std::min<size_t>(n_spaces, SIZE_MAX / n_lines));
}
