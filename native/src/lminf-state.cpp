// saving and restoring: a header, then for each sequence its stream, its window as llama_kv_cache saves one sequence, and
// its sinks. A state is input like any other: all but the tensors' contents is checked before it is taken over.

#include "lminf-memory.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace {

constexpr uint32_t state_magic   = 0x464e4d4c; // "LMNF"
constexpr uint32_t state_version = 3;

// everything that must agree is in front, so that a foreign state is refused before anything is changed
struct state_header {
    uint32_t magic;
    uint32_t version;
    int32_t  n_local;
    int32_t  max_distance;
    int32_t  sink_mode;
    int32_t  type_k;
    int32_t  type_v;
    int32_t  v_trans;
    int32_t  n_layer;
    int32_t  n_seq; // sequences that follow: one, or all
};

struct state_seq {
    int64_t origin;
    int64_t start;
    int64_t resume;
    int32_t n_global;
    int32_t n_sink;
    int32_t begun;
    int32_t pos_max; // of the window, -1 if that is empty
    int32_t n_cells; // of the cache that it was saved from
    int32_t n_used;  // cells that are saved; their indices follow
};

[[noreturn]] void refuse(const char * why) {
    throw std::runtime_error(why);
}

// What llama_kv_cache saves of one sequence begins with its number of streams and a cell count for each, all but one of
// them 0, and it reads that only into a cache of as many streams. This takes in all that comes before the tensors, to be
// checked, and shows it again as the last of `n_stream` streams.
class window_reader : public llama_io_read_i {
public:
    window_reader(llama_io_read_i & io, uint32_t n_used, uint32_t n_stream, bool has_ext) : io(io) {
        n_rest = read_u32();
        if (n_rest == 0 || n_rest > LLAMA_MAX_SEQ) {
            refuse("its streams make no sense");
        }

        uint32_t cell_count = 0;
        while (n_rest > 0 && cell_count == 0) {
            cell_count = read_u32();
            n_rest--;
        }
        if (cell_count != n_used) {
            refuse("its window holds another number of cells than it says");
        }

        show(&n_stream, sizeof(n_stream));
        shown.resize(shown.size() + (n_stream - 1)*sizeof(uint32_t), 0);
        show(&cell_count, sizeof(cell_count));

        for (uint32_t i = 0; i < cell_count; ++i) {
            positions.push_back((llama_pos) show_u32());
            if (show_u32() != 1) {
                refuse("a cell of its window belongs to several sequences");
            }
            if (has_ext) {
                llama_kv_cell_ext ext;
                io.read(&ext, sizeof(ext));
                show(&ext, sizeof(ext));
            }
            show_u32(); // the sequence it was saved from
        }
    }

    // position of each cell, in the order they are saved in
    const std::vector<llama_pos> & get_positions() const { return positions; }

    void read(void * dst, size_t size) override {
        if (i_shown == shown.size()) {
            io.read(dst, size);
            return;
        }
        GGML_ASSERT(size <= shown.size() - i_shown);
        memcpy(dst, shown.data() + i_shown, size);
        i_shown += size;
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override { io.read_tensor(tensor, offset, size); }

    void discard() override { io.discard(); }

    size_t n_bytes() override { return io.n_bytes(); }

    // the counts of the streams that come after the tensors
    void skip_rest() {
        for (; n_rest > 0; --n_rest) {
            if (read_u32() != 0) {
                refuse("it holds cells of another sequence");
            }
        }
    }

private:
    uint32_t read_u32() {
        uint32_t res;
        io.read(&res, sizeof(res));
        return res;
    }

    uint32_t show_u32() {
        const uint32_t res = read_u32();
        show(&res, sizeof(res));
        return res;
    }

    void show(const void * src, size_t size) {
        const auto * bytes = (const uint8_t *) src;
        shown.insert(shown.end(), bytes, bytes + size);
    }

    llama_io_read_i & io;

    uint32_t n_rest;

    std::vector<llama_pos> positions;

    std::vector<uint8_t> shown;
    size_t i_shown = 0;
};

}

// the cells that llama_kv_cache::state_write saves of one sequence, in its order
static std::vector<uint32_t> saved_cells(const llama_kv_cells & cells, llama_seq_id seq_id, uint32_t n_swa) {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && !llama_hparams::is_masked_swa(n_swa, LLAMA_SWA_TYPE_STANDARD, cells.pos_get(i), cells.seq_pos_max(seq_id))) {
            res.push_back(i);
        }
    }
    return res;
}

// a place in a stream that a sequence can really be in, whose next query finds every key it needs
static void check_stream(const state_seq & seq, std::vector<llama_pos> positions, int32_t n_local) {
    const auto check = [](bool ok) {
        if (!ok) {
            refuse("its positions make no sense");
        }
    };

    check(seq.begun == 0 || seq.begun == 1);
    check(seq.origin >= 0 && seq.origin <= lminf_stream::max_pos);
    check(seq.start >= 0 && seq.start <= seq.resume && seq.resume <= lminf_stream::max_start);

    const int64_t pos_resume = seq.resume - seq.origin;
    const bool    is_skipped = seq.resume > seq.start;

    check(!is_skipped || (seq.begun && seq.resume - seq.start >= (int64_t) seq.n_global + n_local));

    int64_t next = pos_resume;

    if (positions.empty()) {
        check(seq.pos_max == -1);
        check(seq.begun == is_skipped);
        check(is_skipped ? pos_resume > 0 && pos_resume <= lminf_stream::block : pos_resume >= 0 && pos_resume < lminf_stream::block);
    } else {
        std::sort(positions.begin(), positions.end());

        const int64_t pos_min = positions.front();
        const int64_t pos_max = positions.back();

        check(seq.begun == 1);
        check(pos_min >= is_skipped && pos_max == seq.pos_max && pos_max < std::numeric_limits<llama_pos>::max());
        check(pos_max - pos_min + 1 == (int64_t) positions.size());
        check(std::adjacent_find(positions.begin(), positions.end()) == positions.end());

        next = pos_max + 1;

        check(pos_min >= pos_resume && pos_min <= std::max(pos_resume, next - (n_local - 1)));
    }

    check(seq.n_sink == std::min<int64_t>(seq.n_global, seq.origin + next - seq.start));
}

