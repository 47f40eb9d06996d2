// What llama.cpp's analysis of how a template writes calls asks of us: where their ids are.

#pragma once

#include <string>

// `sample` is the id of the analysis' own example.
template <typename Function, typename Id>
void lminf_chat_correct_ids(Function & function, Id & id, const std::string & sample) {
    using position = decltype(id.pos);
    const size_t at = function.name_prefix.find(sample);
    if (at != std::string::npos) {
        // an id before the name was taken for a part of what stands there (Solar Open)
        id.pos    = position::PRE_FUNC_NAME;
        id.prefix = function.name_prefix.substr(0, at);
        id.suffix = function.name_prefix.substr(at + sample.size());
        function.name_prefix.clear();
    } else if (id.pos == position::BETWEEN_FUNC_AND_ARGS && function.name_suffix == id.suffix) {
        // what is behind the id was expected before it, too, with a token that ends the message (Mistral Small 3.2)
        function.name_suffix.clear();
    }
}

// The parser of what stands before the name of a function.
template <typename Builder, typename Id>
auto lminf_chat_before_name(Builder & p, const std::string & name_prefix, const Id & id) {
    const bool has_id = name_prefix.empty() && id.pos == decltype(id.pos)::PRE_FUNC_NAME && !id.suffix.empty();
    return has_id ? p.literal(id.prefix) + p.tool_id(p.until(id.suffix)) + p.literal(id.suffix) : p.literal(name_prefix);
}
