#include "lminf-chat-schema.h"

#include "lminf-chat-work.h"

// llama.cpp does this and the next by regular expressions, which takes most of the time of a large schema.
std::string lminf_chat_rule_name(const std::string & name, size_t n_units) {
    lminf_chat_charge(64 + name.size() + n_units);
    std::string made;
    bool is_valid = true;
    for (const char c : name) {
        const bool was_valid = is_valid;
        is_valid = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
        if (is_valid) {
            made += c;
        } else if (was_valid) {
            made += '-'; // for all of them
        }
    }
    return made;
}

std::string lminf_chat_escaped(const std::string & literal) {
    lminf_chat_charge(16 + literal.size());
    std::string made;
    made.reserve(literal.size());
    for (const char c : literal) {
        if (c == '\r' || c == '\n') {
            made += c == '\r' ? "\\r" : "\\n";
        } else {
            made += c == '"' || c == '\\' ? "\\" : "";
            made += c;
        }
    }
    return made;
}

std::string lminf_chat_in_class(const std::string & character) {
    if (character == "^") {
        return "\\x5E";
    }
    const bool means_something = character == "]" || character == "-" || character == "\\";
    return (means_something ? "\\" : "") + character;
}

static thread_local bool warned_of_schema = false;

void lminf_chat_warn_of_schema() {
    warned_of_schema = true;
}

bool lminf_chat_warned_of_schema() {
    const bool warned = warned_of_schema;
    warned_of_schema = false;
    return warned;
}
