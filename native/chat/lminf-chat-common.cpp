// The few functions of common/common.h and common/log.h that the chat library uses. Theirs would bring in downloads,
// speculative decoding and a thread that logs.

#include "common.h"
#include "log.h"

#include <stdexcept>

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); ++i) {
        joined += (i ? separator : "") + values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t start = 0;
    for (size_t end; (end = str.find(delimiter, start)) != std::string::npos; start = end + delimiter.size()) {
        parts.push_back(str.substr(start, end - start));
    }
    parts.push_back(str.substr(start));
    return parts;
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string repeated;
    for (size_t i = 0; i < n; ++i) {
        repeated += str;
    }
    return repeated;
}

void string_replace_all(std::string & s, const std::string & search, const std::string & replace) {
    if (search.empty()) {
        return;
    }
    std::string replaced;
    size_t start = 0;
    for (size_t at; (at = s.find(search, start)) != std::string::npos; start = at + search.size()) {
        replaced.append(s, start, at - start);
        replaced += replace;
    }
    s = replaced.append(s, start);
}

std::vector<llama_token> common_tokenize(const llama_vocab * vocab, const std::string & text, bool add_special, bool parse_special) {
    std::vector<llama_token> tokens(text.size() + 16);
    const int32_t n = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), add_special, parse_special);
    if (n < 0) {
        throw std::runtime_error("a text of the template cannot be tokenized");
    }
    tokens.resize(n);
    return tokens;
}

std::string common_token_to_piece(const llama_vocab * vocab, llama_token token, bool special) {
    std::string piece(64, '\0');
    int32_t n = llama_token_to_piece(vocab, token, piece.data(), piece.size(), 0, special);
    if (n < 0) {
        piece.resize(-n);
        n = llama_token_to_piece(vocab, token, piece.data(), piece.size(), 0, special);
    }
    piece.resize(n);
    return piece;
}

// What the library logs: nothing, as it throws what goes wrong.

int common_log_get_verbosity_thold() {
    return LOG_LEVEL_ERROR;
}

common_log * common_log_main() {
    return nullptr;
}

void common_log_add(common_log *, ggml_log_level, const char *, ...) {}
