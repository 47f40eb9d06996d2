// saving and restoring: a header, then for each sequence its place in the stream and a list of parts, each with its size. A
// state is input like any other: all but the tensors' contents is checked before it is taken over.
//
// A partial state (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) holds the parts that cannot be taken back, the recurrent states. It leads
// a sequence back to its place as long as cells and sinks can be truncated to it.

#include "lminf-memory.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

// everything that must agree is in front, so that a foreign state is refused before anything is changed
struct lminf_state_header {
    uint32_t magic;
    uint32_t version;
    int32_t  n_local;
    int32_t  max_distance;
    int32_t  sink_mode;
    int32_t  sink_pos;
    int32_t  type_k;
    int32_t  type_v;
    int32_t  v_trans;
    int32_t  n_layer_full;
    int32_t  n_layer_sliding;
    int32_t  n_layer_recurrent;
    int32_t  n_swa;
    int32_t  n_seq; // sequences that follow: one, or all
    int32_t  is_partial;
};

namespace {

constexpr uint32_t state_magic   = 0x464e4d4c; // "LMNF"
constexpr uint32_t state_version = 5;

struct state_seq {
    int64_t origin;
    int64_t start;
    int64_t resume;
    int32_t n_global;
    int32_t n_sink;
    int32_t begun;
    int32_t pos_max; // of the window, -1 if that is empty
    int32_t next;    // graph position of the next token
    int32_t n_parts;
};

enum part_kind : uint32_t {
    PART_WINDOW    = 1,
    PART_SLIDING   = 2,
    PART_SINKS     = 3,
    PART_RECURRENT = 4,
    PART_ROUTER    = 5,
};

struct state_part {
    uint32_t kind;
    uint32_t unused;
    uint64_t size; // bytes that follow
};

// in front of the cells of a window
struct state_cells {
    int32_t n_cells; // of the cache that it was saved from
    int32_t n_used;  // cells that are saved; their indices follow
};

[[noreturn]] void refuse(const char * why) {
    throw std::runtime_error(why);
}

void check(bool ok) {
    if (!ok) {
        refuse("its positions make no sense");
    }
}

// how large a part will be; with LLAMA_STATE_SEQ_FLAGS_ON_DEVICE the contents of tensors are not in it
class size_writer : public llama_io_write_i {
public:
    explicit size_writer(bool has_tensors) : has_tensors(has_tensors) {}

    void write(const void *, size_t size) override { n += size; }
    void write_tensor(ggml_tensor *, size_t, size_t size) override { n += has_tensors ? size : 0; }

    size_t n_bytes() override { return n; }

private:
    const bool has_tensors;

    size_t n = 0;
};

// takes in what comes before the tensors, to be checked, and shows it again
class shown_reader : public llama_io_read_i {
public:
    explicit shown_reader(llama_io_read_i & io) : io(io) {}

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

protected:
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

