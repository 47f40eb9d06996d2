// A conversation is rendered once.
//
// llama.cpp's chat library renders all messages three times: once for the prompt, then with and without
// `add_generation_prompt`, to find out where the answer begins.

#pragma once

#include <string>

class common_json;

namespace jinja {
struct context;
struct program;
}

// What a template writes; `inputs` are its variables. Within a call of lminf-chat.h it is remembered: the same inputs give
// the same text, and where they differ in `add_generation_prompt` only, what stands before its first use is not executed
// again. (The inputs are taken apart.)
std::string lminf_chat_render(
        jinja::context & ctx, const jinja::program & prog, const std::string & source, common_json & inputs, bool mark_input);

// While there is one, the thread remembers.
struct lminf_chat_memory {
    lminf_chat_memory();
    ~lminf_chat_memory();

    lminf_chat_memory(const lminf_chat_memory &) = delete;
    lminf_chat_memory & operator=(const lminf_chat_memory &) = delete;
};
