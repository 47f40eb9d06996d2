#include "lminf-chat-budget.h"
#include "lminf-chat-work.h"

#include <algorithm>
#include <cstdint>

// The templates of llama.cpp take a hundredth of them.
static constexpr size_t UNITS_PER_CALL = 512u << 20;
static constexpr size_t UNITS_PER_BYTE = 65536;

static constexpr size_t UNITS_BETWEEN_QUESTIONS = 4 << 20; // whether the call is cancelled: a few milliseconds

static constexpr int MAX_NESTING    = 2500; // a unit of it takes a kilobyte of stack at most
static constexpr int MAX_JSON_DEPTH = 256;

struct chat_work {
    size_t n_left     = SIZE_MAX;
    size_t n_to_ask   = SIZE_MAX; // units left at which the next question is due
    int    nesting    = 0;

    const char * failure = nullptr; // of the present call

    lminf_chat_cancelled is_cancelled = nullptr;
    void *               data         = nullptr;
};

static thread_local chat_work work;

lminf_chat_budget::lminf_chat_budget(size_t n_bytes, lminf_chat_cancelled is_cancelled, void * data) {
    work.n_left       = UNITS_PER_CALL + UNITS_PER_BYTE * std::min<size_t>(n_bytes, SIZE_MAX / UNITS_PER_BYTE / 2);
    work.n_to_ask     = work.n_left;
    work.nesting      = 0;
    work.is_cancelled = is_cancelled;
    work.data         = data;
}

lminf_chat_budget::~lminf_chat_budget() {
    work = {};
}

[[noreturn]] static void fail(const char * reason) {
    work.failure = reason;
    throw lminf_chat_too_much(reason);
}

const char * lminf_chat_failure() {
    return work.failure;
}

void lminf_chat_charge(size_t n_units) {
    if (n_units > work.n_left) {
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

lminf_chat_nesting::lminf_chat_nesting(int weight) : weight(weight) {
    if (work.nesting + weight > MAX_NESTING) {
        fail("this is nested too deep");
    }
    work.nesting += weight;
}

lminf_chat_nesting::~lminf_chat_nesting() {
    work.nesting -= weight;
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
