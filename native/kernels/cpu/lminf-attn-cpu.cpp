// Two kernels, both with f32 sums and one pass over K and V:
//
//   decode  a few query rows per KV head. Cells are dealt out to the threads in blocks. A block is read in memory order
//           while the next one is prefetched; each K and V row serves its whole group of query heads. Bound by memory.
//   tiles   many query rows per KV head. 64 rows at a time are kept transposed, so that rows are lanes: neither K nor V is
//           transposed, and the softmax needs no sums across lanes. Bound by multiplications.
//
// A "row" below is one query of one head. Both kernels keep for each row the maximum m of its scores so far, the sum l of
// exp(s - m) and the sum of exp(s - m)*v; where several threads share a row, these parts are merged at the end.

#include "lminf-attn-cpu.h"

#include "ggml-cpu-impl.h" // first: it tells MSVC's AVX2 apart as __FMA__ and __F16C__
#include "ggml-impl.h"

#include "lminf-rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

using namespace lminf_simd;

// below every real score, and unlike -inf it can be subtracted from itself
static constexpr float NO_SCORE = -1e30f;

// up to so many rows per KV head the decode kernel is faster (2 AVX-512 cores, head size 64 and 128)
static constexpr int N_ROWS_DECODE = 8;

static int pad16(int n) { return (n + 15)/16*16; }

//
// K and V: the window, or the sinks in front of it
//

struct kv_part {
    lminf_attn_operand q, k, v;

    int n;    // cells
    int mask; // the column of the first one
};

// sinks, then window
static int get_parts(const lminf_attn_args & args, kv_part * parts) {
    int n_parts = 0;
    if (args.n_sink > 0) {
        parts[n_parts++] = { args.q_sink, args.k_sink, args.v_sink, args.n_sink, 0 };
    }
    if (args.n_kv > 0) {
        parts[n_parts++] = { args.q, args.k, args.v, args.n_kv, args.n_sink };
    }
    return n_parts;
}

static const char * get_row(const lminf_attn_operand & t, int64_t i1, int64_t i2, int64_t i3) {
    return t.data + i1*t.nb1 + i2*t.nb2 + i3*t.nb3;
}

static const float * get_mask(const lminf_attn_args & args, int i_q, int i_stream) {
    return (const float *) get_row(args.mask, i_q, 0, i_stream);
}

enum mask_state { MASK_CLOSED, MASK_OPEN, MASK_MIXED };

// of n cells from column i0 on, for the queries [q0, q1)
static mask_state get_mask_state(const lminf_attn_args & args, int i0, int n, int q0, int q1, int i_stream) {
    int n_open = 0; // exactly 0: nothing to add
    int n_shut = 0;
    for (int t = q0; t < q1; ++t) {
        const float * mask = get_mask(args, t, i_stream) + i0;
        for (int c = 0; c < n; ++c) {
            n_open += mask[c] == 0.0f;
            n_shut += mask[c] == -INFINITY;
        }
    }
    const int n_all = n*(q1 - q0);
    return n_shut == n_all ? MASK_CLOSED : n_open == n_all ? MASK_OPEN : MASK_MIXED;
}

// n rows of one head as f32, res [n][pad16(n_embd)]
typedef void (*load_row_t)(const char * row, int n_embd, float * res);

static load_row_t get_load_row(int type) {
    switch (type) {
        case GGML_TYPE_F32:  return load_row<GGML_TYPE_F32>;
        case GGML_TYPE_F16:  return load_row<GGML_TYPE_F16>;
        case GGML_TYPE_BF16: return load_row<GGML_TYPE_BF16>;
        case GGML_TYPE_Q8_0: return load_row<GGML_TYPE_Q8_0>;
        case GGML_TYPE_Q4_0: return load_row<GGML_TYPE_Q4_0>;
        default: GGML_ABORT("no K or V of this type");
    }
}

static void load_rows(const char * rows, int64_t nb1, int type, int n, int n_embd, float * res) {
    const load_row_t load = get_load_row(type);
    for (int i = 0; i < n; ++i) {
        load(rows + i*nb1, n_embd, res + (size_t) i*pad16(n_embd));
    }
}

static void load_q(const lminf_attn_args & args, const char * row, float * res) {
    for (int e = 0; e < args.n_embd_head_k; ++e) {
        res[e] = args.scale*((const float *) row)[e];
    }
}

static void soft_cap(float cap, float * s, int n) {
    for (int i = 0; i < n; ++i) {
        s[i] = cap*tanhf(s[i]);
    }
}

//
// parts of rows, and their sum
//

// in wdata: [n_split][n_stream*n_q*n_head][2 + n_embd_head_v], being m, l and the sum of values
static size_t get_part_size(const lminf_attn_args & args) {
    return 2 + args.n_embd_head_v;
}

static int64_t get_n_rows(const lminf_attn_args & args) {
    return (int64_t) args.n_stream*args.n_q*args.n_head;
}

