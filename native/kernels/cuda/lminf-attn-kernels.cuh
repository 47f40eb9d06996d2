// GGML_OP_LMINF_ATTN on CUDA: the device code. nvcc compiles it, and a C++ compiler with the stand-in for CUDA in
// native/tests/emulate; whoever includes this file includes one of the two first. lminf-attn.cu says how it works.

#pragma once

#include "lminf-attn.h"

// the block's dynamic shared memory, aligned for wmma
#ifndef LMINF_CUDA_SHARED
#define LMINF_CUDA_SHARED(name) extern __shared__ __align__(128) char name[]
#endif

constexpr int LMINF_CUDA_WARP = 32;
constexpr int LMINF_CUDA_TILE = 32; // cells that are looked at together; those of a warp in the row kernel, of a block in the tile kernel

constexpr int LMINF_CUDA_ROW_WARPS = 4;      // of the row kernel
constexpr int LMINF_CUDA_STAGE     = 32;     // elements of K a warp of the row kernel holds in shared memory, of each cell of its tile
constexpr int LMINF_CUDA_STAGE_LD  = 32 + 4; // 16 bytes more: float4 accesses of neighbouring cells fall into different banks
constexpr int LMINF_CUDA_TILE_LD   = 32 + 4; // of scores and mask in the tile kernel, likewise

// elements of a head of V that a warp of either kernel has sums of; past it a lane of the row kernel has twice as many, and
// two warps of the tile kernel share their rows
constexpr int LMINF_CUDA_WARP_V = 256;

// One block computes a tile of rows over a range of cells. A row is a query of a head: the queries' heads of one KV head's
// group side by side, row = query*n_group + head in the group, so that a tile of rows shares the K and V it reads.
// Cells are numbered over sinks and window, the sinks rounded up to whole tiles: a tile never holds both.
struct lminf_cuda_params {
    lminf_attn_args args;

    int32_t n_group;     // query heads of a KV head
    int32_t n_sink_pad;  // sinks rounded up
    int32_t n_split;
    int32_t split_cells; // cells of a split, a multiple of LMINF_CUDA_TILE
    int32_t n_stages;    // of the tile kernel

    // partial results, NULL with one split; [n_embd_head_v or 2, n_split, n_head, n_q, n_stream]
    float * acc;
    float * max_sum; // largest score and the sum of exp(score - largest)
};

//
// eight elements of a row of K or V: loaded as they are, then converted, so that several loads can be under way
//
// Pointers that are the sinks' or the window's lose that they are global; __ldg says so.
//

struct lminf_cuda_raw {
    uint4  a;
    uint4  b;
    __half d;
};

// eight bytes of which only two byte alignment is known
static __device__ __forceinline__ void lminf_load_8_bytes(const char * p, uint4 & res) {
    const unsigned short * p16 = (const unsigned short *) p;
    res.x = __ldg(p16 + 0) | (uint32_t) __ldg(p16 + 1) << 16;
    res.y = __ldg(p16 + 2) | (uint32_t) __ldg(p16 + 3) << 16;
}

static __device__ __forceinline__ float lminf_int8(uint32_t word, int i) {
    return (float) (int8_t) (word >> 8*i);
}

template <int TYPE> struct lminf_cuda_type;

// how many of them a lane has under way: 64 bytes
static __host__ __device__ constexpr int lminf_n_loads(int type) {
    return type == GGML_TYPE_F32 ? 2 : 4;
}

template <> struct lminf_cuda_type<GGML_TYPE_F32> {
    static __device__ __forceinline__ void load(lminf_cuda_raw & r, const char * row, int e) {
        r.a = __ldg((const uint4 *) (row + 4*e));
        r.b = __ldg((const uint4 *) (row + 4*e + 16));
    }
    static __device__ __forceinline__ void to_float(const lminf_cuda_raw & r, int, float * res) {
        res[0] = __uint_as_float(r.a.x); res[1] = __uint_as_float(r.a.y); res[2] = __uint_as_float(r.a.z); res[3] = __uint_as_float(r.a.w);
        res[4] = __uint_as_float(r.b.x); res[5] = __uint_as_float(r.b.y); res[6] = __uint_as_float(r.b.z); res[7] = __uint_as_float(r.b.w);
    }
};

template <> struct lminf_cuda_type<GGML_TYPE_F16> {
    static __device__ __forceinline__ void load(lminf_cuda_raw & r, const char * row, int e) {
        r.a = __ldg((const uint4 *) (row + 2*e));
    }
    static __device__ __forceinline__ void to_float(const lminf_cuda_raw & r, int, float * res) {
        const uint32_t w[4] = { r.a.x, r.a.y, r.a.z, r.a.w };
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            res[i] = __half2float(__ushort_as_half((unsigned short) (w[i/2] >> 16*(i % 2))));
        }
    }
};

template <> struct lminf_cuda_type<GGML_TYPE_BF16> {
    static __device__ __forceinline__ void load(lminf_cuda_raw & r, const char * row, int e) {
        r.a = __ldg((const uint4 *) (row + 2*e));
    }
    static __device__ __forceinline__ void to_float(const lminf_cuda_raw & r, int, float * res) {
        const uint32_t w[4] = { r.a.x, r.a.y, r.a.z, r.a.w };
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            res[i] = __uint_as_float(i % 2 ? w[i/2] & 0xFFFF0000u : w[i/2] << 16);
        }
    }
};

// a block is a half and 32 signed bytes
template <> struct lminf_cuda_type<GGML_TYPE_Q8_0> {
    static __device__ __forceinline__ void load(lminf_cuda_raw & r, const char * row, int e) {
        const char * block = row + e/32*34;
        r.d = __ushort_as_half(__ldg((const unsigned short *) block));
        lminf_load_8_bytes(block + 2 + e % 32, r.a);
    }
    static __device__ __forceinline__ void to_float(const lminf_cuda_raw & r, int, float * res) {
        const float d = __half2float(r.d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i]     = d*lminf_int8(r.a.x, i);
            res[i + 4] = d*lminf_int8(r.a.y, i);
        }
    }
};

