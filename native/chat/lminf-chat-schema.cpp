#include "lminf-chat-schema.h"

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