static int64_t get_row_index(const lminf_attn_args & args, int i_stream, int i_q, int i_head) {
    return ((int64_t) i_stream*args.n_q + i_q)*args.n_head + i_head;
}

static void merge_parts(const lminf_attn_args & args, const float * parts, int n_split, int64_t row) {
    const int64_t stride = get_n_rows(args)*get_part_size(args);

    const float * part = parts + row*get_part_size(args);
    const float   sink = args.head_sinks ? args.head_sinks[row % args.n_head] : NO_SCORE;

    float m = sink;
    for (int i = 0; i < n_split; ++i) {
        m = std::max(m, part[i*stride]);
    }

    float   l   = args.head_sinks ? expf(sink - m) : 0.0f;
    float * dst = args.dst + row*args.n_embd_head_v;
    std::fill_n(dst, args.n_embd_head_v, 0.0f);

    for (int i = 0; i < n_split; ++i) {
        const float * p = part + i*stride;
        const float   w = expf(p[0] - m);
        l += w*p[1];
        for (int e = 0; e < args.n_embd_head_v; ++e) {
            dst[e] += w*p[2 + e];
        }
    }

    const float inv = l > 0.0f ? 1.0f/l : 0.0f;
    for (int e = 0; e < args.n_embd_head_v; ++e) {
        dst[e] *= inv;
    }
}

//
// decode
//

// n cells of all heads in a form that the kernels read 16 elements at a time
struct kv_rows {
    const char * data;
    int64_t      nb1; // cell
    int64_t      nb2; // head
    int          type;
};

// what is read after the rows at hand, fetched in step with them: all at once would fill the processor's miss buffers and
// stop the very loads it is meant to hide
struct next_rows {
    const char * data;
    int64_t      nb1;
    int64_t      nb2;
    int64_t      step; // bytes of a row for each 64 of the row at hand
};

