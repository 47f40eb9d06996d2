// What all functions of lminf-chat.h return.

#pragma once

#include "lminf-chat-budget.h"
#include "lminf-chat-work.h"

#include <exception>
#include <string>

char * lminf_chat_copied(const std::string & text);
char * lminf_chat_error(const std::string & reason, bool too_much);

// What `work` returns as a text for the caller, or an error: nothing is thrown.
template <typename F>
char * lminf_chat_guarded(F && work) {
    try {
        return lminf_chat_copied(work());
    } catch (const lminf_chat_too_much & err) {
        return lminf_chat_error(err.reason, true);
    } catch (const std::exception & err) {
        return lminf_chat_error(err.what(), false);
    } catch (...) {
        return lminf_chat_error("an unknown failure", false);
    }
}
