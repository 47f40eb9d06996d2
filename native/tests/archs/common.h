// stands in for llama.cpp's common.h: what its tests/test-llama-archs.cpp needs to compile. generator.cpp uses nothing
// of that file that would call it.

#pragma once

#include "llama.h"

inline void common_init() {}

struct common_batch {
    explicit common_batch(llama_context *) {}

    void add(llama_token, llama_pos, llama_seq_id, bool) {}
    void clear() {}

    llama_batch_ext * get() { return nullptr; }
};
