// Words that repeat are cut into tokens once.
//
// llama.cpp's tokenizers join symbols within a word only, so the tokens of a word are the same wherever it stands, and most
// words of a long text have been there before. What a word is:
//
//   - BPE: what the vocabulary's regular expressions cut a text into.
//   - SentencePiece: what is between two places where nothing can be joined. All that such a tokenizer joins is in its
//     vocabulary; so nothing is joined across a character and a space that no token has side by side.
//
// Each word has one place, by its hash, and one that comes later takes it. So whatever the words are, looking for one costs
// the same: there are texts whose words all have the same hash.

#pragma once

#include "llama-vocab.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

// Each step of a tokenizer, some dozens of nanoseconds. Throws what lminf_tokenize catches, if that is to end.
void lminf_tokenize_go_on();

// The words of one text.
class lminf_words {
public:
    // Appends the tokens of the words to the output. `tokenize` does so for a vector of one word.
    template <typename F>
    void tokenize(const std::vector<std::string> & words, std::vector<llama_token> & output, F && tokenize) {
        make_room(words.size());
        std::vector<std::string> word(1);
        for (const auto & text : words) {
            lminf_tokenize_go_on();
            auto & place = place_of(text);
            if (place.text == text) {
                output.insert(output.end(), place.tokens.begin(), place.tokens.end());
                continue;
            }
            const size_t n_before = output.size();
            word[0] = text;
            tokenize(word, output);
            if (text.size() <= MAX_BYTES) {
                place.text = text;
                place.tokens.assign(output.begin() + n_before, output.end());
            }
        }
    }

private:
    static constexpr size_t MAX_BYTES  = 64;
    static constexpr size_t MAX_PLACES = 1 << 16;

    struct known_word { // none: the empty word, which has no tokens
        std::string text;
        std::vector<llama_token> tokens;
    };

    std::vector<known_word> places = std::vector<known_word>(1);
    size_t n_words = 0; // that were looked for

    known_word & place_of(const std::string & text) {
        return places[std::hash<std::string>()(text) & (places.size() - 1)];
    }

    void make_room(size_t n_new) {
        n_words += n_new;
        size_t n_places = places.size();
        while (n_places < std::min(n_words, MAX_PLACES)) {
            n_places *= 2;
        }
        if (n_places > places.size()) {
            auto before = std::exchange(places, std::vector<known_word>(n_places));
            for (auto & word : before) {
                place_of(word.text) = std::move(word);
            }
        }
    }
};

// Where the texts of a SentencePiece vocabulary can be cut. For several threads.
class lminf_seams {
public:
    // `text` has its spaces as the vocabulary has them
    std::vector<std::string> split(const llama_vocab & vocab, const std::string & text) {
        std::call_once(is_found, [&]() { find(vocab); });
        std::vector<std::string> words;
        size_t start = 0;
        for (size_t at = 0; (at = text.find(SPACE, at)) != std::string::npos; at += SPACE.size()) {
            if (at > start && can_end[static_cast<unsigned char>(text[at - 1])]) {
                words.push_back(text.substr(start, at - start));
                start = at;
            }
        }
        if (start < text.size()) {
            words.push_back(text.substr(start));
        }
        return words;
    }

private:
    const std::string SPACE = "\xe2\x96\x81";

    std::once_flag is_found;
    std::array<bool, 256> can_end {}; // by the last byte of a word

    void find(const llama_vocab & vocab) {
        for (int c = '!'; c <= '~'; ++c) {
            can_end[c] = true;
        }
        for (llama_token token = 0; token < (llama_token) vocab.n_tokens(); ++token) {
            const auto & text = vocab.get_token_data(token).text;
            for (size_t at = 0; (at = text.find(SPACE, at)) != std::string::npos; at += SPACE.size()) {
                if (at > 0) {
                    can_end[static_cast<unsigned char>(text[at - 1])] = false;
                }
            }
        }
    }
};