    std::vector<uint8_t> shown;
    size_t i_shown = 0;
};

// What llama_kv_cache saves of one sequence begins with its number of streams and a cell count for each, all but one of
// them 0, and it reads that only into a cache of as many streams: it is shown as the last of `n_stream` streams.
class cells_reader : public shown_reader {
public:
    cells_reader(llama_io_read_i & io, uint32_t n_used, uint32_t n_stream, bool has_ext) : shown_reader(io) {
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

    // the counts of the streams that come after the tensors
    void skip_rest() {
        for (; n_rest > 0; --n_rest) {
            if (read_u32() != 0) {
                refuse("it holds cells of another sequence");
            }
        }
    }

private:
    uint32_t n_rest;

    std::vector<llama_pos> positions;
};

// what llama_memory_recurrent saves of one sequence begins with one cell at most, and asserts about more
class recurrent_reader : public shown_reader {
public:
    recurrent_reader(llama_io_read_i & io, const state_seq & seq) : shown_reader(io) {
        const uint32_t n_cells = show_u32();
        // a sequence without sinks may have read something before a skip, or nothing
        const bool is_any = seq.resume > seq.start && seq.n_global == 0 && seq.pos_max < 0;
        if (n_cells > 1 || (!is_any && n_cells != (seq.pos_max >= 0 || seq.n_sink > 0))) {
            refuse("it holds another number of recurrent states than it must");
        }
        if (n_cells == 1) {
            check(seq.next > 0 && (llama_pos) show_u32() == seq.next - 1);
            if (show_u32() != 0) {
                refuse("its recurrent state belongs to several sequences");
            }
        }
    }
};

}

// the positions that a sequence's cells hold, in front of `next`: none is missing that the next query can see
static void check_cells(const state_seq & seq, std::vector<llama_pos> positions, int32_t n_seen) {
    const int64_t pos_resume = seq.resume - seq.origin;

    if (positions.empty()) {
        check(seq.pos_max == -1);
        return;
    }

    std::sort(positions.begin(), positions.end());

    const int64_t pos_min = positions.front();
    const int64_t pos_max = positions.back();

    check(pos_min >= (seq.resume > seq.start) && pos_max == seq.pos_max);
    check(pos_max - pos_min + 1 == (int64_t) positions.size());
    check(std::adjacent_find(positions.begin(), positions.end()) == positions.end());
    check(pos_min >= pos_resume && pos_min <= std::max(pos_resume, seq.next - (int64_t) (n_seen - 1)));
}

// a place in a stream that a sequence can really be in
static void check_stream(const state_seq & seq, int32_t n_skip, llama_pos block) {
    check(seq.begun == 0 || seq.begun == 1);
    check(seq.origin >= 0 && seq.origin <= lminf_stream::max_pos);
    check(seq.start >= 0 && seq.start <= seq.resume && seq.resume <= lminf_stream::max_start);

    const int64_t pos_resume = seq.resume - seq.origin;
    const bool    is_skipped = seq.resume > seq.start;

    check(!is_skipped || (seq.begun && seq.resume - seq.start >= (int64_t) seq.n_global + n_skip));

    if (seq.pos_max == -1) {
        check(seq.begun == is_skipped);
        check(is_skipped ? pos_resume > 0 && pos_resume <= block : pos_resume >= 0 && pos_resume < block);
        check(seq.next == pos_resume);
    } else {
        check(seq.begun == 1 && seq.pos_max >= 0 && seq.pos_max < std::numeric_limits<llama_pos>::max());
        check(seq.next == seq.pos_max + 1);
    }

    check(seq.n_global >= 0 && seq.n_sink == std::min<int64_t>(seq.n_global, seq.origin + seq.next - seq.start));
}

lminf_state_header lminf_memory::new_state_header(int32_t n_seq, llama_state_seq_flags flags) const {
    const auto & kv = window->get_params();

    return {
        state_magic, state_version,
        params.n_local, params.max_distance, params.sink_mode, params.sink_pos(),
        kv.type_k, kv.type_v, kv.v_trans,
        (int32_t) layers.full.size(), (int32_t) layers.sliding.size(), (int32_t) layers.recurrent.size(),
        sliding ? (int32_t) hparams.n_swa : 0, n_seq, (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != 0,
    };
}

static void check_seq(llama_seq_id seq_id, uint32_t n_seq_max) {
    if (seq_id >= (llama_seq_id) n_seq_max) {
        throw std::runtime_error(lminf_set_error(format("sequence %d does not exist in this context", seq_id)));
    }
}

//
// writing
//

static void write_cells(llama_io_write_i & io, const lminf_kv & kv, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const auto idxs = kv.saved_cells(seq_id);

    const state_cells cells = { (int32_t) kv.get_params().n_cells, (int32_t) idxs.size() };
    io.write(&cells, sizeof(cells));
    if (!idxs.empty()) { // the data of none is a null pointer, which memcpy must not be given
        io.write(idxs.data(), idxs.size()*sizeof(uint32_t));
    }

    kv.get_cache().state_write(io, seq_id, flags);
}

void lminf_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    check_seq(seq_id, n_seq_max);

    const llama_seq_id s0 = seq_id < 0 ? 0         : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_max : seq_id + 1;

    const lminf_state_header header = new_state_header(s1 - s0, flags);
    io.write(&header, sizeof(header));

    for (llama_seq_id s = s0; s < s1; ++s) {
        const auto & stream = streams[s];

        using part = std::pair<part_kind, std::function<void(llama_io_write_i & io)>>;

        std::vector<part> parts;
        if (!header.is_partial) {
            parts.push_back({ PART_WINDOW, [&](llama_io_write_i & io) { write_cells(io, *window, s, flags); } });
            if (sliding) {
                parts.push_back({ PART_SLIDING, [&](llama_io_write_i & io) { write_cells(io, *sliding, s, flags); } });
            }
            parts.push_back({ PART_SINKS, [&](llama_io_write_i & io) {
                for (ggml_tensor * t : sinks->get_rows(s)) {
                    if (stream.n_sink > 0) {
                        io.write_tensor(t, 0, stream.n_sink*t->nb[1]);
                    }
                }
            } });
        }
        if (router && !header.is_partial) {
            parts.push_back({ PART_ROUTER, [&](llama_io_write_i & io) {
                const auto   & marks = router->get_marks(s);
                const uint32_t n     = marks.size();
                io.write(&n, sizeof(n));
                if (n > 0) {
                    io.write(marks.data(), n*sizeof(marks[0]));
                }
            } });
        }
        if (recurrent) {
            parts.push_back({ PART_RECURRENT, [&](llama_io_write_i & io) { recurrent->get_memory().state_write(io, s, flags); } });
        }

        const state_seq seq = {
            stream.origin, stream.start, stream.resume, stream.n_global, stream.n_sink, stream.begun,
            window->get_cache().seq_pos_max(s), next_pos(s), (int32_t) parts.size(),
        };
        io.write(&seq, sizeof(seq));

        for (const auto & [kind, write] : parts) {
            size_writer size(!(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE));
            write(size);

            const state_part head = { kind, 0, size.n_bytes() };
            io.write(&head, sizeof(head));
            write(io);
        }
    }
}

//
// reading
//

// the same places again make the same sums, to the last bit
static void read_cells(llama_io_read_i & io, lminf_kv & kv, const state_seq & seq, llama_seq_id seq_id, llama_state_seq_flags flags,
        const std::function<void()> & checked) {
    const int32_t n_cells = kv.get_params().n_cells;

    state_cells cells;
    io.read(&cells, sizeof(cells));

    if (cells.n_used < 0 || cells.n_used > n_cells) {
        refuse("it holds more cells than this cache has");
    }

    std::vector<uint32_t> idxs(cells.n_used);
    if (!idxs.empty()) {
        io.read(idxs.data(), idxs.size()*sizeof(uint32_t));
    }

    if (std::adjacent_find(idxs.begin(), idxs.end(), std::greater_equal<>()) != idxs.end() ||
            (!idxs.empty() && (int64_t) idxs.back() >= cells.n_cells)) {
        refuse("its cell indices make no sense");
    }

    auto & cache = kv.get_cache();

    cells_reader reader(io, cells.n_used, cache.get_n_stream(), cache.has_cell_ext());

    check_cells(seq, reader.get_positions(), kv.get_params().n_seen);
    check((seq.pos_max == -1) == idxs.empty());

    llama_kv_cache::slot_info_vec_t places(cache.get_n_stream());
    if (!idxs.empty()) {
        places.back().resize(1);
        places.back().strm[0] = cache.get_stream(seq_id);
        places.back().idxs[0] = std::move(idxs);
    }

    checked();

    cache.state_read_sinfo(reader, seq_id, flags, nullptr, cells.n_cells == n_cells ? &places : nullptr);
    reader.skip_rest();
}

// the part that comes next, and that it is as long as it says
static void read_part(llama_io_read_i & io, part_kind kind, const std::function<void()> & read) {
    state_part part;
    io.read(&part, sizeof(part));

    if (part.kind != kind) {
        refuse("its parts come in another order");
    }

    const size_t n_before = io.n_bytes();
    read();
    if (io.n_bytes() - n_before != part.size) {
        refuse("a part of it has another size than it says");
    }
}

// p0: where the window can be truncated to, from which on a router must know its counts
static void read_marks(llama_io_read_i & io, lminf_router & router, const state_seq & seq, llama_seq_id seq_id, llama_pos p0) {
    uint32_t n;
    io.read(&n, sizeof(n));

    std::vector<lminf_router::mark> marks; // no more of them than there is to read
    for (uint32_t i = 0; i < n; ++i) {
        lminf_router::mark m;
        io.read(&m, sizeof(m));
        marks.push_back(m);
    }

    const int64_t index = seq.origin - seq.start; // of graph position 0
    if (!router.set_marks(seq_id, std::move(marks), index + seq.next) || router.truncate_min(seq_id) > index + p0) {
        refuse("what it says of its adapters makes no sense");
    }
}

void lminf_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    check_seq(seq_id, n_seq_max);

