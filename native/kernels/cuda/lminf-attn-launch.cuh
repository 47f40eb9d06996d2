// which kernel computes an operation, and with how many blocks: host code, the same on the GPU and in emulation

#pragma once

#include "lminf-attn-kernels.cuh"

#include <algorithm>

struct lminf_cuda_plan {
    bool     tiles;      // tile kernel, else row kernel
    int      n_rows;     // of a block
    int      n_threads;
    int      n_shared;   // bytes
    uint32_t grid[3];
    int64_t  n_scratch;  // floats

    lminf_cuda_params params; // acc and max_sum still NULL
};

// bytes of shared memory that a block may have: everywhere, and when asked for from compute capability 7.5 on
constexpr int LMINF_CUDA_SHARED_ANY   = 48*1024;
constexpr int LMINF_CUDA_SHARED_ASKED = 64*1024;

// elements of a head; K has 64 more than V where V is a part of it (multi-head latent attention)
constexpr int LMINF_CUDA_MAX_K      = 576;
constexpr int LMINF_CUDA_MAX_V      = 512;
constexpr int LMINF_CUDA_MAX_SPLIT  = 128; // the combine kernel walks them one after the other
constexpr int LMINF_CUDA_MAX_GRID_Z = 65535;

static inline bool lminf_cuda_is_f16  (int type) { return type == GGML_TYPE_F16; }
static inline bool lminf_cuda_fits_f16(int type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0; }

// whether a condition holds for all of K and V
static inline bool lminf_cuda_all_types(const lminf_attn_args & args, bool (*is_right)(int type)) {
    const bool sinks = args.n_sink == 0 || (is_right(args.k_sink.type) && is_right(args.v_sink.type));
    return is_right(args.k.type) && is_right(args.v.type) && sinks;
}

static inline int64_t lminf_cuda_div_up(int64_t a, int64_t b) { return (a + b - 1)/b; }

// Into how many parts n_steps are split for the time to be shortest: blocks work side by side in n_slots, each takes its
// steps and about 3 more for its beginning and end, and what comes out of each split is read once more. With more than one
// there are n_sink_split others.
static inline int64_t lminf_cuda_get_n_split(int64_t n_blocks, int64_t n_steps, int64_t n_slots, int64_t n_sink_split) {
    int64_t best      = 1;
    int64_t best_cost = INT64_MAX;
    for (int64_t n = 1; n <= std::min<int64_t>(n_steps, LMINF_CUDA_MAX_SPLIT); ++n) {
        const int64_t n_all = n > 1 ? n + n_sink_split : 1;
        const int64_t cost  = 16*lminf_cuda_div_up(n_blocks*n_all, n_slots)*(lminf_cuda_div_up(n_steps, n) + 3) + n;
        if (cost < best_cost) {
            best      = n;
            best_cost = cost;
        }
    }
    return best;
}