// a block is a half and 16 bytes: elements 0 to 15 in their low halves, 16 to 31 in the high ones, all 8 too large
template <> struct lminf_cuda_type<GGML_TYPE_Q4_0> {
    static __device__ __forceinline__ void load(lminf_cuda_raw & r, const char * row, int e) {
        const char * block = row + e/32*18;
        r.d = __ushort_as_half(__ldg((const unsigned short *) block));
        lminf_load_8_bytes(block + 2 + e % 16, r.a);
    }
    static __device__ __forceinline__ void to_float(const lminf_cuda_raw & r, int e, float * res) {
        const float    d     = __half2float(r.d);
        const int      shift = e % 32 < 16 ? 0 : 4;
        const uint32_t lo    = r.a.x >> shift & 0x0F0F0F0Fu;
        const uint32_t hi    = r.a.y >> shift & 0x0F0F0F0Fu;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            res[i]     = d*(lminf_int8(lo, i) - 8.0f);
            res[i + 4] = d*(lminf_int8(hi, i) - 8.0f);
        }
    }
};

template <int TYPE> struct lminf_cuda_constant { static constexpr int value = TYPE; };

// calls f with the type as a constant
template <typename F>
static __device__ __forceinline__ void lminf_with_type(int type, const F & f) {
    switch (type) {
        case GGML_TYPE_F32:  f(lminf_cuda_constant<GGML_TYPE_F32>());  break;
        case GGML_TYPE_F16:  f(lminf_cuda_constant<GGML_TYPE_F16>());  break;
        case GGML_TYPE_BF16: f(lminf_cuda_constant<GGML_TYPE_BF16>()); break;
        case GGML_TYPE_Q8_0: f(lminf_cuda_constant<GGML_TYPE_Q8_0>()); break;
        case GGML_TYPE_Q4_0: f(lminf_cuda_constant<GGML_TYPE_Q4_0>()); break;
    }
}

//
// what both kernels share
//

static __device__ __forceinline__ float lminf_warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
    }
    return x;
}

static __device__ __forceinline__ float lminf_warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
    }
    return x;
}

// lminf_attn_slope with exp2f, which stays accurate where upstream's -use_fast_math makes powf an approximation
static __device__ __forceinline__ float lminf_slope(const lminf_attn_args & args, int h) {
    if (args.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n = args.n_head_log2;
    return h < n ? exp2f(-args.max_bias/n*(h + 1)) : exp2f(-0.5f*args.max_bias/n*(2*(h - n) + 1));
}

// tanhf under -use_fast_math has 11 bits, too few for a soft-capped score
static __device__ __forceinline__ float lminf_softcap(const lminf_attn_args & args, float s) {
    return args.logit_softcap > 0.0f ? args.logit_softcap*(1.0f - 2.0f/(expf(2.0f*s) + 1.0f)) : s;
}

// exp(x - max), where max is -inf as long as nothing was seen
static __device__ __forceinline__ float lminf_exp(float x, float max) {
    return x == -INFINITY ? 0.0f : expf(x - max);
}

// what the sum of exp(score - max)*V is multiplied with at last
static __device__ __forceinline__ float lminf_norm(const lminf_attn_args & args, int h, float max, float sum) {
    if (max == -INFINITY) {
        return 0.0f;
    }
    if (!args.head_sinks) {
        return 1.0f/sum;
    }
    const float sink    = args.head_sinks[h];
    const float max_all = fmaxf(max, sink);
    const float scale   = expf(max - max_all);
    return scale/(sum*scale + expf(sink - max_all));
}

// the sinks' or the window's part of a split; by value, as a pointer to a parameter would move all of them to local memory
struct lminf_cuda_section {
    lminf_attn_operand q;
    lminf_attn_operand k;
    lminf_attn_operand v;

    int begin;     // cells
    int end;
    int mask_col0; // column of the mask of cell 0
};

static __device__ __forceinline__ lminf_cuda_section lminf_get_section(const lminf_cuda_params & p, int split, bool is_window) {
    const int begin = split*p.split_cells;
    const int end   = begin + p.split_cells;

    lminf_cuda_section res;
    if (is_window) {
        res = { p.args.q, p.args.k, p.args.v, max(begin - p.n_sink_pad, 0), min(end - p.n_sink_pad, p.args.n_kv), p.args.n_sink };
    } else {
        res = { p.args.q_sink, p.args.k_sink, p.args.v_sink, begin, min(end, p.args.n_sink), 0 };
    }
    return res;
}

static __device__ __forceinline__ const char * lminf_row_data(const lminf_attn_operand & x, int i1, int i2, int i3) {
    return x.data + i1*x.nb1 + i2*x.nb2 + i3*x.nb3;
}

// index of a row's result among [n_head, n_q, n_stream]
static __device__ __forceinline__ int64_t lminf_out_index(const lminf_attn_args & args, int h, int i_q, int stream) {
    return ((int64_t) stream*args.n_q + i_q)*args.n_head + h;
}

//
// row kernel: N_ROWS rows, everything in f32; N_V times LMINF_CUDA_WARP_V is n_embd_head_v or more
//
// grid (tiles of rows, splits, KV heads * streams), 4 warps. The tiles of cells are dealt out to the warps, each of which
// keeps its own softmax; no barrier until the end. In the first half of a tile's work a lane is a cell, K passing through
// shared memory; in the second it is 8 elements of V, of which a warp sees 32/lanes_v cells at a time.
//

// Hides where x comes from. What follows from the lane alone, for every type and load, nvcc would compute once and keep in
// registers through the loop over the cells; there are none to spare.
static __device__ __forceinline__ int lminf_opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// elements e0, e0 + 1, ... of the open cells' K into shared memory, n8 times 8 of them
template <int TYPE>
static __device__ __forceinline__ void lminf_stage_k(float * stage, const char * k, int64_t nb1, uint32_t open, int e0, int n8, int lane) {
    constexpr int LANES = LMINF_CUDA_STAGE/8; // per cell
    constexpr int N     = lminf_n_loads(TYPE);

    lane = lminf_opaque(lane);

    const int i8 = lane % LANES;

    const char * row = k + lane/LANES*nb1; // advanced, not computed anew: nvcc would keep every product in a register

#pragma unroll 1
    for (int cell0 = lane/LANES; cell0 < LMINF_CUDA_TILE; cell0 += N*(LMINF_CUDA_WARP/LANES)) {
        lminf_cuda_raw raw[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int cell = cell0 + i*(LMINF_CUDA_WARP/LANES);
            if ((open >> cell & 1) && i8 < n8) {
                lminf_cuda_type<TYPE>::load(raw[i], row, e0 + 8*i8);
            }
            row += LMINF_CUDA_WARP/LANES*nb1;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int cell = cell0 + i*(LMINF_CUDA_WARP/LANES);
            if ((open >> cell & 1) && i8 < n8) {
                float x[8];
                lminf_cuda_type<TYPE>::to_float(raw[i], e0 + 8*i8, x);
                float4 * to = (float4 *) (stage + cell*LMINF_CUDA_STAGE_LD + 8*i8);
                to[0] = make_float4(x[0], x[1], x[2], x[3]);
                to[1] = make_float4(x[4], x[5], x[6], x[7]);
            }
        }
    }
}

// acc += prob * V over the open cells, elements from e0 on; prob [N_ROWS, LMINF_CUDA_TILE]
template <int TYPE, int N_ROWS>
static __device__ __forceinline__ void lminf_add_v(
        float (&acc)[N_ROWS][8], const float * prob, const char * v, int64_t nb1, uint32_t open, int e0, int n_embd, int lanes_v, int lane) {
    constexpr int N = lminf_n_loads(TYPE);

    lane = lminf_opaque(lane);

    const int e       = e0 + lane % lanes_v*8;
    const int n_cells = LMINF_CUDA_WARP/lanes_v; // at a time

    const char * row = v + lane/lanes_v*nb1;

#pragma unroll 1
    for (int cell0 = lane/lanes_v; cell0 < LMINF_CUDA_TILE; cell0 += N*n_cells) {
        lminf_cuda_raw raw[N];
        bool           use[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int cell = cell0 + i*n_cells;
            use[i] = cell < LMINF_CUDA_TILE && e < n_embd && (open >> cell & 1);
            if (use[i]) {
                lminf_cuda_type<TYPE>::load(raw[i], row, e);
            }
            row += n_cells*nb1;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (use[i]) {
                float x[8];
                lminf_cuda_type<TYPE>::to_float(raw[i], e, x);
#pragma unroll
                for (int r = 0; r < N_ROWS; ++r) {
                    const float p = prob[r*LMINF_CUDA_TILE + cell0 + i*n_cells];
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        acc[r][j] += p*x[j];
                    }
                }
            }
        }
    }
}

