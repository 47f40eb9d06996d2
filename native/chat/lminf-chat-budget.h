// The units of one call of lminf-chat.h, see lminf-chat-work.h.

#pragma once

#include "lminf-chat.h"

#include <cstddef>

class lminf_chat_budget {
public:
    // for a call that is given so many bytes; `is_cancelled` (or nullptr) is asked now and then
    lminf_chat_budget(size_t n_bytes, lminf_chat_cancelled is_cancelled, void * data);
    ~lminf_chat_budget();

    lminf_chat_budget(const lminf_chat_budget &) = delete;
    lminf_chat_budget & operator=(const lminf_chat_budget &) = delete;
};