// f(0), f(1), .. f(n - 1), each with a constant: what the index selects can then stay in a register
template <typename F, int... I>
static inline void unroll(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// the counterpart of elements [e, e + 32) of a row of type T
template <ggml_type T>
static inline void fetch_next(const char * row_next, int64_t step, int e) {
    constexpr int n_bytes = 2*get_size16<T>(); // no more than two lines
    const char * line = row_next + e*n_bytes/32*step/64;
    LMINF_PREFETCH(line);
    if (n_bytes > 64) {
        LMINF_PREFETCH(line + 64);
    }
}

// what the N rows of a group hold of each head, the heads `stride` floats apart
struct head_rows {
    float * data;
    int64_t stride;
};

// scores of N rows of q [N][n_embd] for n cells, res [n, up to a multiple of C][N]
template <ggml_type T, int N>
static void scores(const kv_rows & k, int n, int n_head, int n_embd, const head_rows & q, const head_rows & res, const next_rows & next) {
    // C cells of H heads at once. A row of q is loaded once for C cells, and K is walked as it lies in memory: a few
    // cells side by side, head after head
    constexpr int C = std::min(N_ACC/N, 8);
    constexpr int H = N_ACC/N/C;

    for (int c0 = 0; c0 < n; c0 += C) {
        for (int h0 = 0; h0 < n_head; h0 += H) {
            // what is too much repeats the last cell or head, and is dropped below
            const char * cell[C];
            const char * cell_next[C];
            for (int c = 0; c < C; ++c) {
                cell[c]      = k.data    + std::min(c0 + c, n - 1)*k.nb1;
                cell_next[c] = next.data + std::min(c0 + c, n - 1)*next.nb1;
            }

            vf acc[N_ACC];
            unroll([&](auto h) {
                const int     head = std::min(h0 + h, n_head - 1);
                const float * q_h  = q.data + head*q.stride;

                vf sum[C][N];
                for (int c = 0; c < C; ++c) {
                    for (int r = 0; r < N; ++r) {
                        sum[c][r] = vf_zero();
                    }
                }
                const auto add = [&](int e) {
                    vf x[C][N16];
                    for (int c = 0; c < C; ++c) {
                        load16<T>(cell[c] + head*k.nb2, e, x[c]);
                    }
                    for (int j = 0; j < N16; ++j) {
                        for (int r = 0; r < N; ++r) {
                            const vf y = vf_load(q_h + r*n_embd + e + j*LANES);
                            for (int c = 0; c < C; ++c) {
                                sum[c][r] = vf_fma(x[c][j], y, sum[c][r]);
                            }
                        }
                    }
                };

                int e = 0;
                for (; e + 32 <= n_embd; e += 32) {
                    for (int c = 0; c < C; ++c) {
                        fetch_next<T>(cell_next[c] + head*next.nb2, next.step, e);
                    }
                    add(e);
                    add(e + 16);
                }
                if (e < n_embd) {
                    add(e);
                }
                for (int c = 0; c < C; ++c) {
                    for (int r = 0; r < N; ++r) {
                        acc[(h*C + c)*N + r] = sum[c][r];
                    }
                }
            }, std::make_integer_sequence<int, H>());

            float sums[N_ACC]; // [H][C][N]
            vf_sums(acc, sums);
            for (int h = 0; h < H && h0 + h < n_head; ++h) {
                memcpy(res.data + (h0 + h)*res.stride + c0*N, sums + h*C*N, C*N*sizeof(float));
            }
        }
    }
}

// as many cells at once as make loading and storing sums cheap beside adding to them
static constexpr int N_CELLS_VALUES = 8;

// acc [N][n_embd] += p [n][N] times the rows of n cells
template <ggml_type T, int N>
static void add_values(const kv_rows & v, int n, int n_head, int n_embd, const head_rows & p, const head_rows & acc, const next_rows & next) {
    constexpr int U = N*N16 < N_ACC ? N_ACC/(N*N16) : 1; // so many times 16 elements at once

    for (int c0 = 0; c0 < n; c0 += N_CELLS_VALUES) {
        const int n_cells = std::min(N_CELLS_VALUES, n - c0);

        for (int h = 0; h < n_head; ++h) {
            const char  * row   = v.data + c0*v.nb1 + h*v.nb2;
            const float * p_h   = p.data + h*p.stride + c0*N;
            float       * acc_h = acc.data + h*acc.stride;

            const char * row_next = next.data + c0*next.nb1 + h*next.nb2;

            const auto add = [&](int e, auto units) {
                constexpr int M = units.value*N16;

                vf sum[N][M];
                for (int r = 0; r < N; ++r) {
                    for (int j = 0; j < M; ++j) {
                        sum[r][j] = vf_load(acc_h + r*n_embd + e + j*LANES);
                    }
                }
                const auto add_cell = [&](int c) {
                    vf x[M];
                    for (int u = 0; u < units.value; ++u) {
                        if (u % 2 == 0) {
                            fetch_next<T>(row_next + c*next.nb1, next.step, e + u*16);
                        }
                        load16<T>(row + c*v.nb1, e + u*16, x + u*N16);
                    }
                    for (int r = 0; r < N; ++r) {
                        const vf w = vf_set(p_h[c*N + r]);
                        for (int j = 0; j < M; ++j) {
                            sum[r][j] = vf_fma(w, x[j], sum[r][j]);
                        }
                    }
                };
                if (n_cells == N_CELLS_VALUES) {
                    for (int c = 0; c < N_CELLS_VALUES; ++c) {
                        add_cell(c);
                    }
                } else {
                    for (int c = 0; c < n_cells; ++c) {
                        add_cell(c);
                    }
                }
                for (int r = 0; r < N; ++r) {
                    for (int j = 0; j < M; ++j) {
                        vf_store(acc_h + r*n_embd + e + j*LANES, sum[r][j]);
                    }
                }
            };

            // as much at once as there are accumulators for: a single chain of additions would wait for itself
            int e = 0;
            const auto add_all = [&](auto units) {
                for (; e + 16*units.value <= n_embd; e += 16*units.value) {
                    add(e, units);
                }
            };
            if constexpr (U >= 16) { add_all(std::integral_constant<int, 16>()); }
            if constexpr (U >= 8)  { add_all(std::integral_constant<int, 8>()); }
            if constexpr (U >= 4)  { add_all(std::integral_constant<int, 4>()); }
            if constexpr (U >= 2)  { add_all(std::integral_constant<int, 2>()); }
            add_all(std::integral_constant<int, 1>());
        }
    }
}

typedef void (*scores_t)(const kv_rows & k, int n, int n_head, int n_embd, const head_rows & q, const head_rows & res, const next_rows & next);
typedef void (*add_values_t)(const kv_rows & v, int n, int n_head, int n_embd, const head_rows & p, const head_rows & acc, const next_rows & next);

template <ggml_type T> static scores_t get_scores(int n_rows) {
    return n_rows == 1 ? scores<T, 1> : n_rows == 2 ? scores<T, 2> : scores<T, 4>;
}

template <ggml_type T> static add_values_t get_add_values(int n_rows) {
    return n_rows == 1 ? add_values<T, 1> : n_rows == 2 ? add_values<T, 2> : add_values<T, 4>;
}

static scores_t get_scores(int type, int n_rows) {
    switch (type) {
        case GGML_TYPE_F32:  return get_scores<GGML_TYPE_F32> (n_rows);
        case GGML_TYPE_F16:  return get_scores<GGML_TYPE_F16> (n_rows);
        case GGML_TYPE_BF16: return get_scores<GGML_TYPE_BF16>(n_rows);
        case GGML_TYPE_Q8_0: return get_scores<GGML_TYPE_Q8_0>(n_rows);
        case GGML_TYPE_Q4_0: return get_scores<GGML_TYPE_Q4_0>(n_rows);
        default: GGML_ABORT("no K of this type");
    }
}

static add_values_t get_add_values(int type, int n_rows) {
    switch (type) {
        case GGML_TYPE_F32:  return get_add_values<GGML_TYPE_F32> (n_rows);
        case GGML_TYPE_F16:  return get_add_values<GGML_TYPE_F16> (n_rows);
        case GGML_TYPE_BF16: return get_add_values<GGML_TYPE_BF16>(n_rows);
        case GGML_TYPE_Q8_0: return get_add_values<GGML_TYPE_Q8_0>(n_rows);
        case GGML_TYPE_Q4_0: return get_add_values<GGML_TYPE_Q4_0>(n_rows);
        default: GGML_ABORT("no V of this type");
    }
}

// the rows of a KV head in groups of 4, 2 or 1 that are worked on together; 3 are taken for 4
struct row_group {
    int first;
    int size;
};

static int get_padded_rows(int n_rows) {
    return n_rows % 4 == 3 ? n_rows + 1 : n_rows;
}

static int get_row_groups(int n_rows, row_group * groups) {
    int n = 0;
    for (int r = 0; r < n_rows;) {
        const int size = n_rows - r >= 3 ? 4 : n_rows - r;
        groups[n++] = { r, size };
        r += size;
    }
    return n;
}

static constexpr int N_BLOCK_MAX = 64;

// cells in a block: its K and V should stay in the second level cache from when they are fetched to when they are read
static int get_n_block(int64_t nb1) {
    int n = N_BLOCK_MAX;
    while (n > 16 && n*nb1 > 64*1024) {
        n /= 2;
    }
    return n;
}

// running state of the rows of one KV head, padded to whole groups
struct decode_state {
    float * q;      // [n_rows][n_embd_k]
    float * q_sink;
    float * acc;    // [n_rows][n_embd_v]
    float * m;      // [n_rows]
    float * l;
};

static size_t get_decode_state_size(int n_padded, int n_embd_k, int n_embd_v) {
    return pad16(n_padded*(2*n_embd_k + n_embd_v + 2));
}

static decode_state get_decode_state(float * data, int n_padded, int n_embd_k, int n_embd_v) {
    decode_state res;
    res.q      = data;
    res.q_sink = res.q      + n_padded*n_embd_k;
    res.acc    = res.q_sink + n_padded*n_embd_k;
    res.m      = res.acc    + n_padded*n_embd_v;
    res.l      = res.m      + n_padded;
    return res;
}

// cells that are read by several groups of rows, or converted first, before the next ones are
static constexpr int N_CELLS_STEP = 8;

// per thread: the state and the scores of a block of all KV heads, and N_CELLS_STEP cells of K or V if they must be converted
static size_t get_decode_scratch_size(const lminf_attn_args & args) {
    const int n_embd_k = pad16(args.n_embd_head_k);
    const int n_embd_v = pad16(args.n_embd_head_v);
    const int n_padded = get_padded_rows(args.n_q*(args.n_head/args.n_head_kv));

    return args.n_head_kv*(get_decode_state_size(n_padded, n_embd_k, n_embd_v) +
        n_padded*N_BLOCK_MAX + N_CELLS_STEP*std::max(n_embd_k, n_embd_v));
}

// scores s [pad16(n)][N] to weights; false if no cell is seen. m, l and acc are those of the group's first row
template <int N>
static bool decode_softmax(float * s, int n, float * m, float * l, float * acc, int n_embd_v) {
    static_assert(LANES % N == 0, "lane i is one of row i % N");

    const int n_all = pad16(n)*N;

    std::fill(s + n*N, s + n_all, -INFINITY);

    vf v_max = vf_set(NO_SCORE);
    for (int i = 0; i < n_all; i += LANES) {
        v_max = vf_max(v_max, vf_load(s + i));
    }

    float lanes[LANES];
    vf_store(lanes, v_max);

    float row_max[N];
    std::fill_n(row_max, N, NO_SCORE);
    for (int i = 0; i < LANES; ++i) {
        row_max[i % N] = std::max(row_max[i % N], lanes[i]);
    }

    bool seen = false;
    for (int r = 0; r < N; ++r) {
        seen = seen || row_max[r] > NO_SCORE;
        if (row_max[r] > m[r]) {
            const float w = expf(m[r] - row_max[r]);
            for (int e = 0; e < n_embd_v; ++e) {
                acc[r*n_embd_v + e] *= w;
            }
            l[r] *= w;
            m[r]  = row_max[r];
        }
    }

    for (int i = 0; i < LANES; ++i) {
        lanes[i] = m[i % N];
    }
    const vf v_m = vf_load(lanes);

    vf v_l = vf_zero();
    for (int i = 0; i < n_all; i += LANES) {
        const vf p = vf_exp(vf_sub(vf_load(s + i), v_m));
        v_l = vf_add(v_l, p);
        vf_store(s + i, p);
    }

    vf_store(lanes, v_l);
    for (int i = 0; i < LANES; ++i) {
        l[i % N] += lanes[i];
    }
    return seen;
}

static bool must_convert(int n_embd) {
    return n_embd % 16 != 0;
}

static next_rows get_next_rows(const lminf_attn_operand & next, const lminf_attn_operand & t, int c0, int i_stream) {
    return { get_row(next, c0, 0, i_stream), next.nb1, next.nb2, 64*next.nb2/t.nb2 };
}

// nothing new
static next_rows get_next_rows(const kv_rows & t) {
    return { t.data, t.nb1, t.nb2, 64 };
}

// as they lie in memory, or converted in `buffer` [n][n_head][pad16(n_embd)]
static kv_rows get_rows(const lminf_attn_operand & t, int c0, int i_stream, int n, int n_head, int n_embd, float * buffer) {
    const char * data = get_row(t, c0, 0, i_stream);

    if (!must_convert(n_embd)) {
        return { data, t.nb1, t.nb2, t.type };
    }
    const int64_t n_row = pad16(n_embd);
    for (int c = 0; c < n; ++c) {
        load_rows(data + c*t.nb1, t.nb2, t.type, n_head, n_embd, buffer + c*n_head*n_row);
    }
    return { (const char *) buffer, (int64_t) (n_head*n_row*sizeof(float)), (int64_t) (n_row*sizeof(float)), GGML_TYPE_F32 };
}

static void decode(const lminf_attn_args & args, float * scratch, float * parts, int ith, int nth) {
    const int n_group  = args.n_head/args.n_head_kv;
    const int n_rows   = args.n_q*n_group; // of one KV head: row = query*n_group + head
    const int n_embd_k = pad16(args.n_embd_head_k);
    const int n_embd_v = pad16(args.n_embd_head_v);

    row_group groups[N_ROWS_DECODE];
    const int n_groups = get_row_groups(n_rows, groups);

    const int     n_padded = get_padded_rows(n_rows);
    const int64_t n_state  = get_decode_state_size(n_padded, n_embd_k, n_embd_v);

    float * s     = scratch + args.n_head_kv*n_state; // [n_head_kv][groups: [N_BLOCK_MAX][group size]]
    float * block = s + args.n_head_kv*n_padded*N_BLOCK_MAX;

    const decode_state states  = get_decode_state(scratch, n_padded, n_embd_k, n_embd_v); // of head 0, the others n_state apart
    const int64_t      n_score = n_padded*N_BLOCK_MAX;

    kv_part kv[2];
    const int n_kv_parts = get_parts(args, kv);

    for (int i_stream = 0; i_stream < args.n_stream; ++i_stream) {
        for (int h = 0; h < args.n_head_kv; ++h) {
            float * data = scratch + h*n_state;
            std::fill_n(data, n_state, 0.0f);

            const decode_state state = get_decode_state(data, n_padded, n_embd_k, n_embd_v);
            for (int r = 0; r < n_rows; ++r) {
                const int head = h*n_group + r % n_group;
                load_q(args, get_row(args.q, r/n_group, head, i_stream), state.q + r*n_embd_k);
                if (args.n_sink > 0) {
                    load_q(args, get_row(args.q_sink, r/n_group, head, i_stream), state.q_sink + r*n_embd_k);
                }
            }
            std::fill_n(state.m, n_padded, NO_SCORE);
        }

        int i_block = 0; // over sinks and window: the threads take turns

        for (int i_part = 0; i_part < n_kv_parts; ++i_part) {
            const kv_part & part = kv[i_part];

            const int  n_block = get_n_block(part.k.nb1);
            const bool is_sink = part.mask < args.n_sink;

            for (int c0 = 0; c0 < part.n; c0 += n_block, ++i_block) {
                if (i_block % nth != ith) {
                    continue;
                }

                const int n = std::min(n_block, part.n - c0);

                const mask_state mask = get_mask_state(args, part.mask + c0, n, 0, args.n_q, i_stream);
                if (mask == MASK_CLOSED) {
                    continue;
                }

                // V is fetched while K is read, and the K of this thread's next block while V is
                const int c1 = c0 + n_block*nth < part.n ? c0 + n_block*nth : c0;

                const auto walk = [&](const lminf_attn_operand & t, int n_embd, const lminf_attn_operand & t_next, int c_next, auto read) {
                    const bool convert = must_convert(n_embd);
                    const int  step    = n_groups == 1 && !convert ? n : N_CELLS_STEP;

                    for (int c = 0; c < n; c += step) {
                        const int     n_cells = std::min(step, n - c);
                        const kv_rows rows    = get_rows(t, c0 + c, i_stream, n_cells, args.n_head_kv, n_embd, block);
                        for (int g = 0; g < n_groups; ++g) {
                            const bool fetch = g == 0 && !convert;
                            read(rows, c, n_cells, groups[g], fetch ? get_next_rows(t_next, t, c_next + c, i_stream) : get_next_rows(rows));
                        }
                    }
                };

                walk(part.k, args.n_embd_head_k, part.v, c0, [&](const kv_rows & k, int c, int n_cells, const row_group & g, const next_rows & next) {
                    const head_rows q   = { (is_sink ? states.q_sink : states.q) + g.first*n_embd_k, n_state };
                    const head_rows res = { s + g.first*N_BLOCK_MAX + c*g.size, n_score };
                    get_scores(k.type, g.size)(k, n_cells, args.n_head_kv, n_embd_k, q, res, next);
                });

                bool seen = false;
                for (int h = 0; h < args.n_head_kv; ++h) {
                    const decode_state state = get_decode_state(scratch + h*n_state, n_padded, n_embd_k, n_embd_v);

                    for (int g = 0; g < n_groups; ++g) {
                        const int first = groups[g].first;
                        const int size  = groups[g].size;

                        float * s_g = s + h*n_score + first*N_BLOCK_MAX;

                        if (args.logit_softcap > 0.0f) {
                            soft_cap(args.logit_softcap, s_g, n*size);
                        }
                        if (mask == MASK_MIXED) {
                            for (int r = 0; r < size; ++r) {
                                const int     row  = std::min(first + r, n_rows - 1);
                                const float * bias = get_mask(args, row/n_group, i_stream) + part.mask + c0;
                                const float   w    = lminf_attn_slope(&args, h*n_group + row % n_group);
                                for (int c = 0; c < n; ++c) {
                                    s_g[c*size + r] += w*bias[c];
                                }
                            }
                        }
                        const auto softmax = size == 1 ? decode_softmax<1> : size == 2 ? decode_softmax<2> : decode_softmax<4>;
                        seen |= softmax(s_g, n, state.m + first, state.l + first, state.acc + first*n_embd_v, n_embd_v);
                    }
                }
                if (!seen) {
                    continue;
                }

                walk(part.v, args.n_embd_head_v, part.k, c1, [&](const kv_rows & v, int c, int n_cells, const row_group & g, const next_rows & next) {
                    const head_rows p   = { s + g.first*N_BLOCK_MAX + c*g.size, n_score };
                    const head_rows acc = { states.acc + g.first*n_embd_v, n_state };
                    get_add_values(v.type, g.size)(v, n_cells, args.n_head_kv, n_embd_v, p, acc, next);
                });
            }
        }

        for (int h = 0; h < args.n_head_kv; ++h) {
            const decode_state state = get_decode_state(scratch + h*n_state, n_padded, n_embd_k, n_embd_v);
            for (int r = 0; r < n_rows; ++r) {
                const int64_t row = get_row_index(args, i_stream, r/n_group, h*n_group + r % n_group);
                float * res = parts + (ith*get_n_rows(args) + row)*get_part_size(args);
                res[0] = state.m[r];
                res[1] = state.l[r];
                std::copy_n(state.acc + r*n_embd_v, args.n_embd_head_v, res + 2);
            }
        }
    }
}

//
// tiles
//

static constexpr int N_TILE_ROWS  = 64;
static constexpr int N_TILE_CELLS = 64;

// C [M][N*LANES] += A [M][n] * B [n][N*LANES], or = without `add`
template <int M, int N>
static void gemm_block(const float * a, int a_row, int a_col, const float * b, int ldb, float * c, int ldc, int n, bool add) {
    vf acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = add ? vf_load(c + i*ldc + j*LANES) : vf_zero();
        }
    }
    for (int k = 0; k < n; ++k) {
        vf x[N];
        for (int j = 0; j < N; ++j) {
            x[j] = vf_load(b + k*ldb + j*LANES);
        }
        for (int i = 0; i < M; ++i) {
            const vf y = vf_set(a[i*a_row + k*a_col]);
            for (int j = 0; j < N; ++j) {
                acc[i][j] = vf_fma(y, x[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            vf_store(c + i*ldc + j*LANES, acc[i][j]);
        }
    }
}

template <int N>
static void gemm_columns(const float * a, int a_row, int a_col, const float * b, int ldb, float * c, int ldc, int m, int n, bool add) {
    int i = 0;
    for (; i + 6 <= m; i += 6) {
        gemm_block<6, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add);
    }
    switch (m - i) {
        case 5: gemm_block<5, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add); break;
        case 4: gemm_block<4, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add); break;
        case 3: gemm_block<3, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add); break;
        case 2: gemm_block<2, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add); break;
        case 1: gemm_block<1, N>(a + i*a_row, a_row, a_col, b, ldb, c + i*ldc, ldc, n, add); break;
        default: break;
    }
}

