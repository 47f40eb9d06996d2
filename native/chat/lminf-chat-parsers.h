// What llama.cpp's parsers of answers ask of us: no list of all parts for each part.

#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

void lminf_chat_charge(size_t n_units);

template <typename T, typename = void>
struct lminf_chat_has_child : std::false_type {};
template <typename T>
struct lminf_chat_has_child<T, std::void_t<decltype(std::declval<T>().child)>> : std::true_type {};

template <typename T, typename = void>
struct lminf_chat_has_children : std::false_type {};
template <typename T>
struct lminf_chat_has_children<T, std::void_t<decltype(std::declval<T>().children)>> : std::true_type {};

// The parts of a sequence or a choice.
inline const std::vector<size_t> & lminf_chat_charged(const std::vector<size_t> & children) {
    lminf_chat_charge(sizeof(size_t) * children.size());
    return children;
}

// Empties the sequences and choices that were but steps to longer ones: each lists all that are in those before it.
template <typename Parsers, typename Rules>
void lminf_chat_drop_steps(Parsers & parsers, const Rules & rules, size_t root) {
    std::vector<bool>   is_used(parsers.size());
    std::vector<size_t> left = { root };
    for (const auto & rule : rules) {
        left.push_back(rule.second);
    }
    while (!left.empty()) {
        const size_t id = left.back();
        left.pop_back();
        if (id >= parsers.size() || is_used[id]) {
            continue; // there may be no root
        }
        is_used[id] = true;
        std::visit([&left](const auto & parser) {
            using type = std::decay_t<decltype(parser)>;
            if constexpr (lminf_chat_has_children<type>::value) {
                left.insert(left.end(), parser.children.begin(), parser.children.end());
            } else if constexpr (lminf_chat_has_child<type>::value) {
                left.push_back(parser.child);
            }
        }, parsers[id]);
    }
    for (size_t id = 0; id < parsers.size(); ++id) {
        std::visit([is_step = !is_used[id]](auto & parser) {
            if constexpr (lminf_chat_has_children<std::decay_t<decltype(parser)>>::value) {
                if (is_step) {
                    parser.children.clear();
                    parser.children.shrink_to_fit();
                }
            }
        }, parsers[id]);
    }
}
