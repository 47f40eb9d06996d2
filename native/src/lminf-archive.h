// the archive of a sequence: the keys and values of the tokens it has processed, so that those that have left the window can be
// recalled. In the host's memory, in segments of n_segment tokens that copies share: a segment only grows at its end, and each
// copy knows how far it reads. One that would write where another has written takes a segment of its own.
//
//   segment   for each layer: K  [n_segment][n_embd_k_gqa]  as finished by the model but un-rotated (position 0)
//                             V  [n_segment][n_embd_v_gqa]  as the cache stores them; none with MLA, where they are a part of K
//                             sketches [n_head_kv][n_segment/16] of K, see lminf-sketch.h
//             tokens [n_segment]
//
// A segment can be kept in a file: it is read here, packed, and added to another archive. One that is full never changes, so its
// file can take the place of its memory.
//
// Tokens are counted by their index in the stream. The graph writes and reads (lminf-recall.h); here is what it finds there.

#pragma once

#include "llama.h"

#include "lminf-params.h"
#include "lminf-sketch.h"

#include <map>
#include <memory>
#include <utility>
#include <vector>

struct llama_model;

class lminf_archive_layout {
public:
    static constexpr int64_t n_segment = 1024;
    static constexpr int64_t n_default = 262144; // tokens of an archive: prompts of 131072, a usual training length, and what follows

    struct layer {
        ggml_type type_k;
        ggml_type type_v;

        int64_t n_head_kv;
        int64_t n_embd_head_k;
        int64_t n_embd_v_gqa; // 0: values are a part of the keys

        // of a token's row, and of a segment's first row
        size_t size_k;
        size_t size_v;
        size_t at_k;
        size_t at_v;
        size_t at_sketch;
    };

    //   layers   those that store keys
    //   reuse    of a layer that attends to another one's keys: which
    // A layer whose heads are no multiple of a quantized type's blocks is stored in f16.
    lminf_archive_layout(const llama_model & model, const lminf_cparams & params, const std::vector<int32_t> & layers,
            const std::map<int32_t, int32_t> & reuse);

    size_t get_segment_size() const { return segment_size; }

    // of a segment's first token and of each; those that are no text are LLAMA_TOKEN_NULL
    size_t get_at_tokens()  const { return at_tokens; }
    size_t get_token_size() const { return layers.empty() ? 0 : sizeof(llama_token); } // where no layer recalls nothing is stored

    // of a segment's first n tokens without gaps between layers; that of all of them is the segment as it lies in memory
    size_t get_packed_size(int64_t n) const;

    // of the axes of all layers
    size_t get_axes_size() const;

    // of memory, that all archives of the process take at most
    size_t get_max_bytes() const { return max_bytes; }

    const std::vector<layer> & get_layers() const { return layers; }

    // NULL: the layer stores nothing
    const layer * find(int32_t il) const {
        const auto it = map_layer_ids.find(il);
        return it == map_layer_ids.end() ? nullptr : &layers[it->second];
    }

    size_t index_of(const layer & l) const { return &l - layers.data(); }

    // what one has written the other can read
    bool operator==(const lminf_archive_layout & other) const;

private:
    std::vector<layer> layers;
    std::map<int32_t, size_t> map_layer_ids; // il -> index into layers

    size_t segment_size = 0;
    size_t at_tokens    = 0;
    size_t max_bytes    = SIZE_MAX;
};

class lminf_archive {
public:
    using range = std::pair<int64_t, int64_t>; // tokens [first, second)

    lminf_archive(std::shared_ptr<const lminf_archive_layout> layout, int64_t n_max) : layout(std::move(layout)), n_max(n_max) {}

    // makes room for tokens [i0, i0 + n), of which none is there yet, and forgets the oldest if they would be more than n_max.
    // Where memory is short it forgets more, or all but what comes next.
    //   tokens   NULL: they are no text
    void append(int64_t i0, int64_t n, const llama_token * tokens);

    // forgets the tokens from i0 on
    void truncate(int64_t i0);

    void clear();

    // tokens within [i0, i1) that can be read, ascending
    std::vector<range> find(int64_t i0, int64_t i1) const;

    int64_t n_tokens() const;

    // of memory
    size_t n_bytes() const;

    // the same of all archives in this process, what several share counted once
    static size_t n_bytes_all();

    // takes over what another one holds of the tokens before i1, with copies of its segments if another thread may write to
    // them; false if that has another layout
    bool assign(const lminf_archive & other, int64_t i1, bool copies);

    // how often tokens were taken away, of which a choice may hold some
    int64_t get_n_changes() const { return n_changes; }

    // the segment that holds a token
    const char * get_segment(int64_t i) const { return segments.at(i/lminf_archive_layout::n_segment)->data.get(); }
    char       * get_segment(int64_t i)       { return segments.at(i/lminf_archive_layout::n_segment)->data.get(); }

    llama_token get_token(int64_t i) const;

    //
    // files: segments, the axes of their sketches as one more with `first` -1, and which of the tokens in them can be read
    //

    std::vector<lminf_segment> get_segments() const;

    // one of these; also while another thread goes on writing behind its tokens
    void read(const lminf_segment & part, char * dst) const;

    // what `read` gave; false if there is no memory for it or it makes no sense
    bool add(lminf_segment & part, const char * src);

    // takes a full segment from a file, in which it is packed, that does not change: one that is there already must be the same
    bool map(int64_t first, const char * path, size_t offset);

    const std::vector<range> & get_ranges() const { return ranges; }

    // of these, the tokens in segments that are there
    void set_ranges(const std::vector<range> & wanted);

    //
    // sketches: in a basis found from the first segment's worth of tokens that is there, the same for the same stream
    //

    using axes = std::vector<lminf_axes>; // [n_head_kv], n_embd 0: to be found

    // called before tokens from i0 on are stored: from then on there are axes, if there is enough to learn from
    void learn(int64_t i0);

    // the tokens that axes are found from; those before them have no sketches
    range get_learned() const { return learned; }

    // NULL: none yet
    axes * get_axes(size_t layer) const { return layer < layers_axes.size() ? layers_axes[layer].get() : nullptr; }

private:
    struct segment {
        std::shared_ptr<char[]> data;

        int64_t n_tokens  = 0; // the first that no copy has written
        int64_t id        = 0; // of what it holds: another one once something is overwritten
        bool    is_mapped = false;
    };

    // NULL if there is no memory
    std::shared_ptr<segment> new_segment() const;

    // tokens that are never written, so that no file holds what the memory held before
    void zero_rows(segment & s, int64_t row0, int64_t row1) const;

    // calls fun(size_t at, size_t size) for each stretch of a segment's first n tokens that has no gap
    template <typename F>
    void for_stretches(int64_t n, F fun) const;

    // calls fun(float * x, size_t n) for what makes the axes
    template <typename F>
    static void for_floats(std::vector<std::shared_ptr<axes>> & layers_axes, F fun);

    void forget_axes();

    void forget(int64_t i1);

    std::shared_ptr<const lminf_archive_layout> layout;

    int64_t n_max;

    std::map<int64_t, std::shared_ptr<segment>> segments; // by the index of the first token over n_segment
    std::vector<range> ranges; // tokens that can be read, ascending

    range learned = { 0, 0 };

    std::vector<std::shared_ptr<axes>> layers_axes;

    int64_t n_changes = 0;

    bool is_short = false; // of memory: told once
};