// n_shared: bytes of shared memory that a block may ask for
static inline lminf_cuda_plan lminf_cuda_get_plan(const lminf_attn_args & args, int n_sm, int n_shared) {
    lminf_cuda_plan res = {};

    lminf_cuda_params & p = res.params;
    p.args    = args;
    p.n_group = args.n_head/args.n_head_kv;

    const int64_t n_rows_all = (int64_t) args.n_q*p.n_group;

    // f32 and bf16 do not fit into f16; and a few rows the row kernel computes faster, more of them where the tile kernel
    // has to convert: of wide heads about as fast, but in f32, where a single sharp row shows that K was rounded
    const bool is_wide    = lminf_is_wide(args.n_embd_head_k, args.n_embd_head_v);
    const bool is_f16     = lminf_cuda_all_types(args, lminf_cuda_is_f16);
    const int  n_rows_few = is_f16 ? (is_wide ? 0 : 4) : (is_wide ? 8 : 16);
    res.tiles = n_rows_all > n_rows_few && lminf_cuda_all_types(args, lminf_cuda_fits_f16);

    int cells_per_step, blocks_per_sm;
    if (res.tiles) {
        static_assert(lminf_tile_kernel_shared(16, LMINF_CUDA_WARP_V, LMINF_CUDA_WARP_V, 1) <= LMINF_CUDA_SHARED_ASKED, "");
        static_assert(lminf_tile_kernel_shared(16, LMINF_CUDA_WARP_V, 64,                1) <= LMINF_CUDA_SHARED_ASKED, "");
        static_assert(lminf_tile_kernel_shared(16, LMINF_CUDA_MAX_K,  LMINF_CUDA_MAX_V,  1) <= LMINF_CUDA_SHARED_ASKED, "");

        const int n_frags = lminf_tile_frags(args.n_embd_head_k, args.n_embd_head_v);
        const int n_parts = args.n_embd_head_v > LMINF_CUDA_WARP_V ? 2 : 1;

        const auto get_rows   = [&](int n_warps) { return 16*n_warps/n_parts; };
        const auto get_shared = [&](int n_warps) {
            return lminf_tile_kernel_shared(get_rows(n_warps), args.n_embd_head_k, args.n_embd_head_v, p.n_stages);
        };

        p.n_stages = is_wide ? 1 : 2;
        if (get_shared(n_parts) > n_shared) {
            p.n_stages = 1;
        }
        int n_warps = 4;
        while (n_warps > n_parts && (get_rows(n_warps/2) >= n_rows_all || get_shared(n_warps) > n_shared)) {
            n_warps /= 2;
        }
        res.n_rows     = get_rows(n_warps);
        res.n_threads  = n_warps*LMINF_CUDA_WARP;
        res.n_shared   = get_shared(n_warps);
        cells_per_step = lminf_tile_cells(n_frags);
        blocks_per_sm  = std::min(4/n_warps*lminf_tile_kernel_blocks(n_frags), n_shared/res.n_shared);
    } else {
        res.n_rows = is_wide ? 8 : 16;
        while (res.n_rows > 1 && res.n_rows/2 >= n_rows_all) {
            res.n_rows /= 2;
        }
        res.n_threads  = LMINF_CUDA_ROW_WARPS*LMINF_CUDA_WARP;
        res.n_shared   = sizeof(float)*lminf_row_kernel_shared(res.n_rows, args.n_embd_head_k);
        cells_per_step = LMINF_CUDA_ROW_WARPS*LMINF_CUDA_TILE;
        blocks_per_sm  = 4;
    }

    const int64_t n_row_tiles = lminf_cuda_div_up(n_rows_all, res.n_rows);
    const int64_t n_blocks    = n_row_tiles*args.n_head_kv*args.n_stream;
    const int64_t n_steps     = std::max<int64_t>(lminf_cuda_div_up(args.n_kv, cells_per_step), 1);
    const int64_t n_wanted    = lminf_cuda_get_n_split(n_blocks, n_steps, (int64_t) blocks_per_sm*n_sm, args.n_sink > 0);

    // sinks have splits of their own, unless there is but one: nobody then has to wait for them
    if (n_wanted > 1) {
        p.split_cells = lminf_cuda_div_up(n_steps, n_wanted)*cells_per_step;
        p.n_sink_pad  = lminf_cuda_div_up(args.n_sink, p.split_cells)*p.split_cells;
    } else {
        p.n_sink_pad  = lminf_cuda_div_up(args.n_sink, LMINF_CUDA_TILE)*LMINF_CUDA_TILE;
        p.split_cells = p.n_sink_pad + n_steps*cells_per_step;
    }
    p.n_split = std::max<int64_t>(lminf_cuda_div_up(p.n_sink_pad + args.n_kv, p.split_cells), 1);

    res.grid[0] = n_row_tiles;
    res.grid[1] = p.n_split;
    res.grid[2] = args.n_head_kv*args.n_stream;

    if (p.n_split > 1) {
        res.n_scratch = (int64_t) args.n_q*args.n_head*args.n_stream*p.n_split*(args.n_embd_head_v + 2);
    }
    return res;
}

typedef void (*lminf_cuda_kernel)(const lminf_cuda_params);

template <int N_V>
static lminf_cuda_kernel lminf_cuda_get_row_kernel(int n_rows) {
    switch (n_rows) {
        case 1:  return lminf_row_kernel<1, N_V>;
        case 2:  return lminf_row_kernel<2, N_V>;
        case 4:  return lminf_row_kernel<4, N_V>;
        case 8:  return lminf_row_kernel<8, N_V>;
        default: return lminf_row_kernel<16/N_V, N_V>; // 16 where V is not wide
    }
}

