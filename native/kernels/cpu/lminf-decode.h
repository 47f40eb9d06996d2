// the decode kernel: a few query rows per KV head
//
// Cells are dealt out to the threads in blocks. A block is read in memory order while what comes next is prefetched; each K
// and V row serves its whole group of query heads. Bound by memory.

#pragma once

#include "lminf-attn-shared.h"

#include <utility>

// up to so many rows per KV head the decode kernel is faster (measured with head sizes 64 to 576; not on ARM)
static constexpr int N_ROWS_DECODE = LANES == 16 ? 24 : LANES == 8 ? 16 : 8;

static constexpr int N_BLOCK_MAX = 64; // cells in a block

// n cells of all heads in a form that the kernels read 16 elements at a time
struct kv_rows {
    const char * data;
    int64_t      nb1; // cell
    int64_t      nb2; // head
    int          type;
};

// n cells that are read after those at hand, fetched in step with them: all at once would fill the processor's miss buffers
// and stop the very loads it is meant to hide
struct next_rows {
    const char * data;
    int64_t      nb1;
    int64_t      nb2;
    int64_t      step; // bytes of a row for each 64 of the row at hand
    int          n;

    const char * get_cell(int i) const { return data + std::min(i, n - 1)*nb1; }
};

// f(0), f(1), .. f(n - 1), each with a constant: what the index selects can then stay in a register
template <typename F, int... I>
static inline void unroll(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// the counterpart of elements [e, e + 32) of a row of type T; not all of it where its own type is a larger one
template <ggml_type T>
static inline void fetch_next(const char * row_next, int64_t step, int e) {
    constexpr int n_bytes = 2*get_size16<T>();
    const char * line = row_next + e*n_bytes/32*step/64;
    LMINF_PREFETCH(line);
    if constexpr (n_bytes > 64) {
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
    static constexpr int C = std::min(N_ACC/N, 8);
    static constexpr int H = N_ACC/N/C;

    for (int c0 = 0; c0 < n; c0 += C) {
        for (int h0 = 0; h0 < n_head; h0 += H) {
            // what is too much repeats the last cell or head, and is dropped below
            const char * cell[C];
            const char * cell_next[C];
            for (int c = 0; c < C; ++c) {
                cell[c]      = k.data    + std::min(c0 + c, n - 1)*k.nb1;
                cell_next[c] = next.get_cell(c0 + c);
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

            if constexpr (H == 1) {
                vf_sums(acc, res.data + h0*res.stride + c0*N);
            } else {
                float sums[N_ACC]; // [H][C][N]
                vf_sums(acc, sums);
                for (int h = 0; h < H && h0 + h < n_head; ++h) {
                    memcpy(res.data + (h0 + h)*res.stride + c0*N, sums + h*C*N, C*N*sizeof(float));
                }
            }
        }
    }
}

// Queries for keys that are blocks of integers: rounded to 16 bits, and multiplied as such. In place, N rows of q [N][n_embd]
// become [N][2*n_embd] numbers of 16 bits, of which the first n_embd of a row are its elements; behind those of the first
// row lie LANES floats, what row i % N was divided by.
static int get_q_factors(int n_embd) { return n_embd/2; }

static void pack_q(float * q, int n_rows, int n_embd) {
    float factor[4];

    for (int r = 0; r < n_rows; ++r) {
        float   * row = q + r*n_embd;
        int16_t * res = (int16_t *) row;

        float max = 0.0f;
        float nan = 0.0f; // if an element is: the factor must be as well
        for (int e = 0; e < n_embd; ++e) {
            max  = std::max(max, std::fabs(row[e]));
            nan += 0.0f*row[e];
        }
        const bool is_zero = !(max > 1e-30f) || nan != 0.0f;

        const float scale = is_zero ? 0.0f : 32767.0f/max;
        factor[r] = max/32767.0f + nan;

        for (int e0 = 0; e0 < n_embd; e0 += 16) { // what is written lies before what is still to be read
            float part[16];
            for (int i = 0; i < 16; i += LANES) {
                vf_store(part + i, vf_round(vf_mul(vf_set(scale), vf_load(row + e0 + i))));
            }
            int16_t ints[16];
            for (int e = 0; e < 16; ++e) {
                ints[i16_place(e)] = is_zero ? 0 : (int16_t) part[e];
            }
            memcpy(res + e0, ints, sizeof(ints));
        }
    }
    for (int i = 0; i < LANES; ++i) {
        q[get_q_factors(n_embd) + i] = factor[i % n_rows];
    }
}

// as scores, of q as pack_q leaves it
template <ggml_type T, int N>
static void scores_i16(const kv_rows & k, int n, int n_head, int n_embd, const head_rows & q, const head_rows & res, const next_rows & next) {
    static constexpr int C = LANES/N; // cells whose sums are a vector [C][N]
    static constexpr int V = 4/N;     // vectors of integers that they are loaded into: cell i*V + v is part i of number v

    constexpr int n_bytes = 2*get_size16<T>();
    const int64_t n_fetch = n_bytes*next.step/64;

    for (int c0 = 0; c0 < n; c0 += C) {
        // from the first of these cells on
        int64_t at[C];
        int64_t at_next[C];
        for (int c = 0; c < C; ++c) {
            at[c]      = (std::min(c0 + c, n - 1) - c0)*k.nb1;
            at_next[c] = next.get_cell(c0 + c) - next.data;
        }

        for (int h = 0; h < n_head; ++h) {
            const float   * q_h   = q.data + h*q.stride;
            const int16_t * q_i16 = (const int16_t *) q_h;
            const char    * row   = k.data    + c0*k.nb1 + h*k.nb2;
            const char    * fetch = next.data + h*next.nb2;

            vf sum = vf_zero();

            for (int e = 0; e < n_embd; e += 32, q_i16 += 32, row += n_bytes, fetch += n_fetch) {
                vi32 dot[4]; // [V][N]
                for (int v = 0; v < V; ++v) {
                    const char * block[N_PARTS];
                    for (int i = 0; i < N_PARTS; ++i) {
                        LMINF_PREFETCH(fetch + at_next[i*V + v]);
                        block[i] = row + at[i*V + v];
                    }
                    vi8 x[2];
                    load32_i8<T>(block, x);

                    for (int r = 0; r < N; ++r) {
                        dot[v*N + r] = vi32_zero();
                    }
                    for (int j = 0; j < 4; ++j) {
                        const vi16 y = vi16_of(x[j/2], j%2);
                        for (int r = 0; r < N; ++r) {
                            dot[v*N + r] = vi32_dot(dot[v*N + r], y, vi16_set(q_i16 + r*2*n_embd + j*8));
                        }
                    }
                }
                sum = vf_fma(vf_parts(dot), vf_f16s<N>(row, at), sum);
            }
            sum = vf_mul(sum, vf_load(q_h + get_q_factors(n_embd)));

            float * res_h = res.data + h*res.stride + c0*N;
            if (c0 + C <= n) {
                vf_store(res_h, sum);
            } else {
                float lanes[LANES];
                vf_store(lanes, sum);
                std::copy_n(lanes, (n - c0)*N, res_h);
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

        const char * cell_next[N_CELLS_VALUES];
        for (int c = 0; c < N_CELLS_VALUES; ++c) {
            cell_next[c] = next.get_cell(c0 + c);
        }

        for (int h = 0; h < n_head; ++h) {
            const char  * row   = v.data + c0*v.nb1 + h*v.nb2;
            const float * p_h   = p.data + h*p.stride + c0*N;
            float       * acc_h = acc.data + h*acc.stride;

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
                            fetch_next<T>(cell_next[c] + h*next.nb2, next.step, e + u*16);
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
                if (n_cells == N_CELLS_VALUES) { // a constant number, unrolled: the sums stay in registers
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

// As add_values, with weights that are multiplied by a block's factor, then rounded to 16 bits beside the largest one of these
// cells, and multiplied as such: two cells at once
template <ggml_type T, int N>
static void add_values_i16(const kv_rows & v, int n, int n_head, int n_embd, const head_rows & p, const head_rows & acc, const next_rows & next) {
    static constexpr int C = LANES/N;   // cells whose weights are a vector [C][N]
    static constexpr int E = 2*LANES;   // elements at once

    constexpr int n_bytes = 2*get_size16<T>();
    const int64_t n_fetch = n_bytes*next.step/64;

    const int n_pairs = (n + 2*C - 1)/(2*C); // pairs of vectors

    int64_t at[N_BLOCK_MAX];
    int64_t at_next[N_BLOCK_MAX];
    for (int c = 0; c < 2*C*n_pairs; ++c) {
        at[c]      = std::min(c, n - 1)*v.nb1;
        at_next[c] = next.get_cell(c) - next.data;
    }

    for (int h = 0; h < n_head; ++h) {
        const float * p_h   = p.data    + h*p.stride;
        const char  * row   = v.data    + h*v.nb2;
        const char  * fetch = next.data + h*next.nb2;

        for (int e0 = 0; e0 < n_embd; e0 += 32, row += n_bytes, fetch += n_fetch) {
            vf w[N_BLOCK_MAX/C];
            vf max = vf_zero();
            for (int i = 0; i < 2*n_pairs; ++i) {
                w[i] = i*C < n ? vf_mul(vf_load(p_h + i*LANES), vf_f16s<N>(row, at + i*C)) : vf_zero();
                max  = vf_max(max, T == GGML_TYPE_Q4_0 ? vf_max(w[i], vf_sub(vf_zero(), w[i])) : w[i]); // whose factors have a sign
            }

            float lanes[LANES];
            vf_store(lanes, max);
            for (int i = N; i < LANES; ++i) {
                lanes[i % N] = std::max(lanes[i % N], lanes[i]);
            }
            float factor[N];
            for (int i = 0; i < LANES; ++i) {
                lanes[i] = lanes[i % N];
            }
            for (int r = 0; r < N; ++r) {
                factor[r] = lanes[r]/32767.0f;
            }
            for (int i = 0; i < LANES; ++i) {
                lanes[i] = lanes[i] > 1e-30f ? 32767.0f/lanes[i] : 0.0f;
            }
            const vf scale = vf_load(lanes);

            int16_t pairs[N_PAIR*N_BLOCK_MAX*N/2];
            for (int i = 0; i < n_pairs; ++i) {
                vi16_store_pairs(pairs + i*N_PAIR*LANES, vf_mul(scale, w[2*i]), vf_mul(scale, w[2*i + 1]));
            }

            for (int e = 0; e < 32; e += E) {
                vi32 sum[N][2];
                for (int r = 0; r < N; ++r) {
                    sum[r][0] = sum[r][1] = vi32_zero();
                }
                for (int i = 0; i < n_pairs; ++i) {
                    for (int c = 0; c < C; ++c) {
                        const int c0 = i*2*C + c;
                        if (e == 0) {
                            LMINF_PREFETCH(fetch + at_next[c0]);
                            LMINF_PREFETCH(fetch + at_next[c0 + C]);
                        }
                        vi16 x[2];
                        vi16_zip(load_i16<T>(row + at[c0], e), load_i16<T>(row + at[c0 + C], e), x);
                        for (int r = 0; r < N; ++r) {
                            const vi16 y = vi16_pair(pairs + (i*LANES + c*N + r)*N_PAIR);
                            sum[r][0] = vi32_dot(sum[r][0], x[0], y);
                            sum[r][1] = vi32_dot(sum[r][1], x[1], y);
                        }
                    }
                }
                for (int r = 0; r < N; ++r) {
                    float * acc_r = acc.data + h*acc.stride + r*n_embd + e0 + e;

                    vf x[2];
                    vf_unzip(sum[r], x);
                    vf_store(acc_r,         vf_fma(x[0], vf_set(factor[r]), vf_load(acc_r)));
                    vf_store(acc_r + LANES, vf_fma(x[1], vf_set(factor[r]), vf_load(acc_r + LANES)));
                }
            }
        }
    }
}

typedef void (*scores_t)(const kv_rows & k, int n, int n_head, int n_embd, const head_rows & q, const head_rows & res, const next_rows & next);
typedef void (*add_values_t)(const kv_rows & v, int n, int n_head, int n_embd, const head_rows & p, const head_rows & acc, const next_rows & next);

template <ggml_type T, int N> static scores_t get_scores() {
    if constexpr (has_integers(T)) {
        return scores_i16<T, N>;
    } else {
        return scores<T, N>;
    }
}

template <ggml_type T> static scores_t get_scores(int n_rows) {
    return n_rows == 1 ? get_scores<T, 1>() : n_rows == 2 ? get_scores<T, 2>() : get_scores<T, 4>();
}

template <ggml_type T, int N> static add_values_t get_add_values() {
    if constexpr (has_integers(T)) {
        return add_values_i16<T, N>;
    } else {
        return add_values<T, N>;
    }
}

template <ggml_type T> static add_values_t get_add_values(int n_rows) {
    return n_rows == 1 ? get_add_values<T, 1>() : n_rows == 2 ? get_add_values<T, 2>() : get_add_values<T, 4>();
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

static int64_t get_row_size(const lminf_attn_operand & t, int n_embd) {
    return ggml_row_size((ggml_type) t.type, n_embd);
}

// nothing new
static next_rows get_no_next_rows(const kv_rows & t) {
    return { t.data, t.nb1, t.nb2, 64, 1 };
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
            for (int g = 0; g < n_groups; ++g) {
                if (has_integers(args.k.type)) {
                    pack_q(state.q + groups[g].first*n_embd_k, groups[g].size, n_embd_k);
                }
                if (args.n_sink > 0 && has_integers(args.k_sink.type)) {
                    pack_q(state.q_sink + groups[g].first*n_embd_k, groups[g].size, n_embd_k);
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
                const int c1 = std::min(c0 + n_block*nth, part.n);

                const int64_t size_k = get_row_size(part.k, args.n_embd_head_k);
                const int64_t size_v = get_row_size(part.v, args.n_embd_head_v);

                const next_rows next_v = { get_row(part.v, c0, 0, i_stream), part.v.nb1, part.v.nb2, 64*size_v/size_k, n };
                const next_rows next_k = { get_row(part.k, c1, 0, i_stream), part.k.nb1, part.k.nb2, 64*size_k/size_v, part.n - c1 };

                const auto walk = [&](const lminf_attn_operand & t, int n_embd, const next_rows & next, auto read) {
                    const bool convert = must_convert(n_embd);
                    const int  step    = has_integers(t.type) || (n_groups == 1 && !convert) ? n : N_CELLS_STEP;

                    for (int c = 0; c < n; c += step) {
                        const int     n_cells = std::min(step, n - c);
                        const kv_rows rows    = get_rows(t, c0 + c, i_stream, n_cells, args.n_head_kv, n_embd, block);
                        for (int g = 0; g < n_groups; ++g) {
                            const bool fetch = g == 0 && !convert && c < next.n;
                            read(rows, c, n_cells, groups[g], fetch ?
                                next_rows { next.get_cell(c), next.nb1, next.nb2, next.step, next.n - c } : get_no_next_rows(rows));
                        }
                    }
                };

                walk(part.k, args.n_embd_head_k, next_v, [&](const kv_rows & k, int c, int n_cells, const row_group & g, const next_rows & next) {
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

                walk(part.v, args.n_embd_head_v, next_k, [&](const kv_rows & v, int c, int n_cells, const row_group & g, const next_rows & next) {
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