    const llama_seq_id s0 = seq_id < 0 ? 0         : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? n_seq_max : seq_id + 1;

    const lminf_state_header expected = new_state_header(s1 - s0, flags);

    llama_seq_id s = s0;
    try {
        lminf_state_header header;
        io.read(&header, sizeof(header));

        if (header.magic != expected.magic || header.version != expected.version) {
            refuse("it was not made by this version of the Λ cache");
        }
        if (header.n_local != expected.n_local || header.max_distance != expected.max_distance || header.sink_mode != expected.sink_mode ||
                header.sink_pos != expected.sink_pos) {
            refuse("it was made with another n_local, max_distance, sink_mode or recall_distance");
        }
        if (header.type_k != expected.type_k || header.type_v != expected.type_v || header.v_trans != expected.v_trans) {
            refuse("it was made with another KV type or another kind of attention");
        }
        if (header.n_seq != expected.n_seq || header.is_partial != expected.is_partial) {
            refuse("it was made of another number of sequences, or is partial where a whole one is asked for");
        }
        if (memcmp(&header, &expected, sizeof(header)) != 0) {
            refuse("it was made with another number of layers or another sliding window");
        }

        for (; s < s1; ++s) {
            state_read_seq(io, s, flags);
        }
    } catch (const std::exception & error) {
        // llama.cpp does not fill in the tensors of the sequences that went well
        while (s > s0) {
            remove(--s);
        }
        throw std::runtime_error(lminf_set_error(std::string("the saved state does not fit: ") + error.what()));
    }
}