// C [m][n_col] = A [m][n] * B [n][n_col], added to what is there if `add`; n_col a multiple of LANES. A's element (i, k)
// is a[i*a_row + k*a_col]
static void gemm(const float * a, int a_row, int a_col, const float * b, int ldb, float * c, int ldc, int m, int n_col, int n, bool add) {
    constexpr int N = N_REG >= 32 ? 4 : 2; // 6*N accumulators

    int j = 0;
    for (; j + N*LANES <= n_col; j += N*LANES) {
        gemm_columns<N>(a, a_row, a_col, b + j, ldb, c + j, ldc, m, n, add);
    }
    for (; j < n_col; j += LANES) {
        gemm_columns<1>(a, a_row, a_col, b + j, ldb, c + j, ldc, m, n, add);
    }
}

// all matrices have a column for each row of the tile: [.][N_TILE_ROWS]
struct tile_state {
    float * q;      // [n_embd_k]
    float * q_sink; // [n_embd_k]
    float * acc;    // [n_embd_v]
    float * s;      // [N_TILE_CELLS]
    float * m;      // [1]
    float * l;      // [1]
    float * block;  // [N_TILE_CELLS][n_embd] of K or V
};

static size_t get_tile_state_size(const lminf_attn_args & args) {
    const int n_embd_k = pad16(args.n_embd_head_k);
    const int n_embd_v = pad16(args.n_embd_head_v);
    return (size_t) N_TILE_ROWS*(2*n_embd_k + n_embd_v + N_TILE_CELLS + 2) + N_TILE_CELLS*std::max(n_embd_k, n_embd_v);
}