void lminf_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (!pending_copies.empty()) {
        throw std::runtime_error(lminf_set_error("a sequence was copied before anything was decoded: decode first, then save"));
    }

    const llama_seq_id s0 = seq_id < 0 ? 0         : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_max : seq_id + 1;

    const state_header header = {
        state_magic, state_version,
        params.n_local, params.max_distance, params.sink_mode,
        window->type_k(), window->type_v(), v_trans, (int32_t) sinks.size(), s1 - s0,
    };
    io.write(&header, sizeof(header));

    for (llama_seq_id s = s0; s < s1; ++s) {
        const auto & stream = streams[s];
        const auto   cells  = saved_cells(window->get_cells(s), s, params.n_local + params.n_slack);

        const state_seq seq = {
            stream.origin, stream.start, stream.resume, stream.n_global, stream.n_sink, stream.begun,
            window->seq_pos_max(s), (int32_t) n_cells, (int32_t) cells.size(),
        };
        io.write(&seq, sizeof(seq));
        io.write(cells.data(), cells.size()*sizeof(uint32_t));

        window->state_write(io, s, flags);

        if (stream.n_sink == 0) {
            continue;
        }
        for (const auto & layer : sinks) {
            io.write_tensor(layer.k_seq[s], 0, stream.n_sink*layer.k->nb[1]);
            io.write_tensor(layer.v_seq[s], 0, stream.n_sink*layer.v->nb[1]);
        }
    }
}

void lminf_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const llama_seq_id s0 = seq_id < 0 ? 0         : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_max : seq_id + 1;

    try {
        state_header header;
        io.read(&header, sizeof(header));

        if (header.magic != state_magic || header.version != state_version) {
            refuse("it was not made by this version of the Λ cache");
        }
        if (header.n_local != params.n_local || header.max_distance != params.max_distance || header.sink_mode != params.sink_mode) {
            refuse("it was made with another n_local, max_distance or sink_mode");
        }
        if (header.type_k != window->type_k() || header.type_v != window->type_v() || header.v_trans != v_trans) {
            refuse("it was made with another KV type or another kind of attention");
        }
        if (header.n_layer != (int32_t) sinks.size() || header.n_seq != s1 - s0) {
            refuse("it was made with another number of layers or sequences");
        }

        for (llama_seq_id s = s0; s < s1; ++s) {
            state_read_seq(io, s, flags);
        }
    } catch (const std::exception & error) {
        throw std::runtime_error(lminf_set_error(std::string("the saved state does not fit: ") + error.what()));
    }
}

void lminf_memory::state_read_seq(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    state_seq seq;
    io.read(&seq, sizeof(seq));

    if (seq.n_used < 0 || seq.n_used > (int32_t) n_cells) {
        refuse("it holds more cells than this cache has");
    }
    if (seq.n_global < 0 || seq.n_global > params.n_global) {
        refuse("it keeps more sinks than this context has room for");
    }

    // the same places again make the same sums, to the last bit
    std::vector<uint32_t> idxs(seq.n_used);
    io.read(idxs.data(), idxs.size()*sizeof(uint32_t));

    if (std::adjacent_find(idxs.begin(), idxs.end(), std::greater_equal<>()) != idxs.end() ||
            (!idxs.empty() && (int64_t) idxs.back() >= seq.n_cells)) {
        refuse("its cell indices make no sense");
    }

    window_reader reader(io, seq.n_used, window->get_n_stream(), window->has_cell_ext());

    check_stream(seq, reader.get_positions(), params.n_local);

    llama_kv_cache::slot_info_vec_t places(window->get_n_stream());
    if (!idxs.empty()) {
        places.back().resize(1);
        places.back().strm[0] = window->get_stream(seq_id);
        places.back().idxs[0] = std::move(idxs);
    }

    // from here on an exception leaves the sequence empty
    seq_rm(seq_id, -1, -1);

    try {
        window->state_read_sinfo(reader, seq_id, flags, nullptr, seq.n_cells == (int32_t) n_cells ? &places : nullptr);
        reader.skip_rest();

        for (const auto & layer : sinks) {
            if (seq.n_sink > 0) {
                io.read_tensor(layer.k_seq[seq_id], 0, seq.n_sink*layer.k->nb[1]);
                io.read_tensor(layer.v_seq[seq_id], 0, seq.n_sink*layer.v->nb[1]);
            }
        }
    } catch (...) {
        mark_dirty(seq_id);
        free_cells(seq_id, -1);
        zero_sinks(seq_id, 0, seq.n_sink);
        throw;
    }

    mark_dirty(seq_id);

    auto & stream = streams[seq_id];

    stream.origin   = seq.origin;
    stream.start    = seq.start;
    stream.resume   = seq.resume;
    stream.n_global = seq.n_global;
    stream.n_sink   = seq.n_sink;
    stream.begun    = seq.begun == 1;
}