// shared memory in floats: q, the rows' slopes, the warps' largest scores and sums, then what each warp has for itself
static __host__ __device__ constexpr int lminf_row_kernel_shared(int n_rows, int n_embd_head_k) {
    return n_rows*n_embd_head_k + 4*((n_rows + 3)/4) + 4*((2*LMINF_CUDA_ROW_WARPS*n_rows + 3)/4) +
        LMINF_CUDA_ROW_WARPS*LMINF_CUDA_TILE*LMINF_CUDA_STAGE_LD;
}

// blocks per multiprocessor that registers must leave room for: the more, the more loads are under way; a lane has 8 sums
// of each of n_rows
static __host__ __device__ constexpr int lminf_row_kernel_blocks(int n_rows) {
    return n_rows <= 4 ? 4 : n_rows <= 8 ? 3 : 2;
}

template <int N_ROWS, int N_V>
static __global__ void __launch_bounds__(LMINF_CUDA_ROW_WARPS*LMINF_CUDA_WARP, lminf_row_kernel_blocks(N_ROWS*N_V)) lminf_row_kernel(const lminf_cuda_params p) {
    LMINF_CUDA_SHARED(shared);

    const lminf_attn_args & args = p.args;

    const int tid     = threadIdx.x;
    const int warp    = tid / LMINF_CUDA_WARP;
    const int lane    = tid % LMINF_CUDA_WARP;
    const int split   = blockIdx.y;
    const int h_kv    = blockIdx.z % args.n_head_kv;
    const int stream  = blockIdx.z / args.n_head_kv;
    const int row0    = blockIdx.x*N_ROWS;
    const int n_rows  = min(N_ROWS, args.n_q*p.n_group - row0);
    const int n_embd_k = args.n_embd_head_k;
    const int n_embd_v = args.n_embd_head_v;

    float * s_q     = (float *) shared;                  // [N_ROWS, n_embd_k]
    float * s_slope = s_q     + N_ROWS*n_embd_k;         // [N_ROWS]
    float * s_max   = s_slope + 4*((N_ROWS + 3)/4);      // [warps, N_ROWS]
    float * s_sum   = s_max   + LMINF_CUDA_ROW_WARPS*N_ROWS;
    float * s_stage = s_max   + 4*((2*LMINF_CUDA_ROW_WARPS*N_ROWS + 3)/4);

    float * stage = s_stage + warp*LMINF_CUDA_TILE*LMINF_CUDA_STAGE_LD; // [cells, LMINF_CUDA_STAGE_LD], K
    float * prob  = stage;                                              // [N_ROWS, cells] takes K's place
    static_assert(N_ROWS*LMINF_CUDA_TILE <= LMINF_CUDA_TILE*LMINF_CUDA_STAGE_LD, "");
    static_assert(N_ROWS*N_V*LMINF_CUDA_WARP_V <= LMINF_CUDA_ROW_WARPS*LMINF_CUDA_TILE*LMINF_CUDA_STAGE_LD, ""); // the result does, too

    if (tid < N_ROWS) {
        s_slope[tid] = lminf_slope(args, h_kv*p.n_group + (row0 + tid) % p.n_group);
    }

    int lanes_v = 1; // that hold a row of V, rounded up so that they divide the warp
    while (8*N_V*lanes_v < n_embd_v) {
        lanes_v *= 2;
    }
    if (N_V > 1) {
        lanes_v = LMINF_CUDA_WARP;
    }

    float acc[N_V][N_ROWS][8];
    float max_score[N_ROWS];
    float sum[N_ROWS]; // of this lane's cells
#pragma unroll
    for (int r = 0; r < N_ROWS; ++r) {
        max_score[r] = -INFINITY;
        sum[r]       = 0.0f;
#pragma unroll
        for (int j = 0; j < 8*N_V; ++j) {
            acc[j/8][r][j%8] = 0.0f;
        }
    }

#pragma unroll 1
    for (int is_window = 0; is_window < 2; ++is_window) {
        const lminf_cuda_section sec = lminf_get_section(p, split, is_window);
        if (sec.begin >= sec.end) {
            continue;
        }

        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < N_ROWS*n_embd_k; i += LMINF_CUDA_ROW_WARPS*LMINF_CUDA_WARP) {
            const int r = i / n_embd_k;
            const int e = i % n_embd_k;
            const int h = h_kv*p.n_group + (row0 + r) % p.n_group;
            s_q[i] = r < n_rows ? args.scale*__ldg((const float *) lminf_row_data(sec.q, (row0 + r)/p.n_group, h, stream) + e) : 0.0f;
        }
        __syncthreads();

        const char * k    = lminf_row_data(sec.k, 0, h_kv, stream);
        const char * v    = lminf_row_data(sec.v, 0, h_kv, stream);
        const char * mask = lminf_row_data(args.mask, 0, 0, stream);

        for (int cell0 = sec.begin + warp*LMINF_CUDA_TILE; cell0 < sec.end; cell0 += LMINF_CUDA_ROW_WARPS*LMINF_CUDA_TILE) {
            const bool exists = cell0 + lane < sec.end;
            const int  col    = sec.mask_col0 + cell0 + lane;

            bool is_open = false;
#pragma unroll 1
            for (int i_q = row0/p.n_group; i_q <= (row0 + n_rows - 1)/p.n_group; ++i_q) {
                is_open = is_open || (exists && ((const float *) (mask + i_q*args.mask.nb1))[col] != -INFINITY);
            }
            const uint32_t open = __ballot_sync(0xFFFFFFFFu, is_open);
            if (open == 0) {
                continue;
            }

            // scores, this lane's cell

            float score[N_ROWS];
#pragma unroll
            for (int r = 0; r < N_ROWS; ++r) {
                score[r] = 0.0f;
            }

            const char * k0 = k + cell0*sec.k.nb1;

#pragma unroll 1
            for (int e0 = 0; e0 < n_embd_k; e0 += LMINF_CUDA_STAGE) {
                const int n8 = min(LMINF_CUDA_STAGE, n_embd_k - e0)/8;

                __syncwarp();
                lminf_with_type(sec.k.type, [&](auto type) {
                    lminf_stage_k<decltype(type)::value>(stage, k0, sec.k.nb1, open, e0, n8, lane);
                });
                __syncwarp();

                if (is_open) {
#pragma unroll 2
                    for (int e = 0; e < 8*n8; e += 4) {
                        const float4 x = *(const float4 *) (stage + lane*LMINF_CUDA_STAGE_LD + e);
#pragma unroll
                        for (int r = 0; r < N_ROWS; ++r) {
                            const float4 y = *(const float4 *) (s_q + r*n_embd_k + e0 + e);
                            score[r] += x.x*y.x + x.y*y.y + x.z*y.z + x.w*y.w;
                        }
                    }
                }
            }
            __syncwarp(); // before prob takes the place of K

            // softmax

            int          head     = lminf_opaque(row0 % p.n_group); // in its group
            const char * mask_row = mask + row0/p.n_group*args.mask.nb1;

            float m = is_open ? ((const float *) mask_row)[col] : -INFINITY;
#pragma unroll
            for (int r = 0; r < N_ROWS; ++r) {
                float s = -INFINITY;
                if (r < n_rows && m != -INFINITY) {
                    s = lminf_softcap(args, score[r]) + s_slope[r]*m;
                }
                if (++head == p.n_group && r + 1 < n_rows) { // the next query
                    head      = 0;
                    mask_row += args.mask.nb1;
                    m         = is_open ? ((const float *) mask_row)[col] : -INFINITY;
                }
                const float max_new = fmaxf(max_score[r], lminf_warp_max(s));
                if (max_new > max_score[r]) {
                    const float scale = lminf_exp(max_score[r], max_new);
                    sum[r] *= scale;
#pragma unroll
                    for (int j = 0; j < 8*N_V; ++j) {
                        acc[j/8][r][j%8] *= scale;
                    }
                    max_score[r] = max_new;
                }
                const float e = lminf_exp(s, max_new);
                sum[r] += e;
                prob[r*LMINF_CUDA_TILE + lane] = e;
            }
            __syncwarp();

            const char * v0 = v + cell0*sec.v.nb1;

            lminf_with_type(sec.v.type, [&](auto type) {
#pragma unroll
                for (int i = 0; i < N_V; ++i) {
                    lminf_add_v<decltype(type)::value>(acc[i], prob, v0, sec.v.nb1, open, i*LMINF_CUDA_WARP_V, n_embd_v, lanes_v, lane);
                }
            });
        }
    }

    // the warp's lanes together

