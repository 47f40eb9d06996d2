#include "lminf-chat.h"

#include "lminf-chat-budget.h"
#include "lminf-chat-json.h"

#include "lminf.h"

#include "common.h"
#include "json.h"
#include "reasoning-budget.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <regex>
#include <string>
#include <utility>
#include <vector>

// llama.cpp's lazy grammar searches all of the text before its trigger at each token. Here it is shown the last bytes of
// it, and only when a trigger is among them; no trigger is longer.
static constexpr size_t MAX_SHOWN = 1024;

using sampler_ptr = std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)>;

static sampler_ptr owned(llama_sampler * sampler) {
    return sampler_ptr(sampler, llama_sampler_free);
}

namespace {

struct trigger {
    std::string pattern;
    std::string word;  // "" if it is a pattern
    std::regex  regex; // of a pattern
    bool        is_whole; // anchored to both ends of the text
};

struct chat_sampler {
    const llama_vocab *  vocab;
    std::string          grammar_text;
    std::vector<trigger> triggers;
    bool                 is_lazy;

    sampler_ptr grammar  = owned(nullptr);
    sampler_ptr thoughts = owned(nullptr);

    // of a lazy grammar
    bool        is_awaiting = false;
    bool        is_cut      = false; // whether the text had to lose its beginning
    std::string text;                // that it has not been shown

    std::deque<std::pair<llama_token, size_t>> recent; // the text's tokens, and their bytes

    bool has_failed = false; // no token is allowed any more

    bool grammar_applies() const {
        if (!grammar) {
            return false;
        }
        if (!is_lazy || !thoughts) {
            return true;
        }
        const auto state = common_reasoning_budget_get_state(thoughts.get());
        return state == REASONING_BUDGET_IDLE || state == REASONING_BUDGET_DONE;
    }

    void make_grammar() {
        if (!is_lazy) {
            grammar = owned(llama_sampler_init_grammar(vocab, grammar_text.c_str(), "root"));
        } else {
            std::vector<const char *> patterns;
            for (const auto & each : triggers) {
                patterns.push_back(each.pattern.c_str());
            }
            grammar = owned(llama_sampler_init_grammar_lazy_patterns(
                vocab, grammar_text.c_str(), "root", patterns.data(), patterns.size(), nullptr, 0));
        }
        if (!grammar) {
            throw std::runtime_error(lminf_grammar_overran()
                ? "the grammar takes too much work: give tools and schemas fewer optional parts, repetitions and alternatives"
                : "llama.cpp cannot use the grammar of this template and these tools");
        }
    }

    // Where in the text a trigger begins, npos if it is not there.
    size_t find(const trigger & each, size_t n_new) const {
        if (!each.word.empty()) {
            const size_t n_tail = std::min(text.size(), n_new + each.word.size());
            return text.find(each.word, text.size() - n_tail);
        }
        std::smatch match;
        if (each.is_whole) {
            return !is_cut && std::regex_match(text, match, each.regex) ? 0 : std::string::npos;
        }
        const auto flags = is_cut ? std::regex_constants::match_not_bol : std::regex_constants::match_default;
        return std::regex_search(text, match, each.regex, flags) ? match.position(0) : std::string::npos;
    }

    void accept_in_grammar(llama_token token) {
        if (!is_awaiting) {
            llama_sampler_accept(grammar.get(), token);
            return;
        }
        const std::string piece = common_token_to_piece(vocab, token, true);
        recent.emplace_back(token, piece.size());
        text += piece;
        for (const auto & each : triggers) {
            size_t at = find(each, piece.size());
            if (at == std::string::npos) {
                continue;
            }
            is_awaiting = false;
            for (const auto & [shown, n_bytes] : recent) {
                if (at < n_bytes) {
                    llama_sampler_accept(grammar.get(), shown); // it finds the trigger again, inside of its token
                    at = 0;
                } else {
                    at -= n_bytes;
                }
            }
            recent.clear();
            text.clear();
            return;
        }
        while (text.size() > MAX_SHOWN && recent.size() > 1) {
            text.erase(0, recent.front().second);
            recent.pop_front();
            is_cut = true;
        }
    }

    void accept_unguarded(llama_token token) {
        const bool in_grammar = grammar_applies();
        if (thoughts) {
            llama_sampler_accept(thoughts.get(), token);
            // the end of the thoughts may be part of what triggers the grammar
            if (grammar && !in_grammar && common_reasoning_budget_get_state(thoughts.get()) == REASONING_BUDGET_DONE) {
                if (const auto * end = common_reasoning_budget_get_end_match(thoughts.get())) {
                    for (const llama_token each : *end) {
                        accept_in_grammar(each);
                    }
                }
            }
        }
        if (in_grammar) {
            accept_in_grammar(token);
        }
    }

    // called by C
    void accept(llama_token token) noexcept {
        try {
            accept_unguarded(token);
        } catch (...) {
            has_failed = true;
        }
    }

    void apply(llama_token_data_array * candidates) noexcept {
        if (thoughts) {
            llama_sampler_apply(thoughts.get(), candidates);
        }
        for (size_t i = 0; i < candidates->size && has_failed; ++i) {
            candidates->data[i].logit = -INFINITY;
        }
        if (grammar_applies()) {
            llama_sampler_apply(grammar.get(), candidates);
        }
    }
};

} // namespace

static chat_sampler & of(llama_sampler * sampler) {
    return *static_cast<chat_sampler *>(sampler->ctx);
}