static tile_state get_tile_state(const lminf_attn_args & args, float * data) {
    const int n_embd_k = pad16(args.n_embd_head_k);
    const int n_embd_v = pad16(args.n_embd_head_v);

    tile_state res;
    res.q      = data;
    res.q_sink = res.q      + N_TILE_ROWS*n_embd_k;
    res.acc    = res.q_sink + N_TILE_ROWS*n_embd_k;
    res.s      = res.acc    + N_TILE_ROWS*n_embd_v;
    res.m      = res.s      + N_TILE_ROWS*N_TILE_CELLS;
    res.l      = res.m      + N_TILE_ROWS;
    res.block  = res.l      + N_TILE_ROWS;
    return res;
}

// scores of n cells to weights; n_col columns are in use
static void tile_softmax(const tile_state & state, int n, int n_col, int n_embd_v) {
    for (int j = 0; j < n_col; j += LANES) {
        const vf m_old = vf_load(state.m + j);

        vf m = m_old;
        for (int c = 0; c < n; ++c) {
            m = vf_max(m, vf_load(state.s + c*N_TILE_ROWS + j));
        }
        vf_store(state.m + j, m);

        const vf w = vf_exp(vf_sub(m_old, m));

        vf l = vf_mul(w, vf_load(state.l + j));
        for (int c = 0; c < n; ++c) {
            float * s = state.s + c*N_TILE_ROWS + j;
            const vf p = vf_exp(vf_sub(vf_load(s), m));
            vf_store(s, p);
            l = vf_add(l, p);
        }
        vf_store(state.l + j, l);

        float lanes[LANES];
        vf_store(lanes, w);
        if (std::any_of(lanes, lanes + LANES, [](float x) { return x != 1.0f; })) {
            for (int e = 0; e < n_embd_v; ++e) {
                float * acc = state.acc + e*N_TILE_ROWS + j;
                vf_store(acc, vf_mul(w, vf_load(acc)));
            }
        }
    }
}