#pragma unroll
    for (int r = 0; r < N_ROWS; ++r) {
        sum[r] = lminf_warp_sum(sum[r]);
        if (lane == 0) {
            s_max[warp*N_ROWS + r] = max_score[r];
            s_sum[warp*N_ROWS + r] = sum[r];
        }
        for (int i = lanes_v; i < LMINF_CUDA_WARP; i *= 2) {
#pragma unroll
            for (int j = 0; j < 8*N_V; ++j) {
                acc[j/8][r][j%8] += __shfl_xor_sync(0xFFFFFFFFu, acc[j/8][r][j%8], i);
            }
        }
    }
    __syncthreads();

    // the warps together, one after the other

    float * out = s_stage; // [N_ROWS, n_embd_v] where K was

    for (int w = 0; w < LMINF_CUDA_ROW_WARPS; ++w) {
        if (w == warp && lane < lanes_v && 8*lane < n_embd_v) {
#pragma unroll
            for (int r = 0; r < N_ROWS; ++r) {
                float max_all = s_max[r];
#pragma unroll
                for (int i = 1; i < LMINF_CUDA_ROW_WARPS; ++i) {
                    max_all = fmaxf(max_all, s_max[i*N_ROWS + r]);
                }
                const float scale = lminf_exp(max_score[r], max_all);
#pragma unroll
                for (int i = 0; i < N_V; ++i) {
                    const int e = i*LMINF_CUDA_WARP_V + 8*lane;
                    if (i > 0 && e >= n_embd_v) {
                        break;
                    }
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        float * to = out + r*n_embd_v + e + j;
                        *to = (w == 0 ? 0.0f : *to) + scale*acc[i][r][j];
                    }
                }
            }
        }
        __syncthreads();
    }

