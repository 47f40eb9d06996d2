// The hash of a template's values, whose keys clients choose.
//
// llama.cpp's is the same in every process: a thousand keys of one hash are quickly found, and objects with such keys take
// the square of the time. This one differs from process to process.

#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

inline size_t lminf_chat_mixed(size_t bits) {
    static const uint64_t secret = (static_cast<uint64_t>(std::random_device()()) << 32) | std::random_device()();

    const uint64_t mixed = bits ^ secret;
    return static_cast<size_t>((mixed >> 32 | 1) * static_cast<uint32_t>(mixed) + (mixed >> 32));
}
