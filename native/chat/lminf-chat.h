// llama.cpp's chat library as C functions: texts of JSON in, texts of JSON out, all in UTF-8.
//
// Each call's work is bounded (lminf-chat-work.h). No exception leaves a function: what goes wrong is a result
// {"error": "a reason"}, with "too_much": true where it was the bound. Texts that are returned must be freed with
// lminf_chat_free_text. Objects may be used by one thread at a time, templates by any number of them.

#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef _WIN32
#    define LMINF_CHAT_API __declspec(dllexport)
#else
#    define LMINF_CHAT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct lminf_chat;        // the templates of a model
struct lminf_chat_parser; // an answer that is being written

typedef bool (*lminf_chat_cancelled)(void * data);

LMINF_CHAT_API void lminf_chat_free_text(char * text);

// The templates of a model, or the text given for them. Without a model, bos and eos are its tokens' texts. Returns
// nullptr and an error.
LMINF_CHAT_API struct lminf_chat * lminf_chat_init(
        const struct llama_model * model, const char * text, const char * bos, const char * eos, char ** error);
LMINF_CHAT_API void lminf_chat_free(struct lminf_chat * chat);

// {"source", "tool_source", "explicit", "caps": {...}, "thinks"}
LMINF_CHAT_API char * lminf_chat_info(const struct lminf_chat * chat);

// A conversation to a prompt and what its answer needs. The request:
//   messages, tools, tool_choice ("auto", "required", "none"), parallel_tool_calls, add_generation_prompt,
//   continue_final_message (true, "content", "reasoning_content"), reasoning_format, enable_thinking, json_schema,
//   template_kwargs (an object)
// The result:
//   generation_prompt (the prompt's end, which the answer's grammar and parser begin with), grammar, grammar_lazy,
//   triggers ([{"type", "value"}]), preserved_tokens, stops, thinking_start, thinking_ends,
//   parser (for lminf_chat_parser_init)
// Long texts stay out of the JSON, which reads and writes them letter by letter: contents[i], if it is not null, is the
// content of messages[i]; the prompt is a text of its own, of n_prompt bytes (null where the result is an error).
LMINF_CHAT_API char * lminf_chat_apply(
        const struct lminf_chat * chat, const char * request, const char * const * contents, size_t n_contents,
        char ** prompt, size_t * n_prompt, lminf_chat_cancelled is_cancelled, void * data);

// `parser` is what lminf_chat_apply returned. Returns nullptr and an error.
LMINF_CHAT_API struct lminf_chat_parser * lminf_chat_parser_init(const char * parser, char ** error);
LMINF_CHAT_API void lminf_chat_parser_free(struct lminf_chat_parser * parser);

// The message in all of a text, which more may follow if it is partial:
//   {"content", "reasoning_content", "tool_calls": [{"id", "name", "arguments"}]}
LMINF_CHAT_API char * lminf_chat_parse(struct lminf_chat_parser * parser, const char * text, bool is_partial);

// {"grammar"} of a JSON schema
LMINF_CHAT_API char * lminf_chat_schema(const char * schema, lminf_chat_cancelled is_cancelled, void * data);

// The part of a sampler chain that holds an answer to its grammar and its thoughts to their budget: {"grammar",
// "grammar_lazy", "grammar_has_prompt" (whether it begins with the generation prompt), "triggers", "generation_prompt",
// "budget" (tokens, -1: none), "budget_message", "thinking_start", "thinking_ends"}. The grammar's work is bounded by
// libllama. Returns nullptr and an error.
LMINF_CHAT_API struct llama_sampler * lminf_chat_sampler_init(
        const struct llama_vocab * vocab, const char * params, char ** error);

#ifdef __cplusplus
}
#endif