#pragma unroll 1
    for (int i = tid; i < n_rows*n_embd_v; i += LMINF_CUDA_ROW_WARPS*LMINF_CUDA_WARP) {
        const int r   = i / n_embd_v;
        const int e   = i % n_embd_v;
        const int h   = h_kv*p.n_group + (row0 + r) % p.n_group;

        float max_all = -INFINITY;
        for (int w = 0; w < LMINF_CUDA_ROW_WARPS; ++w) {
            max_all = fmaxf(max_all, s_max[w*N_ROWS + r]);
        }
        float sum_all = 0.0f;
        for (int w = 0; w < LMINF_CUDA_ROW_WARPS; ++w) {
            sum_all += s_sum[w*N_ROWS + r]*lminf_exp(s_max[w*N_ROWS + r], max_all);
        }

        const int64_t i_out = lminf_out_index(args, h, (row0 + r)/p.n_group, stream);
        if (p.n_split == 1) {
            args.dst[i_out*n_embd_v + e] = out[i]*lminf_norm(args, h, max_all, sum_all);
        } else {
            p.acc[(i_out*p.n_split + split)*n_embd_v + e] = out[i];
            if (e == 0) {
                p.max_sum[(i_out*p.n_split + split)*2]     = max_all;
                p.max_sum[(i_out*p.n_split + split)*2 + 1] = sum_all;
            }
        }
    }
}

//
// tile kernel: 16 rows per warp, or two, on tensor cores; K and V must be exact, or as good as, in f16
//
// grid (tiles of rows, splits, KV heads * streams), 1 to 4 warps. A block walks its cells in tiles, all of its warps
// together; scores, softmax and sums stay in registers. With 2 stages there are K and V of two tiles in shared memory: one
// arrives while the other is multiplied. With 1, where that is too much, V takes K's place. Of N_PARTS warps that share 16 rows each computes all scores, and the sums
// of a part of V's elements; 16*N_FRAGS*N_PARTS is n_embd_head_v or more.
//

// cells of a tile
static __host__ __device__ constexpr int lminf_tile_cells(int n_frags) {
    return n_frags <= 4 ? 64 : 32;
}

// blocks per multiprocessor that registers must leave room for
static __host__ __device__ constexpr int lminf_tile_kernel_blocks(int n_frags) {
    return n_frags <= 8 ? 3 : 2;
}

// heads with one stage, and half as many rows in the row kernel
static __host__ __device__ constexpr bool lminf_is_wide(int n_embd_head_k, int n_embd_head_v) {
    return n_embd_head_k > LMINF_CUDA_WARP_V || n_embd_head_v > LMINF_CUDA_WARP_V;
}

// pieces of 16 elements of V that a warp has sums of
static __host__ __device__ constexpr int lminf_tile_frags(int n_embd_head_k, int n_embd_head_v) {
    return lminf_is_wide(n_embd_head_k, n_embd_head_v) ? 16 : n_embd_head_v <= 64 ? 4 : n_embd_head_v <= 128 ? 8 : 16;
}

// what f16 can hold
static __device__ __forceinline__ float lminf_saturate(float x) {
    return fminf(fmaxf(x, -65504.0f), 65504.0f);
}

// Where a cell's row lies in a tile. Of 16 scores side by side a lane holds numbers 2t, 2t + 1, 2t + 8 and 2t + 9; with
// rows in this order these are the scores of 4 cells next to each other, whose mask it reads at once.
static __device__ __forceinline__ int lminf_tile_row(int cell) {
    return (cell & ~15) | (cell & 2) << 2 | (cell & 12) >> 1 | (cell & 1);
}

// n_cells rows to a tile of n_tile rows in f16, zeros where there is nothing; those of f16 are there after
// lminf_wait_for_copies
template <int TYPE>
static __device__ __forceinline__ void lminf_load_rows(
        __half * tile, int ld, const char * rows, int64_t nb1, int n_cells, int n_tile, int n_embd, int n_threads, int tid) {
    constexpr int LANES = 4; // per cell
    constexpr int N     = lminf_n_loads(TYPE);

    const int n_padded = (n_embd + 15)/16*16;

    const char * row = rows + tid/LANES*nb1;

    for (int cell = tid/LANES; cell < n_tile; cell += n_threads/LANES, row += n_threads/LANES*nb1) {
        const bool exists = cell < n_cells;
        __half   * to     = tile + lminf_tile_row(cell)*ld;

        if constexpr (TYPE == GGML_TYPE_F16) {
#pragma unroll 4
            for (int e = 8*(tid % LANES); e < n_padded; e += 8*LANES) {
                const bool is_row = exists && e < n_embd;
                lminf_copy_16(to + e, is_row ? row + 2*e : rows, is_row);
            }
        } else {
            for (int e0 = 8*(tid % LANES); e0 < n_padded; e0 += N*8*LANES) {
                lminf_cuda_raw raw[N];
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const int e = e0 + i*8*LANES;
                    if (exists && e < n_embd) {
                        lminf_cuda_type<TYPE>::load(raw[i], row, e);
                    }
                }
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const int e = e0 + i*8*LANES;
                    if (e < n_padded) {
                        uint4 res = make_uint4(0, 0, 0, 0);
                        if (exists && e < n_embd) {
                            float x[8];
                            lminf_cuda_type<TYPE>::to_float(raw[i], e, x);
#pragma unroll
                            for (int j = 0; j < 8; ++j) {
                                x[j] = lminf_saturate(x[j]);
                            }
                            res = make_uint4(lminf_pack_2_halves(x[0], x[1]), lminf_pack_2_halves(x[2], x[3]),
                                lminf_pack_2_halves(x[4], x[5]), lminf_pack_2_halves(x[6], x[7]));
                        }
                        *(uint4 *) (to + e) = res;
                    }
                }
            }
        }
    }
}

template <bool IS_F16>
static __device__ __forceinline__ void lminf_load_tile(
        __half * tile, int ld, const lminf_attn_operand & x, const char * rows, int n_cells, int n_tile, int n_embd, int n_threads, int tid) {
    if constexpr (IS_F16) {
        lminf_load_rows<GGML_TYPE_F16>(tile, ld, rows, x.nb1, n_cells, n_tile, n_embd, n_threads, tid);
        return;
    }
    switch (x.type) {
        case GGML_TYPE_F16:  lminf_load_rows<GGML_TYPE_F16> (tile, ld, rows, x.nb1, n_cells, n_tile, n_embd, n_threads, tid); break;
        case GGML_TYPE_Q8_0: lminf_load_rows<GGML_TYPE_Q8_0>(tile, ld, rows, x.nb1, n_cells, n_tile, n_embd, n_threads, tid); break;
        case GGML_TYPE_Q4_0: lminf_load_rows<GGML_TYPE_Q4_0>(tile, ld, rows, x.nb1, n_cells, n_tile, n_embd, n_threads, tid); break;
    }
}

