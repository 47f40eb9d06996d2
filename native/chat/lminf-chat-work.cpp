#include "lminf-chat-budget.h"
#include "lminf-chat-work.h"

#include "lminf-stack.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

// The templates of llama.cpp take a hundredth of them.
static constexpr size_t UNITS_PER_CALL = 512u << 20;
static constexpr size_t UNITS_PER_BYTE = 65536;

static constexpr size_t UNITS_BETWEEN_QUESTIONS = 4 << 20; // whether the call is cancelled: a few milliseconds

static constexpr size_t MAX_STACK      = 1 << 20; // bytes: threads have two million at least, other callers some of them
static constexpr int    MAX_JSON_DEPTH = 256;

struct chat_work {
    size_t    n_left    = SIZE_MAX;
    size_t    n_to_ask  = SIZE_MAX; // units left at which the next question is due
    uintptr_t stack_end = 0;

    lminf_chat_cancelled is_cancelled = nullptr;
    void *               data         = nullptr;
};

static thread_local chat_work work;

lminf_chat_budget::lminf_chat_budget(size_t n_bytes, lminf_chat_cancelled is_cancelled, void * data) {
    work.n_left       = UNITS_PER_CALL + UNITS_PER_BYTE * std::min<size_t>(n_bytes, SIZE_MAX / UNITS_PER_BYTE / 2);
    work.n_to_ask     = work.n_left;
    work.stack_end    = lminf_stack_here() - MAX_STACK;
    work.is_cancelled = is_cancelled;
    work.data         = data;
}

lminf_chat_budget::~lminf_chat_budget() {
    work = {};
}

[[noreturn]] static void fail(const char * reason) {
    throw lminf_chat_too_much { reason };
}

void lminf_chat_charge(size_t n_units) {
    if (lminf_stack_here() < work.stack_end) {
        fail("this is nested too deep");
    }
    if (n_units > work.n_left) {
        work.n_left = 0; // whatever catches it
        fail("this takes too much work");
    }
    work.n_left -= n_units;
    if (work.is_cancelled && work.n_left < work.n_to_ask) {
        work.n_to_ask = work.n_left - std::min(work.n_left, UNITS_BETWEEN_QUESTIONS);
        if (work.is_cancelled(work.data)) {
            fail("cancelled");
        }
    }
}

void lminf_chat_check_json(const std::string & text) {
    lminf_chat_charge(8 * text.size());
    int  depth     = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\';
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > MAX_JSON_DEPTH) {
                fail("this JSON is nested too deep");
            }
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
}

void lminf_chat_charge_replacement(const std::string & text, const std::string & from, const std::string & to) {
    if (from.empty()) {
        lminf_chat_charge(text.size() * std::min(1 + to.size(), SIZE_MAX / (1 + text.size())));
        return;
    }
    for (size_t pos = 0; (pos = text.find(from, pos)) != std::string::npos; pos += from.size()) {
        const size_t n_moved = from.size() == to.size() ? 0 : text.size() - pos;
        lminf_chat_charge(16 + to.size() + n_moved / 8);
    }
}

// --- values of templates ----------------------------------------------------------------------------------------------

struct freed_value {
    void * value;
    void (*destroy)(void * value);
};

static thread_local std::vector<freed_value> freed_values;
static thread_local bool is_freeing = false;

void lminf_chat_free_value(void * value, void (*destroy)(void * value)) {
    if (is_freeing) {
        try {
            freed_values.push_back({ value, destroy });
        } catch (const std::exception &) {
            destroy(value); // no memory: the stack may last
        }
        return;
    }
    is_freeing = true;
    destroy(value);
    while (!freed_values.empty()) {
        const auto next = freed_values.back();
        freed_values.pop_back();
        next.destroy(next.value);
    }
    is_freeing = false;
}