static llama_sampler_i chat_sampler_interface = {
    /* .name              = */ [](const llama_sampler *) { return "lminf-chat"; },
    /* .accept            = */ [](llama_sampler * sampler, llama_token token) { of(sampler).accept(token); },
    /* .apply             = */ [](llama_sampler * sampler, llama_token_data_array * candidates) { of(sampler).apply(candidates); },
    /* .reset             = */ nullptr,
    /* .clone             = */ nullptr,
    /* .free              = */ [](llama_sampler * sampler) { delete &of(sampler); },
    /* .backend_init      = */ nullptr,
    /* .backend_accept    = */ nullptr,
    /* .backend_apply     = */ nullptr,
    /* .backend_set_input = */ nullptr,
    /* .backend_reset     = */ nullptr,
    /* .copy_state        = */ nullptr,
};

static std::string escaped(const std::string & word) {
    static const std::string special = "\\^$.|?*+()[]{}";
    std::string pattern;
    for (const char c : word) {
        pattern += special.find(c) == std::string::npos ? "" : "\\";
        pattern += c;
    }
    return pattern;
}

static trigger trigger_of(const common_json & given) {
    const auto type  = given.at("type").get<std::string>();
    const auto value = given.at("value").get<std::string>();
    trigger made;
    made.word    = type == "word" ? value : "";
    made.pattern = type == "word" ? escaped(value) : value;
    if (type == "full") {
        made.pattern = (value.empty() || value.front() != '^' ? "^" : "") + value + (value.empty() || value.back() != '$' ? "$" : "");
    }
    made.is_whole = made.word.empty() && !made.pattern.empty() && made.pattern.front() == '^' && made.pattern.back() == '$';
    if (made.word.empty()) {
        made.regex = std::regex(made.pattern);
    }
    return made;
}

static std::vector<llama_token> prompt_tokens(const llama_vocab * vocab, const std::string & text) {
    auto tokens = common_tokenize(vocab, text, false, true);
    // some tokenizers put a space before a text that begins with a special token
    if (!tokens.empty() && !text.empty() && text[0] != ' ') {
        const auto first = common_token_to_piece(vocab, tokens[0], true);
        if (!first.empty() && first[0] == ' ') {
            tokens.erase(tokens.begin());
        }
    }
    return tokens;
}

static bool ends_with_tag(const std::string & text, const std::string & tag) {
    const size_t end = text.find_last_not_of(" \n");
    return end != std::string::npos && end + 1 >= tag.size() && text.compare(end + 1 - tag.size(), tag.size(), tag) == 0;
}

llama_sampler * lminf_chat_sampler_init(const llama_vocab * vocab, const char * text, char ** error) {
    lminf_chat_budget budget(std::strlen(text), nullptr, nullptr);
    llama_sampler * sampler = nullptr;
    char * failure = lminf_chat_guarded([&]() {
        const auto params = common_json::parse(text);
        auto made = std::make_unique<chat_sampler>();
        made->vocab        = vocab;
        made->grammar_text = params.at("grammar").get<std::string>();
        made->is_lazy      = params.at("grammar_lazy").get<bool>();
        made->is_awaiting  = made->is_lazy;
        for (const auto & each : params.at("triggers")) {
            made->triggers.push_back(trigger_of(each));
        }
        const auto before = prompt_tokens(vocab, params.at("generation_prompt").get<std::string>());

        if (!made->grammar_text.empty()) {
            made->make_grammar();
            const bool has_prompt = !made->is_lazy && params.at("grammar_has_prompt").get<bool>();
            for (size_t i = 0; i < before.size() && has_prompt; ++i) {
                llama_sampler_accept(made->grammar.get(), before[i]);
            }
        }

        const int  n_budget = params.at("budget").get<int>();
        const auto start    = params.at("thinking_start").get<std::string>();
        std::vector<llama_tokens> ends;
        for (const auto & end : params.at("thinking_ends")) {
            ends.push_back(common_tokenize(vocab, end.get<std::string>(), false, true));
        }
        if (!start.empty() && !ends.empty() && (made->is_lazy || n_budget >= 0)) {
            auto forced = common_tokenize(vocab, params.at("budget_message").get<std::string>(), false, true);
            forced.insert(forced.end(), ends[0].begin(), ends[0].end());
            const auto make = [&](int n_tokens, common_reasoning_budget_state state) {
                return owned(common_reasoning_budget_init(vocab, { common_tokenize(vocab, start, false, true) }, ends, forced,
                    n_tokens < 0 ? INT_MAX : n_tokens, state));
            };
            // the prompt takes nothing of the budget, and is not what ends the thoughts
            const auto prompt = make(-1, REASONING_BUDGET_IDLE);
            for (const llama_token token : before) {
                llama_sampler_accept(prompt.get(), token);
            }
            const auto state = common_reasoning_budget_get_state(prompt.get());
            // a tag that is no token of its own may be other tokens behind other text
            const bool has_tag  = ends_with_tag(params.at("generation_prompt").get<std::string>(), start);
            const bool is_begun = state == REASONING_BUDGET_COUNTING || (has_tag && state == REASONING_BUDGET_IDLE);
            made->thoughts = make(n_budget, is_begun ? REASONING_BUDGET_COUNTING : REASONING_BUDGET_IDLE);
        }
        sampler = llama_sampler_init(&chat_sampler_interface, made.get());
        made.release();
        return std::string();
    });
    if (sampler) {
        lminf_chat_free_text(failure);
        return sampler;
    }
    *error = failure;
    return nullptr;
}
