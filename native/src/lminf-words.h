// Words that repeat are cut into tokens once.
//
// llama.cpp's BPE tokenizer cuts a text into words by regular expressions, and joins symbols within a word only. So the
// tokens of a word are the same wherever it stands, and most words of a long text have been there before.

#pragma once

#include "llama.h"

#include <cstddef>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class lminf_words {
public:
    // Appends the tokens of the words to the output. `tokenize` does so for a vector of one word.
    template <typename F>
    void tokenize(const std::vector<std::string> & words, std::vector<llama_token> & output, F && tokenize) {
        std::vector<std::string> word(1);
        for (const auto & text : words) {
            const auto found = known.find(text);
            if (found != known.end()) {
                output.insert(output.end(), found->second.begin(), found->second.end());
                continue;
            }
            const size_t n_before = output.size();
            word[0] = text;
            tokenize(word, output);
            if (text.size() <= MAX_BYTES && known.size() < MAX_WORDS) {
                known.emplace(text, std::vector<llama_token>(output.begin() + n_before, output.end()));
            }
        }
    }

private:
    static constexpr size_t MAX_BYTES = 64;
    static constexpr size_t MAX_WORDS = 1 << 16;

    std::unordered_map<std::string, std::vector<llama_token>> known;
};
