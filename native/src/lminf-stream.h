// one sequence's place in its endless stream: 64-bit stream positions against small graph positions

#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <limits>

struct lminf_stream {
    int64_t origin = 0; // stream position of graph position 0; grows by whole blocks
    int64_t start  = 0; // stream position of the first token
    int64_t resume = 0; // stream position of the first token after the last skip; start if there was none

    int32_t n_global = 0; // sinks to keep
    int32_t n_sink   = 0; // sinks stored: tokens [start, start + n_sink)
    bool    begun    = false;

    // the how-manyth token of the stream stands at this graph position
    int64_t index(llama_pos pos) const {
        return origin + pos - start;
    }

    // graph position of the first token: far below 0 once the stream has been rebased
    int64_t pos_start() const {
        return start - origin;
    }

    // graph position of the first token that the window can hold
    int64_t pos_resume() const {
        return resume - origin;
    }

    bool is_skipped() const {
        return resume > start;
    }

    // an empty stream begins at this stream position
    void begin_at(int64_t stream_pos, llama_pos block) {
        start  = stream_pos;
        resume = stream_pos;
        origin = stream_pos - stream_pos % block;
    }

    // the tokens before this stream position will never be in the window: it is empty from now on, and goes on here.
    // Graph positions restart within (0, block]: 0 stays what removes the whole sequence.
    void skip_to(int64_t stream_pos, llama_pos block) {
        begun  = true;
        resume = stream_pos;
        origin = (stream_pos - 1) - (stream_pos - 1) % block;
    }

    // tokens up to graph position p1 are in the cache from now on
    void append(llama_pos p1) {
        begun  = true;
        n_sink = (int32_t) std::min<int64_t>(n_global, index(p1) + 1);
    }

    // tokens from graph position p0 on are gone
    void truncate(llama_pos p0) {
        n_sink = (int32_t) std::min<int64_t>(n_sink, index(p0));
    }

    // positions move by whole blocks only, so that a key is re-rotated at most once in its life
    static constexpr llama_pos min_block = 256;

    // where a stream can be put at most, and where none can get from there: counting on never overflows
    static constexpr int64_t max_start = std::numeric_limits<int64_t>::max()/4*3;
    static constexpr int64_t max_pos   = std::numeric_limits<int64_t>::max()/8*7;

    // how far graph positions can move back while pos_min, the oldest in use, stays at 0 or above
    static llama_pos rebase_shift(llama_pos pos_min, llama_pos block) {
        return pos_min - pos_min % block;
    }
};