// rows [r0, r0 + n_rows) of a KV head (row = query*n_group + head) and the i_split-th of n_split shares of its cells
static void tile(const lminf_attn_args & args, const tile_state & state, float * parts,
        int i_stream, int h, int r0, int n_rows, int i_split, int n_split) {
    const int n_group  = args.n_head/args.n_head_kv;
    const int n_col    = (n_rows + LANES - 1)/LANES*LANES;
    const int n_embd_k = args.n_embd_head_k;
    const int n_embd_v = args.n_embd_head_v;

    const int q0 = r0/n_group;
    const int q1 = (r0 + n_rows - 1)/n_group + 1;

    // rows become columns; those past the last one are zeros
    const auto load_columns = [&](const lminf_attn_operand & q, float * res) {
        std::fill_n(res, (size_t) n_embd_k*N_TILE_ROWS, 0.0f);
        for (int r = 0; r < n_rows; ++r) {
            const float * row = (const float *) get_row(q, (r0 + r)/n_group, h*n_group + (r0 + r) % n_group, i_stream);
            for (int e = 0; e < n_embd_k; ++e) {
                res[e*N_TILE_ROWS + r] = args.scale*row[e];
            }
        }
    };

    load_columns(args.q, state.q);
    if (args.n_sink > 0) {
        load_columns(args.q_sink, state.q_sink);
    }
    std::fill_n(state.acc, (size_t) n_embd_v*N_TILE_ROWS, 0.0f);
    std::fill_n(state.m, N_TILE_ROWS, NO_SCORE);
    std::fill_n(state.l, N_TILE_ROWS, 0.0f);

    kv_part kv[2];
    const int n_kv_parts = get_parts(args, kv);

    int i_tile = 0;

    for (int i_part = 0; i_part < n_kv_parts; ++i_part) {
        const kv_part & part = kv[i_part];

        for (int c0 = 0; c0 < part.n; c0 += N_TILE_CELLS, ++i_tile) {
            if (i_tile % n_split != i_split) {
                continue;
            }

            const int n = std::min(N_TILE_CELLS, part.n - c0);

            const mask_state mask = get_mask_state(args, part.mask + c0, n, q0, q1, i_stream);
            if (mask == MASK_CLOSED) {
                continue;
            }

            load_rows(get_row(part.k, c0, h, i_stream), part.k.nb1, part.k.type, n, n_embd_k, state.block);
            gemm(state.block, pad16(n_embd_k), 1, part.mask < args.n_sink ? state.q_sink : state.q, N_TILE_ROWS,
                    state.s, N_TILE_ROWS, n, n_col, n_embd_k, false);

            if (args.logit_softcap > 0.0f) {
                for (int c = 0; c < n; ++c) {
                    soft_cap(args.logit_softcap, state.s + c*N_TILE_ROWS, n_rows);
                }
            }
            if (mask == MASK_MIXED) {
                for (int r = 0; r < n_rows; ++r) {
                    const float * bias = get_mask(args, (r0 + r)/n_group, i_stream) + part.mask + c0;
                    const float   w    = lminf_attn_slope(&args, h*n_group + (r0 + r) % n_group);
                    for (int c = 0; c < n; ++c) {
                        state.s[c*N_TILE_ROWS + r] += w*bias[c];
                    }
                }
            }

            tile_softmax(state, n, n_col, n_embd_v);

            load_rows(get_row(part.v, c0, h, i_stream), part.v.nb1, part.v.type, n, n_embd_v, state.block);
            gemm(state.block, 1, pad16(n_embd_v), state.s, N_TILE_ROWS, state.acc, N_TILE_ROWS, n_embd_v, n_col, n, true);
        }
    }

    for (int r = 0; r < n_rows; ++r) {
        const int64_t row = get_row_index(args, i_stream, (r0 + r)/n_group, h*n_group + (r0 + r) % n_group);
        float * res = parts + (i_split*get_n_rows(args) + row)*get_part_size(args);
        res[0] = state.m[r];
        res[1] = state.l[r];
        for (int e = 0; e < n_embd_v; ++e) {
            res[2 + e] = state.acc[e*N_TILE_ROWS + r];
        }
    }
}