// Which of 32 tiles from cell begin on any of n_queries sees a cell of, as bits. Most are seen by the first query or the
// last: these are asked for all of a warp's tiles at once.
static __device__ __forceinline__ uint32_t lminf_open_tiles(
        int * s_open, const char * mask, int64_t nb1, int n_queries, int begin, int end, int n_tile, int n_warps, int tid) {
    constexpr int N = 8; // loads under way

    const int warp    = tid / LMINF_CUDA_WARP;
    const int lane    = tid % LMINF_CUDA_WARP;
    const int n_tiles = min((end - begin + n_tile - 1)/n_tile, LMINF_CUDA_WARP);

    __syncthreads(); // before others' flags are overwritten

#pragma unroll 1
    for (int tile0 = warp; tile0 < n_tiles; tile0 += N*n_warps) {
        bool is_open[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int cell = begin + (tile0 + i*n_warps)*n_tile + lane;
            is_open[i] = false;
            for (int c = cell; c < cell + n_tile - lane; c += LMINF_CUDA_WARP) {
                if (c < end) {
                    const float first = __ldg((const float *) mask + c);
                    const float last  = __ldg((const float *) (mask + (n_queries - 1)*nb1) + c);
                    is_open[i] = is_open[i] || first != -INFINITY || last != -INFINITY;
                }
            }
        }
#pragma unroll 1
        for (int i = 0; i < N && tile0 + i*n_warps < n_tiles; ++i) {
            bool is_mine = false;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                is_mine = j == i ? is_open[j] : is_mine;
            }
            const int tile = tile0 + i*n_warps;
            const int cell = begin + tile*n_tile + lane;
            bool is_seen = __ballot_sync(0xFFFFFFFFu, is_mine) != 0;
#pragma unroll 1
            for (int i_q = 1; i_q < n_queries - 1 && !is_seen; i_q += N) {
                bool is_seen_here = false;
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    for (int c = cell; c < cell + n_tile - lane; c += LMINF_CUDA_WARP) {
                        if (i_q + j < n_queries - 1 && c < end) {
                            is_seen_here = is_seen_here || __ldg((const float *) (mask + (i_q + j)*nb1) + c) != -INFINITY;
                        }
                    }
                }
                is_seen = __ballot_sync(0xFFFFFFFFu, is_seen_here) != 0;
            }
            if (lane == 0) {
                s_open[tile] = is_seen;
            }
        }
    }

    __syncthreads();
    return __ballot_sync(0xFFFFFFFFu, lane < n_tiles && s_open[lane] != 0);
}

// halves from row to row of a tile: whole 16s, and 16 bytes more so that rows start in different banks
static __host__ __device__ constexpr int lminf_tile_ld(int n_embd) {
    return (n_embd + 15)/16*16 + 8;
}

// of K's and V's tiles
static __host__ __device__ constexpr int lminf_tile_kv_halves(int n_embd_head_k, int n_embd_head_v, int n_stages) {
    const int n_cells = lminf_tile_cells(lminf_tile_frags(n_embd_head_k, n_embd_head_v));
    const int ld_k    = lminf_tile_ld(n_embd_head_k);
    const int ld_v    = lminf_tile_ld(n_embd_head_v);
    return n_cells*(n_stages == 2 ? 2*(ld_k + ld_v) : ld_k > ld_v ? ld_k : ld_v);
}

// shared memory in bytes: q, K and V, which tiles are open
static __host__ __device__ constexpr int lminf_tile_kernel_shared(int n_rows, int n_embd_head_k, int n_embd_head_v, int n_stages) {
    return 2*n_rows*lminf_tile_ld(n_embd_head_k) + 2*lminf_tile_kv_halves(n_embd_head_k, n_embd_head_v, n_stages) + 4*LMINF_CUDA_WARP;
}