void lminf_memory::state_read_seq(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const bool is_partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;

    state_seq seq;
    io.read(&seq, sizeof(seq));

    check_stream(seq, std::max<int64_t>(params.n_local, sliding ? hparams.n_swa : 0), block);

    if (seq.n_global > params.n_global) {
        refuse("it keeps more sinks than this context has room for");
    }
    if (seq.n_parts != (is_partial ? 0 : 2 + (sliding != nullptr) + (router != nullptr)) + (recurrent != nullptr)) {
        refuse("it has another number of parts");
    }

    auto & stream = streams[seq_id];

    bool changed = false;
    const auto begin = [&] {
        if (changed) {
            return;
        }
        if (is_partial && seq.begun) {
            truncate(seq_id, graph_pos(seq_id, seq.origin + seq.next));
        } else {
            remove(seq_id);
        }
        changed = true;
    };

    if (is_partial && seq.begun) {
        const llama_pos p0 = graph_pos(seq_id, seq.origin + seq.next);

        if (!stream.begun || stream.start != seq.start || stream.resume != seq.resume || stream.n_global != seq.n_global) {
            refuse("it is a part of another stream than the sequence holds");
        }
        if (p0 < truncate_min(seq_id) || p0 > next_pos(seq_id)) {
            refuse("the sequence no longer holds what the next query needs of the tokens before it");
        }
    }

    // from here on an exception leaves the sequence empty
    try {
        if (!is_partial) {
            read_part(io, PART_WINDOW, [&] { read_cells(io, *window, seq, seq_id, flags, begin); });
            if (sliding) {
                read_part(io, PART_SLIDING, [&] { read_cells(io, *sliding, seq, seq_id, flags, begin); });
            }
            read_part(io, PART_SINKS, [&] {
                for (ggml_tensor * t : sinks->get_rows(seq_id)) {
                    if (seq.n_sink > 0) {
                        io.read_tensor(t, 0, seq.n_sink*t->nb[1]);
                    }
                }
            });
        }
        if (router && !is_partial) {
            read_part(io, PART_ROUTER, [&] { read_marks(io, *router, seq, seq_id, window->rollback_min(seq_id, seq.resume - seq.origin)); });
        }
        if (recurrent) {
            read_part(io, PART_RECURRENT, [&] {
                recurrent_reader reader(io, seq);

                begin();
                recurrent->state_read(reader, seq_id, flags);
            });
        }
        begin();
    } catch (...) {
        if (changed) {
            stream.n_sink = seq.n_sink;
            remove(seq_id);
        }
        throw;
    }

    if (!is_partial) {
        stream.origin   = seq.origin;
        stream.start    = seq.start;
        stream.resume   = seq.resume;
        stream.n_global = seq.n_global;
        stream.n_sink   = seq.n_sink;
        stream.begun    = seq.begun == 1;
    }
    if (recurrent) {
        recurrent->set_pos(seq_id, next_pos(seq_id) - 1);
    }
}