static int get_n_row_tiles(const lminf_attn_args & args) {
    return (args.n_q*(args.n_head/args.n_head_kv) + N_TILE_ROWS - 1)/N_TILE_ROWS;
}

// tiles are shared between threads by their cells where there are fewer tiles than threads
static int get_n_split(const lminf_attn_args & args, int nth) {
    const int n_items = args.n_stream*args.n_head_kv*get_n_row_tiles(args);
    return n_items >= nth ? 1 : (nth + n_items - 1)/n_items;
}

static void tiles(const lminf_attn_args & args, float * scratch, float * parts, int ith, int nth) {
    const int n_rows      = args.n_q*(args.n_head/args.n_head_kv);
    const int n_row_tiles = get_n_row_tiles(args);
    const int n_split     = get_n_split(args, nth);
    const int n_items     = args.n_stream*args.n_head_kv*n_row_tiles*n_split;

    const tile_state state = get_tile_state(args, scratch);

    for (int i = ith; i < n_items; i += nth) {
        const int i_split = i % n_split;
        const int i_tile  = i/n_split % n_row_tiles;
        const int h       = i/n_split/n_row_tiles % args.n_head_kv;
        const int r0      = i_tile*N_TILE_ROWS;

        tile(args, state, parts, i/n_split/n_row_tiles/args.n_head_kv, h, r0, std::min(N_TILE_ROWS, n_rows - r0), i_split, n_split);
    }
}