// IS_F16: all of K and V are; without the rest of the code a kernel is a third as large
template <int N_FRAGS, int N_PARTS, bool IS_F16>
static __global__ void __launch_bounds__(4*LMINF_CUDA_WARP, lminf_tile_kernel_blocks(N_FRAGS)) lminf_tile_kernel(const lminf_cuda_params p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
    GGML_UNUSED(p); // upstream builds for older devices too; ggml_cuda_lminf_attn_supported keeps them away
#else
    LMINF_CUDA_SHARED(shared);

    constexpr int   N_CELLS = lminf_tile_cells(N_FRAGS);
    constexpr float LOG2_E  = 1.44269504f; // scores are in units of log(2): exp2f is an instruction

    const lminf_attn_args & args = p.args;

    const int n_threads = blockDim.x;
    const int n_warps   = n_threads / LMINF_CUDA_WARP;
    const int tid       = threadIdx.x;
    const int warp      = tid / LMINF_CUDA_WARP;
    const int lane      = tid % LMINF_CUDA_WARP;
    const int part      = warp % N_PARTS;
    const int split     = blockIdx.y;
    const int h_kv      = blockIdx.z % args.n_head_kv;
    const int stream    = blockIdx.z / args.n_head_kv;
    const int max_rows  = 16*n_warps/N_PARTS;
    const int row0      = blockIdx.x*max_rows;
    const int n_rows    = min(max_rows, args.n_q*p.n_group - row0);
    const int q0        = row0/p.n_group;
    const int n_queries = (row0 + n_rows - 1)/p.n_group - q0 + 1;
    const int n_embd_k  = args.n_embd_head_k;
    const int n_embd_v  = args.n_embd_head_v;
    const int ld_k      = lminf_tile_ld(n_embd_k);

    __half * s_q    = (__half *) shared;                                                    // [max_rows, ld_k]
    __half * s_k    = s_q + max_rows*ld_k;                                                  // [N_CELLS, ld_k]
    int    * s_open = (int *) (s_k + lminf_tile_kv_halves(n_embd_k, n_embd_v, p.n_stages)); // [32]

    const bool has_stages = p.n_stages == 2;
    const int  n_stage    = has_stages ? N_CELLS*(ld_k + lminf_tile_ld(n_embd_v)) : 0; // halves to the other stage
    const int  n_to_v     = has_stages ? N_CELLS*ld_k : 0;                             // and from K to V

    // where this lane's rows of the matrices are that it names
    const __half * my_q = s_q + (16*(warp/N_PARTS) + lane % 16)*ld_k + lane/16*8;
    const __half * my_k = s_k + (lane/16*8 + lane % 8)*ld_k + lane/8 % 2*8;

    const int e_part = 16*N_FRAGS*part; // this warp's first element of V

    // the two rows that this lane has scores and sums of; one that does not exist repeats the last
    int     my_query[2];
    int     my_head[2];
    float   slope[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = row0 + min(16*(warp/N_PARTS) + lane/4 + 8*r, n_rows - 1);
        my_query[r] = row/p.n_group;
        my_head[r]  = h_kv*p.n_group + row % p.n_group;
        slope[r]    = LOG2_E*lminf_slope(args, my_head[r]);
    }

    const bool  has_softcap = args.logit_softcap > 0.0f;
    const float q_scale     = has_softcap ? args.scale : LOG2_E*args.scale;

    float max_score[2] = { -INFINITY, -INFINITY };
    float sum[2]       = { 0.0f, 0.0f }; // of this lane's cells
    float acc[2*N_FRAGS][4];
#pragma unroll
    for (int f = 0; f < 2*N_FRAGS; ++f) {
        acc[f][0] = acc[f][1] = acc[f][2] = acc[f][3] = 0.0f;
    }

#pragma unroll 1
    for (int is_window = 0; is_window < 2; ++is_window) {
        const lminf_cuda_section sec = lminf_get_section(p, split, is_window);
        if (sec.begin >= sec.end) {
            continue;
        }

        __syncthreads(); // before others' q is overwritten
#pragma unroll 4
        for (int r = warp; r < max_rows; r += n_warps) {
            const int     row = row0 + min(r, n_rows - 1);
            const float * q   = (const float *) lminf_row_data(sec.q, row/p.n_group, h_kv*p.n_group + row % p.n_group, stream);
            for (int e = 2*lane; e < ld_k - 8; e += 2*LMINF_CUDA_WARP) {
                const float2 x = r < n_rows && e < n_embd_k ? __ldg((const float2 *) (q + e)) : make_float2(0.0f, 0.0f);
                *(uint32_t *) (s_q + r*ld_k + e) = lminf_pack_2_halves(lminf_saturate(q_scale*x.x), lminf_saturate(q_scale*x.y));
            }
        }

        const char * k    = lminf_row_data(sec.k, 0, h_kv, stream);
        const char * v    = lminf_row_data(sec.v, 0, h_kv, stream);
        const char * mask = lminf_row_data(args.mask, 0, 0, stream) + 4*sec.mask_col0;

        // multi-head latent attention: K's tile has V already
        const bool v_in_k = !has_stages && v == k && sec.v.nb1 == sec.k.nb1 && sec.v.type == sec.k.type;
        const int  ld_v   = lminf_tile_ld(v_in_k ? n_embd_k : n_embd_v);

        const __half * my_v = s_k + n_to_v + lane % 16*ld_v + lane/16*8 + e_part;

        const char * my_mask[2] = { mask + my_query[0]*args.mask.nb1, mask + my_query[1]*args.mask.nb1 };
        const bool   is_aligned = ((uintptr_t) (mask + 4*sec.begin) | args.mask.nb1) % 16 == 0;

        float m[2][N_CELLS/4]; // the mask of what this lane has of a tile's scores, read while the tile before is multiplied

        const auto load_mask = [&](int cell0, int n_cells) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float * row = (const float *) my_mask[r] + cell0 + lane % 4*4;
#pragma unroll
                for (int j = 0; j < N_CELLS/16; ++j) {
                    if (is_aligned && n_cells == N_CELLS) {
                        const float4 x = __ldg((const float4 *) (row + 16*j));
                        m[r][4*j] = x.x; m[r][4*j + 1] = x.y; m[r][4*j + 2] = x.z; m[r][4*j + 3] = x.w;
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            m[r][4*j + i] = 16*j + lane % 4*4 + i < n_cells ? __ldg(row + 16*j + i) : -INFINITY;
                        }
                    }
                }
            }
        };
        const auto masked = [&](float x, int j, int i) { // score i of 4 of piece j
            return x + slope[i/2]*m[i/2][4*(j/2) + j%2*2 + i%2];
        };

#pragma unroll 1
        for (int chunk0 = sec.begin; chunk0 < sec.end; chunk0 += LMINF_CUDA_WARP*N_CELLS) {
            uint32_t open = lminf_open_tiles(s_open, mask + q0*args.mask.nb1, args.mask.nb1, n_queries, chunk0, sec.end, N_CELLS, n_warps, tid);

            int stage = 0; // of the tile that comes next, in halves

            // the next open tile's cells
            const auto get_cells = [&](int & cell0, int & n_cells) {
                cell0   = chunk0 + (__ffs(open) - 1)*N_CELLS;
                n_cells = min(N_CELLS, sec.end - cell0);
            };
            const auto load_k = [&]() { // and V, if there are stages
                if (open == 0) {
                    return;
                }
                int cell0, n_cells;
                get_cells(cell0, n_cells);
                lminf_load_tile<IS_F16>(s_k + stage, ld_k, sec.k, k + cell0*sec.k.nb1, n_cells, N_CELLS, n_embd_k, n_threads, tid);
                if (has_stages) {
                    lminf_load_tile<IS_F16>(s_k + stage + n_to_v, ld_v, sec.v, v + cell0*sec.v.nb1, n_cells, N_CELLS, n_embd_v, n_threads, tid);
                }
            };
            const auto load_next_mask = [&]() {
                if (open == 0) {
                    return;
                }
                int cell0, n_cells;
                get_cells(cell0, n_cells);
                load_mask(cell0, n_cells);
            };

            load_next_mask();
            load_k();

#pragma unroll 1
            while (open != 0) {
                int cell0, n_cells;
                get_cells(cell0, n_cells);
                open &= open - 1;

                const int here = stage;
                stage = n_stage - stage;

                lminf_wait_for_copies();
                __syncthreads(); // K, or K and V, are there, and nobody reads the other stage any more

                if (has_stages) {
                    load_k();
                }

                // scores [16, N_CELLS]

                float s[N_CELLS/8][4];
#pragma unroll
                for (int j = 0; j < N_CELLS/8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        s[j][i] = has_softcap ? 0.0f : masked(0.0f, j, i);
                    }
                }

#pragma unroll 4
                for (int e = 0; e < n_embd_k; e += 16) {
                    uint32_t a[4];
                    lminf_load_matrices(a, my_q + e);
#pragma unroll
                    for (int j = 0; j < N_CELLS/16; ++j) {
                        uint32_t b[4];
                        lminf_load_matrices(b, my_k + here + 16*j*ld_k + e);
                        lminf_mma(s[2*j],     a, b[0], b[1]);
                        lminf_mma(s[2*j + 1], a, b[2], b[3]);
                    }
                }

                if (!has_stages && !v_in_k) {
                    __syncthreads(); // K was read
                    lminf_load_tile<IS_F16>(s_k, ld_v, sec.v, v + cell0*sec.v.nb1, n_cells, N_CELLS, n_embd_v, n_threads, tid);
                }

                if (has_softcap) {
#pragma unroll
                    for (int j = 0; j < N_CELLS/8; ++j) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            s[j][i] = masked(LOG2_E*lminf_softcap(args, s[j][i]), j, i);
                        }
                    }
                }
                load_next_mask();

                // softmax

                float scale[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float max_new = max_score[r];
#pragma unroll
                    for (int j = 0; j < N_CELLS/8; ++j) {
                        max_new = fmaxf(max_new, fmaxf(s[j][2*r], s[j][2*r + 1]));
                    }
                    max_new = fmaxf(max_new, __shfl_xor_sync(0xFFFFFFFFu, max_new, 1));
                    max_new = fmaxf(max_new, __shfl_xor_sync(0xFFFFFFFFu, max_new, 2));

                    const float base = max_new == -INFINITY ? 0.0f : max_new; // nothing was seen: exp2f is 0
                    scale[r]     = exp2f(max_score[r] - base);
                    max_score[r] = max_new;
                    sum[r]      *= scale[r];
#pragma unroll
                    for (int j = 0; j < N_CELLS/8; ++j) {
                        s[j][2*r]     = exp2f(s[j][2*r]     - base);
                        s[j][2*r + 1] = exp2f(s[j][2*r + 1] - base);
                        sum[r] += s[j][2*r] + s[j][2*r + 1];
                    }
                }
                if (__ballot_sync(0xFFFFFFFFu, scale[0] != 1.0f || scale[1] != 1.0f) != 0) {
#pragma unroll
                    for (int f = 0; f < 2*N_FRAGS; ++f) {
                        acc[f][0] *= scale[0];
                        acc[f][1] *= scale[0];
                        acc[f][2] *= scale[1];
                        acc[f][3] *= scale[1];
                    }
                }

                if (!has_stages && !v_in_k) {
                    lminf_wait_for_copies();
                    __syncthreads();
                }

