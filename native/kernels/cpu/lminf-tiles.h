// the tile kernel: many query rows per KV head
//
// 64 rows at a time are kept transposed, so that rows are lanes: neither K nor V is transposed, and the softmax needs no sums
// across lanes. Bound by multiplications.

#pragma once

#include "lminf-attn-shared.h"

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