//
// the operation
//

static bool use_decode(const lminf_attn_args & args) {
    return args.n_q*(args.n_head/args.n_head_kv) <= N_ROWS_DECODE;
}

// floats, a whole number of cache lines
static size_t get_scratch_size(const lminf_attn_args & args) {
    const size_t n = use_decode(args) ? get_decode_scratch_size(args) : get_tile_state_size(args);
    return (n + 15)/16*16;
}

size_t ggml_lminf_attn_work_size(const ggml_tensor * op, int n_threads) {
    const lminf_attn_args args = lminf_attn_get_args(op);

    const int    n_split = use_decode(args) ? n_threads : get_n_split(args, n_threads);
    const size_t n       = n_threads*get_scratch_size(args) + n_split*get_n_rows(args)*get_part_size(args);

    return n*sizeof(float);
}

void ggml_compute_forward_lminf_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const lminf_attn_args args = lminf_attn_get_args(dst);

    const int ith = params->ith;
    const int nth = params->nth;

    float * scratch = (float *) params->wdata + ith*get_scratch_size(args);
    float * parts   = (float *) params->wdata + nth*get_scratch_size(args);

    if (use_decode(args)) {
        decode(args, scratch, parts, ith, nth);
    } else {
        tiles(args, scratch, parts, ith, nth);
    }

    ggml_barrier(params->threadpool);

    const int n_split = use_decode(args) ? nth : get_n_split(args, nth);
    for (int64_t row = ith; row < get_n_rows(args); row += nth) {
        merge_parts(args, parts, n_split, row);
    }
}