template <bool IS_F16>
static lminf_cuda_kernel lminf_cuda_get_tile_kernel(int n_embd_head_k, int n_embd_head_v) {
    if (n_embd_head_v > LMINF_CUDA_WARP_V) {
        return lminf_tile_kernel<16, 2, IS_F16>;
    }
    switch (lminf_tile_frags(n_embd_head_k, n_embd_head_v)) {
        case 4:  return lminf_tile_kernel<4,  1, IS_F16>;
        case 8:  return lminf_tile_kernel<8,  1, IS_F16>;
        default: return lminf_tile_kernel<16, 1, IS_F16>;
    }
}

// launch(kernel, grid, number of threads, bytes of shared memory, params); scratch holds plan.n_scratch floats
template <typename F>
static void lminf_cuda_launch(const lminf_cuda_plan & plan, float * scratch, const F & launch) {
    lminf_cuda_params p = plan.params;

    const lminf_attn_args & args = p.args;

    const int64_t n_out = (int64_t) args.n_q*args.n_head*args.n_stream;
    if (p.n_split > 1) {
        p.acc     = scratch;
        p.max_sum = scratch + n_out*p.n_split*args.n_embd_head_v;
    }

    const lminf_cuda_kernel kernel =
        plan.tiles && lminf_cuda_all_types(args, lminf_cuda_is_f16) ? lminf_cuda_get_tile_kernel<true> (args.n_embd_head_k, args.n_embd_head_v) :
        plan.tiles                              ? lminf_cuda_get_tile_kernel<false>(args.n_embd_head_k, args.n_embd_head_v) :
        args.n_embd_head_v <= LMINF_CUDA_WARP_V ? lminf_cuda_get_row_kernel<1>(plan.n_rows) : lminf_cuda_get_row_kernel<2>(plan.n_rows);

    launch(kernel, plan.grid, plan.n_threads, plan.n_shared, p);

    if (p.n_split > 1) {
        const uint32_t grid[3] = { (uint32_t) n_out, 1, 1 };
        launch(lminf_combine_kernel, grid, LMINF_CUDA_COMBINE_THREADS, (int) sizeof(float)*p.n_split, p);
    }
}

// what the kernels cannot do of what lminf_attn_is_valid lets through; offsets of views count, addresses are not known yet
static inline bool lminf_cuda_can(const ggml_tensor * op, int64_t n_shared) {
    const ggml_tensor * q = op->src[LMINF_ATTN_Q];
    const ggml_tensor * k = op->src[LMINF_ATTN_K];
    const ggml_tensor * v = op->src[LMINF_ATTN_V];

    // rows of K and V are loaded 16 bytes at a time, those of quantized types 2, those of q 8
    const auto is_aligned = [&](const ggml_tensor * t) {
        const size_t n = !t ? 1 : ggml_is_quantized(t->type) ? 2 : t == q || t == op->src[LMINF_ATTN_Q_SINK] ? 8 : 16;
        return !t || (t->nb[1] | t->nb[2] | t->nb[3] | t->view_offs) % n == 0;
    };

    const int64_t limit = INT32_MAX/2;

    return q->ne[0] % 8 == 0 && q->ne[0] <= LMINF_CUDA_MAX_K && v->ne[0] % 8 == 0 && v->ne[0] <= LMINF_CUDA_MAX_V &&
        n_shared >= LMINF_CUDA_SHARED_ASKED &&
        is_aligned(q) && is_aligned(op->src[LMINF_ATTN_Q_SINK]) && is_aligned(k) && is_aligned(v) && is_aligned(op->src[LMINF_ATTN_K_SINK]) && is_aligned(op->src[LMINF_ATTN_V_SINK]) &&
        k->ne[2]*q->ne[3] <= LMINF_CUDA_MAX_GRID_Z &&
        op->src[LMINF_ATTN_MASK]->ne[0] < limit && q->ne[1]*q->ne[2]*q->ne[3] < limit;
}