#pragma unroll
                for (int j = 0; j < N_CELLS/16; ++j) {
                    // as they are in registers, scores are weights in rows of matrix a
                    const uint32_t a[4] = {
                        lminf_pack_2_halves(s[2*j][0],     s[2*j][1]),     lminf_pack_2_halves(s[2*j][2],     s[2*j][3]),
                        lminf_pack_2_halves(s[2*j + 1][0], s[2*j + 1][1]), lminf_pack_2_halves(s[2*j + 1][2], s[2*j + 1][3]),
                    };
#pragma unroll
                    for (int f = 0; f < N_FRAGS; ++f) {
                        if (e_part + 16*f < n_embd_v) {
                            uint32_t b[4];
                            lminf_load_matrices_transposed(b, my_v + here + 16*j*ld_v + 16*f);
                            lminf_mma(acc[2*f],     a, b[0], b[1]);
                            lminf_mma(acc[2*f + 1], a, b[2], b[3]);
                        }
                    }
                }

                if (!has_stages) {
                    __syncthreads(); // V was read
                    load_k();
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
        max_score[r] *= 1.0f/LOG2_E;

        if (16*(warp/N_PARTS) + lane/4 + 8*r >= n_rows) {
            continue;
        }
        const int64_t i_out = lminf_out_index(args, my_head[r], my_query[r], stream);
        const float   norm  = p.n_split == 1 ? lminf_norm(args, my_head[r], max_score[r], sum[r]) : 1.0f;

        if (p.n_split > 1 && lane % 4 == 0 && part == 0) {
            p.max_sum[(i_out*p.n_split + split)*2]     = max_score[r];
            p.max_sum[(i_out*p.n_split + split)*2 + 1] = sum[r];
        }
        float * to = p.n_split == 1 ? args.dst + i_out*n_embd_v : p.acc + (i_out*p.n_split + split)*n_embd_v;
#pragma unroll
        for (int f = 0; f < 2*N_FRAGS; ++f) {
            const int e = e_part + 8*f + lane % 4*2;
            if (e < n_embd_v) {
                *(float2 *) (to + e) = make_float2(norm*acc[f][2*r], norm*acc[f][2*r + 1]);
            }
        }
    }
#endif
}

//
// combine kernel: a block per row puts the splits together
//

constexpr int LMINF_CUDA_COMBINE_THREADS = 128;

static __global__ void __launch_bounds__(LMINF_CUDA_COMBINE_THREADS) lminf_combine_kernel(const lminf_cuda_params p) {
    LMINF_CUDA_SHARED(shared);

    float * weight = (float *) shared; // [n_split], what each split's sums are multiplied with

    const lminf_attn_args & args = p.args;

    const int     tid   = threadIdx.x;
    const int64_t i_out = blockIdx.x;

    const float * max_sum = p.max_sum + i_out*p.n_split*2;
    const float * acc     = p.acc     + i_out*p.n_split*args.n_embd_head_v;

    // every warp for itself: no barrier, and no more waiting than one
    float max_all = -INFINITY;
    for (int i = tid % LMINF_CUDA_WARP; i < p.n_split; i += LMINF_CUDA_WARP) {
        max_all = fmaxf(max_all, max_sum[2*i]);
    }
    max_all = lminf_warp_max(max_all);

    float sum = 0.0f;
    for (int i = tid % LMINF_CUDA_WARP; i < p.n_split; i += LMINF_CUDA_WARP) {
        const float scale = lminf_exp(max_sum[2*i], max_all);
        sum += max_sum[2*i + 1]*scale;
        if (tid < LMINF_CUDA_WARP) {
            weight[i] = scale;
        }
    }
    sum = lminf_warp_sum(sum);
    __syncthreads();

    const float norm = lminf_norm(args, i_out % args.n_head, max_all, sum);

    for (int e = tid; e < args.n_embd_head_v; e += LMINF_CUDA_COMBINE_THREADS) {
        float res = 0.0f;
#pragma unroll 8
        for (int i = 0; i < p.n_split; ++i) {
            res += acc[(int64_t) i*args.n_embd_head_v + e]*weight[i];
        }
        args.dst[i_out*args.n_embd_head_v + e] = norm*res;
    }
}
