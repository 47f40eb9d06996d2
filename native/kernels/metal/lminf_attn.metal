// GGML_OP_LMINF_ATTN on Metal: attention over [sinks | window] with two queries and one softmax, see lminf-attn.h
//
// One KV head serves a whole group of query heads. Its (query, head of the group) pairs are the "rows" of both kernels,
// row = query*n_group + head: whoever reads a K or V row converts it once for all of them.
// Cells go by blocks of 32 that are either sinks or window, sinks first and with q_sink; a block which no query of the
// tile may see is skipped after a look at the mask.
//
// decode, few queries: threadgroup = 4 simdgroups, up to 16 rows, one share ("split") of the cell blocks.
//   A simdgroup takes whole blocks and waits for no other until the end. Scores: 8 lanes per cell, 4 cells at a time: a
//   sum over 8 lanes costs 3 shuffles for 4 cells, over 32 lanes 5 for one. Softmax: a lane per cell. Values: as many
//   lanes per cell as its row has float4s, 4 cells a lane, so that one load of 4 weights serves 16 multiply-adds.
//   Accumulators: at most 64 floats a lane, hence 8 rows instead of 16 where V heads are longer than 128, and 4 where K or
//   V heads are longer than 256, which are walked in pieces of 256 elements.
//   Each split leaves (max, sum, sums of values) in scratch memory, and `combine` merges them.
//
// prefill, many queries: threadgroup = 4 simdgroups of 8 rows (2 where K heads are longer than 128), all cell blocks.
//   8x8 matrices of float, results in registers. K and V pass through threadgroup memory in pieces of 32 cells by 64
//   elements: 8 KiB, which with 16 KiB of queries and 4 KiB of scores stays below the 32 KiB a threadgroup may have.
//   K or V heads longer than 256: queries leave room for 8 rows only, and 8 rows of results would be 128 floats a lane. So
//   all 4 simdgroups share those 8 rows, and each does a quarter: of the cells of S = Q K^T, and of every piece of V.
//   Float and not half: f32 and bf16 keep their range, a quantized value is not rounded twice, and the multiply-add of
//   Apple's GPUs is as fast in float as in half. What half would save is threadgroup memory.
//
// Tile sizes are reasoned, not measured: written without an Apple GPU at hand, tested as C++ on a CPU (native/tests). What
// .github/workflows/metal.yml runs on is in its log.
//
// Metal compiles with fast math, which knows no infinities: "nothing seen yet" is -FLT_MAX/2, and so is the bound below
// which the mask is closed. The host includes this file as well, for the structs at its beginning.

#ifdef __METAL_VERSION__
#include <metal_stdlib>
using namespace metal;
#else
#include <cstdint>
#endif

// byte strides of a query or cell, head and stream
struct lminf_attn_metal_strides {
    uint64_t nb1;
    uint64_t nb2;
    uint64_t nb3;
};

struct lminf_attn_metal_args {
    struct lminf_attn_metal_strides q, k, v, mask, q_sink, k_sink, v_sink;

    int32_t n_q;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_sink;
    int32_t n_kv;
    int32_t n_embd_head_v;
    int32_t n_split;
    int32_t n_rows_all; // n_stream*n_q*n_head, rows of dst
    int32_t has_head_sinks;

    float   scale;
    float   logit_softcap;
    float   max_bias;
    float   m0;
    float   m1;
    int32_t n_head_log2;
};

// as in ggml.h
#define LMINF_ATTN_METAL_F32   0
#define LMINF_ATTN_METAL_F16   1
#define LMINF_ATTN_METAL_Q4_0  2
#define LMINF_ATTN_METAL_Q8_0  8
#define LMINF_ATTN_METAL_BF16 30

// function constants: what loops and branches are specialized for
#define LMINF_ATTN_METAL_FC_N_EMBD_K    9000
#define LMINF_ATTN_METAL_FC_N_EMBD_V    9001
#define LMINF_ATTN_METAL_FC_TYPE_K      9002
#define LMINF_ATTN_METAL_FC_TYPE_V      9003
#define LMINF_ATTN_METAL_FC_TYPE_K_SINK 9004
#define LMINF_ATTN_METAL_FC_TYPE_V_SINK 9005
#define LMINF_ATTN_METAL_FC_N_SG        9006

#define LMINF_ATTN_METAL_BLOCK 32 // cells
#define LMINF_ATTN_METAL_PIECE 64 // elements of a K or V row that prefill has in threadgroup memory at a time

// threadgroup memory in floats
#define LMINF_ATTN_METAL_DECODE_SHARED(n_embd_max, n_rows, n_sg) \
    ((n_rows)*(n_embd_max) + (n_sg)*(n_rows)*LMINF_ATTN_METAL_BLOCK + 2*(n_sg)*(n_rows) + (n_rows))
#define LMINF_ATTN_METAL_PREFILL_SHARED(n_embd_k, n_rows, n_sg) \
    ((n_rows)*(n_embd_k) + LMINF_ATTN_METAL_BLOCK*LMINF_ATTN_METAL_PIECE + (n_sg)*(8*LMINF_ATTN_METAL_BLOCK + 64) + 2*(n_sg))

#ifdef __METAL_VERSION__

#define LMINF_UNROLL _Pragma("clang loop unroll(full)")

#define LMINF_NOTHING (-FLT_MAX/2)

constant int lminf_n_embd_k    [[function_constant(LMINF_ATTN_METAL_FC_N_EMBD_K)]];
constant int lminf_n_embd_v    [[function_constant(LMINF_ATTN_METAL_FC_N_EMBD_V)]];
constant int lminf_type_k      [[function_constant(LMINF_ATTN_METAL_FC_TYPE_K)]];
constant int lminf_type_v      [[function_constant(LMINF_ATTN_METAL_FC_TYPE_V)]];
constant int lminf_type_k_sink [[function_constant(LMINF_ATTN_METAL_FC_TYPE_K_SINK)]];
constant int lminf_type_v_sink [[function_constant(LMINF_ATTN_METAL_FC_TYPE_V_SINK)]];
constant int lminf_n_sg        [[function_constant(LMINF_ATTN_METAL_FC_N_SG)]]; // simdgroups per threadgroup

// elements 4*i to 4*i + 3 of a K or V row; quantized blocks are aligned to two bytes only
static inline float4 lminf_load4(device const char * row, int type, int i) {
    if (type == LMINF_ATTN_METAL_F16) {
        return float4(((device const half4 *) row)[i]);
    }
    if (type == LMINF_ATTN_METAL_F32) {
        return ((device const float4 *) row)[i];
    }
    if (type == LMINF_ATTN_METAL_BF16) {
        const ushort4 x = ((device const ushort4 *) row)[i]; // not every GPU knows bfloat
        return float4(
                as_type<float>((uint) x.x << 16), as_type<float>((uint) x.y << 16),
                as_type<float>((uint) x.z << 16), as_type<float>((uint) x.w << 16));
    }
    if (type == LMINF_ATTN_METAL_Q8_0) {
        device const ushort * block = (device const ushort *) (row + 34*(i/8)); // a half, 32 bytes
        const float d  = (float) as_type<half>(block[0]);
        const char2 x0 = as_type<char2>(block[1 + 2*(i%8)]);
        const char2 x1 = as_type<char2>(block[2 + 2*(i%8)]);
        return float4(d*(float) x0.x, d*(float) x0.y, d*(float) x1.x, d*(float) x1.y);
    }
    // Q4_0: a half, 16 bytes; elements 0 to 15 are the low halves of the bytes, 16 to 31 the high ones
    device const ushort * block = (device const ushort *) (row + 18*(i/8));
    const float d  = (float) as_type<half>(block[0]);
    const int   sh = (i%8)/4*4;
    const int   x0 = (int) block[1 + 2*(i%4)] >> sh;
    const int   x1 = (int) block[2 + 2*(i%4)] >> sh;
    return float4(
            d*(float) ((x0 & 15) - 8), d*(float) (((x0 >> 8) & 15) - 8),
            d*(float) ((x1 & 15) - 8), d*(float) (((x1 >> 8) & 15) - 8));
}

// what multiplies the mask for head h
static inline float lminf_slope(constant lminf_attn_metal_args & args, int h) {
    if (args.max_bias <= 0.0f) {
        return 1.0f;
    }
    return h < args.n_head_log2 ?
        precise::pow(args.m0, (float) (h + 1)) : precise::pow(args.m1, (float) (2*(h - args.n_head_log2) + 1));
}

// the score that enters the softmax, from a plain dot product
static inline float lminf_score(constant lminf_attn_metal_args & args, float qk, float slope, float mask) {
    float s = qk*args.scale;
    if (args.logit_softcap > 0.0f) {
        s = args.logit_softcap*precise::tanh(s);
    }
    return s + slope*mask;
}

#ifndef LMINF_SHARED // the tests' stand-in for Metal has no attribute that is also a qualifier
#define LMINF_SHARED [[threadgroup(0)]]
#endif

#define LMINF_BUFFERS \
        constant lminf_attn_metal_args & args       [[buffer(0)]], \
        device const char              * q          [[buffer(1)]], \
        device const char              * k          [[buffer(2)]], \
        device const char              * v          [[buffer(3)]], \
        device const char              * mask       [[buffer(4)]], \
        device const float             * head_sinks [[buffer(5)]], \
        device const char              * q_sink     [[buffer(6)]], \
        device const char              * k_sink     [[buffer(7)]], \
        device const char              * v_sink     [[buffer(8)]], \
        device float                   * out        [[buffer(9)]], \
        threadgroup float              * shared     LMINF_SHARED, \
        uint3                            group      [[threadgroup_position_in_grid]], \
        ushort                           lane       [[thread_index_in_simdgroup]], \
        ushort                           sg         [[simdgroup_index_in_threadgroup]]

#define LMINF_PASS args, q, k, v, mask, head_sinks, q_sink, k_sink, v_sink, out, shared, group, lane, sg

// R: rows, NV: float4s of a V row that a lane holds per accumulator, one for each 32 of them. Of K rows, 64 are walked at a
// time, with NV > 2 as often as it takes, else once
// grid: n_split, n_head_kv*tiles of R rows, n_stream
template<int R, int NV>
static void lminf_decode(
        constant lminf_attn_metal_args & args,
        device const char  * q,
        device const char  * k,
        device const char  * v,
        device const char  * mask,
        device const float * head_sinks,
        device const char  * q_sink,
        device const char  * k_sink,
        device const char  * v_sink,
        device float       * out,
        threadgroup float  * shared,
        uint3  group,
        ushort lane,
        ushort sg) {
    (void) head_sinks; // combine's

    const int n_k4     = lminf_n_embd_k/4;
    const int n_v4     = lminf_n_embd_v/4;
    const int n_sg     = lminf_n_sg;
    const int n_thread = 32*n_sg;
    const int thread_i = 32*sg + lane;

    const int n_group  = args.n_head/args.n_head_kv;
    const int h_kv     = group.y % args.n_head_kv;
    const int row0     = group.y / args.n_head_kv*R;
    const int n_rows   = min(R, args.n_q*n_group - row0);
    const int i_first  = row0/n_group;                // queries of this tile
    const int i_last   = (row0 + n_rows - 1)/n_group;

    threadgroup float * sh_q     = shared;                                               // [R][n_embd_k], at the end [R][n_embd_v]
    threadgroup float * sh_s     = sh_q + R*max(lminf_n_embd_k, lminf_n_embd_v);         // [n_sg][R][32] scores, then weights
    threadgroup float * sh_m     = sh_s + n_sg*R*LMINF_ATTN_METAL_BLOCK;                 // [n_sg][R]
    threadgroup float * sh_l     = sh_m + n_sg*R;                                        // [n_sg][R]
    threadgroup float * sh_slope = sh_l + n_sg*R;                                        // [R]

    threadgroup float4 * sh_q4 = (threadgroup float4 *) sh_q;
    threadgroup float  * s     = sh_s + sg*R*LMINF_ATTN_METAL_BLOCK; // this simdgroup's

    mask += (uint64_t) group.z*args.mask.nb3;

    if (thread_i < n_rows) {
        sh_slope[thread_i] = lminf_slope(args, h_kv*n_group + (row0 + thread_i)%n_group);
    }

    // lanes per cell for V: a power of two, at least 4, so that 32 lanes of 4 cells each are at most one block
    int n_lane_v = 4;
    while (n_lane_v < n_v4 && n_lane_v < 32) {
        n_lane_v *= 2;
    }

    float  m[R];       // the same in all lanes
    float  l[R];       // this lane's cells
    float4 acc[R][NV]; // elements 4*(lane%n_lane_v + 32*x) of this lane's cells

    LMINF_UNROLL
    for (int r = 0; r < R; ++r) {
        m[r] = LMINF_NOTHING;
        l[r] = 0.0f;
        LMINF_UNROLL
        for (int x = 0; x < NV; ++x) {
            acc[r][x] = float4(0.0f);
        }
    }

    // this split's share of the blocks
    const int n_block_sink = (args.n_sink + LMINF_ATTN_METAL_BLOCK - 1)/LMINF_ATTN_METAL_BLOCK;
    const int n_block      = (args.n_kv   + LMINF_ATTN_METAL_BLOCK - 1)/LMINF_ATTN_METAL_BLOCK + n_block_sink;
    const int block_begin  = n_block* (int) group.x     /args.n_split;
    const int block_end    = n_block*((int) group.x + 1)/args.n_split;

    for (int is_window = 0; is_window < 2; ++is_window) {
        const int begin = is_window ? max(block_begin, n_block_sink) : block_begin;
        const int end   = is_window ? block_end : min(block_end, n_block_sink);
        if (begin >= end) {
            continue;
        }

        const int type_k  = is_window ? lminf_type_k : lminf_type_k_sink;
        const int type_v  = is_window ? lminf_type_v : lminf_type_v_sink;
        const int n_cells = is_window ? args.n_kv    : args.n_sink;
        const int cell0   = is_window ? n_block_sink*LMINF_ATTN_METAL_BLOCK : 0; // of block 0, so to say
        const int column0 = is_window ? args.n_sink  : 0;                        // of the mask

        const uint64_t nb1_k = is_window ? args.k.nb1 : args.k_sink.nb1;
        const uint64_t nb1_v = is_window ? args.v.nb1 : args.v_sink.nb1;

        device const char * data_k = is_window ?
            k      + (uint64_t) h_kv*args.k.nb2      + (uint64_t) group.z*args.k.nb3 :
            k_sink + (uint64_t) h_kv*args.k_sink.nb2 + (uint64_t) group.z*args.k_sink.nb3;
        device const char * data_v = is_window ?
            v      + (uint64_t) h_kv*args.v.nb2      + (uint64_t) group.z*args.v.nb3 :
            v_sink + (uint64_t) h_kv*args.v_sink.nb2 + (uint64_t) group.z*args.v_sink.nb3;

        threadgroup_barrier(mem_flags::mem_threadgroup); // nobody needs q_sink any more
        for (int e = thread_i; e < n_rows*n_k4; e += n_thread) {
            const int i = (row0 + e/n_k4)/n_group;
            const int h = (row0 + e/n_k4)%n_group + h_kv*n_group;
            device const char * row = is_window ?
                q      + (uint64_t) i*args.q.nb1      + (uint64_t) h*args.q.nb2      + (uint64_t) group.z*args.q.nb3 :
                q_sink + (uint64_t) i*args.q_sink.nb1 + (uint64_t) h*args.q_sink.nb2 + (uint64_t) group.z*args.q_sink.nb3;
            sh_q4[e] = ((device const float4 *) row)[e%n_k4];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        for (int block = begin + sg; block < end; block += n_sg) {
            const int cell = block*LMINF_ATTN_METAL_BLOCK - cell0; // the block's first

            // bit c: some query may see cell c
            bool is_open = false;
            if (cell + lane < n_cells) {
                for (int i = i_first; i <= i_last; ++i) {
                    is_open = is_open || ((device const float *) (mask + (uint64_t) i*args.mask.nb1))[column0 + cell + lane] > LMINF_NOTHING;
                }
            }
            const uint open = simd_or(is_open ? 1u << lane : 0u);
            if (open == 0) {
                continue;
            }

            for (int c0 = 0; c0 < LMINF_ATTN_METAL_BLOCK; c0 += 4) {
                if (((open >> c0) & 15) == 0) {
                    continue;
                }
                // past the last cell: that one again, its weight will be zero
                const int c = c0 + lane/8;
                device const char * row = data_k + (uint64_t) min(cell + c, n_cells - 1)*nb1_k;

                for (int e0 = 0; e0 < (NV > 2 ? n_k4 : 1); e0 += 64) {
                    float4 x[8];
                    LMINF_UNROLL
                    for (int u = 0; u < 8; ++u) {
                        const int e = e0 + lane%8 + 8*u;
                        x[u] = e < n_k4 ? lminf_load4(row, type_k, e) : float4(0.0f);
                    }

                    LMINF_UNROLL
                    for (int r = 0; r < R; ++r) {
                        if (r < n_rows) {
                            float sum = 0.0f;
                            LMINF_UNROLL
                            for (int u = 0; u < 8; ++u) {
                                const int e = e0 + lane%8 + 8*u;
                                if (e < n_k4) {
                                    sum += dot(x[u], sh_q4[r*n_k4 + e]);
                                }
                            }
                            sum += simd_shuffle_xor(sum, 1);
                            sum += simd_shuffle_xor(sum, 2);
                            sum += simd_shuffle_xor(sum, 4);
                            if (lane%8 == 0) {
                                threadgroup float & to = s[r*LMINF_ATTN_METAL_BLOCK + c];
                                to = e0 == 0 ? sum : to + sum;
                            }
                        }
                    }
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);

            // lane = cell
            int   i_mask = -1;
            float x_mask = LMINF_NOTHING;
            LMINF_UNROLL
            for (int r = 0; r < R; ++r) {
                if (r < n_rows) {
                    const int i = (row0 + r)/n_group;
                    if (i != i_mask) {
                        i_mask = i;
                        x_mask = cell + lane < n_cells ?
                            ((device const float *) (mask + (uint64_t) i*args.mask.nb1))[column0 + cell + lane] : LMINF_NOTHING;
                    }
                    const bool  sees  = x_mask > LMINF_NOTHING;
                    const float score = sees ? lminf_score(args, s[r*LMINF_ATTN_METAL_BLOCK + lane], sh_slope[r], x_mask) : LMINF_NOTHING;
                    const float m_new = max(m[r], simd_max(score));
                    const float alpha = exp(m[r] - m_new);
                    const float p     = sees ? exp(score - m_new) : 0.0f;

                    m[r] = m_new;
                    l[r] = l[r]*alpha + p;
                    s[r*LMINF_ATTN_METAL_BLOCK + lane] = p;
                    LMINF_UNROLL
                    for (int x = 0; x < NV; ++x) {
                        acc[r][x] *= alpha;
                    }
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);

            for (int c = lane/n_lane_v*4; c < LMINF_ATTN_METAL_BLOCK; c += 32/n_lane_v*4) {
                if (((open >> c) & 15) == 0) {
                    continue;
                }
                const int NY = NV < 2 ? NV : 2; // at a time
                LMINF_UNROLL
                for (int y0 = 0; y0 < NV; y0 += NY) {
                    float4 x[4][NY];
                    LMINF_UNROLL
                    for (int u = 0; u < 4; ++u) {
                        device const char * row = data_v + (uint64_t) min(cell + c + u, n_cells - 1)*nb1_v;
                        LMINF_UNROLL
                        for (int y = 0; y < NY; ++y) {
                            const int e = lane%n_lane_v + 32*(y0 + y);
                            x[u][y] = e < n_v4 ? lminf_load4(row, type_v, e) : float4(0.0f);
                        }
                    }
                    LMINF_UNROLL
                    for (int r = 0; r < R; ++r) {
                        if (r < n_rows) {
                            const float4 p = *(threadgroup const float4 *) (s + r*LMINF_ATTN_METAL_BLOCK + c);
                            LMINF_UNROLL
                            for (int y = 0; y < NY; ++y) {
                                acc[r][y0 + y] += p.x*x[0][y] + p.y*x[1][y] + p.z*x[2][y] + p.w*x[3][y];
                            }
                        }
                    }
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup); // before the next block's scores
        }
    }

    // over the lanes of this simdgroup
    LMINF_UNROLL
    for (int r = 0; r < R; ++r) {
        if (r < n_rows) {
            l[r] = simd_sum(l[r]);
            for (int step = n_lane_v; step < 32; step *= 2) {
                LMINF_UNROLL
                for (int x = 0; x < NV; ++x) {
                    acc[r][x] += simd_shuffle_xor(acc[r][x], (ushort) step);
                }
            }
            if (lane == 0) {
                sh_m[sg*R + r] = m[r];
                sh_l[sg*R + r] = l[r];
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // over the simdgroups, one after the other
    for (int w = 0; w < n_sg; ++w) {
        if (sg == w) {
            LMINF_UNROLL
            for (int r = 0; r < R; ++r) {
                if (r < n_rows) {
                    float m_all = LMINF_NOTHING;
                    for (int u = 0; u < n_sg; ++u) {
                        m_all = max(m_all, sh_m[u*R + r]);
                    }
                    const float alpha = exp(m[r] - m_all);
                    LMINF_UNROLL
                    for (int x = 0; x < NV; ++x) {
                        const int e = lane + 32*x;
                        if (lane < n_lane_v && e < n_v4) {
                            sh_q4[r*n_v4 + e] = w == 0 ? alpha*acc[r][x] : sh_q4[r*n_v4 + e] + alpha*acc[r][x];
                        }
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // scratch: [n_rows_all][n_split][n_embd_v] sums of values, [n_rows_all][n_split][2] max and sum of weights
    device float * out_ml = out + (uint64_t) args.n_rows_all*args.n_split*lminf_n_embd_v;

    for (int e = thread_i; e < n_rows*n_v4; e += n_thread) {
        const int i = (row0 + e/n_v4)/n_group;
        const int h = (row0 + e/n_v4)%n_group + h_kv*n_group;
        const uint64_t part = (((uint64_t) group.z*args.n_q + i)*args.n_head + h)*args.n_split + group.x;
        ((device float4 *) out)[part*n_v4 + e%n_v4] = sh_q4[e];
    }
    if (thread_i < n_rows) {
        const int i = (row0 + thread_i)/n_group;
        const int h = (row0 + thread_i)%n_group + h_kv*n_group;
        const uint64_t part = (((uint64_t) group.z*args.n_q + i)*args.n_head + h)*args.n_split + group.x;

        float m_all = LMINF_NOTHING;
        for (int u = 0; u < n_sg; ++u) {
            m_all = max(m_all, sh_m[u*R + thread_i]);
        }
        float l_all = 0.0f;
        for (int u = 0; u < n_sg; ++u) {
            l_all += exp(sh_m[u*R + thread_i] - m_all)*sh_l[u*R + thread_i];
        }
        out_ml[2*part + 0] = m_all;
        out_ml[2*part + 1] = l_all;
    }
}

kernel void kernel_lminf_attn_decode_4   (LMINF_BUFFERS) { lminf_decode< 4, 2>(LMINF_PASS); }
kernel void kernel_lminf_attn_decode_8   (LMINF_BUFFERS) { lminf_decode< 8, 2>(LMINF_PASS); }
kernel void kernel_lminf_attn_decode_16  (LMINF_BUFFERS) { lminf_decode<16, 1>(LMINF_PASS); }
kernel void kernel_lminf_attn_decode_wide(LMINF_BUFFERS) { lminf_decode< 4, 4>(LMINF_PASS); }

// grid: rows of dst, one simdgroup each; lane = split, of which there are at most 32
kernel void kernel_lminf_attn_combine(
        constant lminf_attn_metal_args & args       [[buffer(0)]],
        device const float             * scratch    [[buffer(1)]],
        device const float             * head_sinks [[buffer(2)]],
        device float                   * dst        [[buffer(3)]],
        uint3                            group      [[threadgroup_position_in_grid]],
        ushort                           lane       [[thread_index_in_simdgroup]]) {
    const int n_v4    = args.n_embd_head_v/4;
    const int n_split = args.n_split;

    const uint64_t part0 = (uint64_t) group.x*n_split;

    device const float  * ml  = scratch + (uint64_t) args.n_rows_all*n_split*args.n_embd_head_v + 2*part0;
    device const float4 * acc = (device const float4 *) scratch + part0*n_v4;

    const float m = lane < n_split ? ml[2*lane + 0] : LMINF_NOTHING;
    const float l = lane < n_split ? ml[2*lane + 1] : 0.0f;

    float m_all = simd_max(m);
    float sink  = LMINF_NOTHING;
    if (args.has_head_sinks) {
        sink  = head_sinks[(int) group.x % args.n_head];
        m_all = max(m_all, sink);
    }

    float w   = exp(m - m_all);
    float sum = simd_sum(w*l);
    if (args.has_head_sinks) {
        sum += exp(sink - m_all);
    }
    w = sum > 0.0f ? w/sum : 0.0f;

    for (int e0 = 0; e0 < n_v4; e0 += 32) {
        const int e = e0 + lane;
        float4 res = float4(0.0f);
        for (int i = 0; i < n_split; ++i) {
            const float w_i = simd_shuffle(w, (ushort) i);
            if (e < n_v4) {
                res += w_i*acc[i*n_v4 + e];
            }
        }
        if (e < n_v4) {
            ((device float4 *) dst)[(uint64_t) group.x*n_v4 + e] = res;
        }
    }
}

// a piece of 32 K or V rows in threadgroup memory: [32][64], zeros where there is nothing
static inline void lminf_load_piece(
        threadgroup float4 * to, device const char * data, uint64_t nb1, int type, int cell, int n_cells, int e0, int n_e, int thread_i, int n_thread) {
    for (int j = thread_i; j < LMINF_ATTN_METAL_BLOCK*LMINF_ATTN_METAL_PIECE/4; j += n_thread) {
        const int c = cell + j/(LMINF_ATTN_METAL_PIECE/4);
        const int e = e0   + j%(LMINF_ATTN_METAL_PIECE/4);
        to[j] = c < n_cells && e < n_e ? lminf_load4(data + (uint64_t) c*nb1, type, e) : float4(0.0f);
    }
}

// barrier of the simdgroups that share rows
template<int NS>
static inline void lminf_rows_barrier() {
    if (NS == 1) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

// the first element of V in matrix j of a simdgroup that has the `share`-th NP of the 8 of every piece
template<int NP>
static inline int lminf_v_element(int share, int j) {
    return NP == 8 ? 8*j : j/NP*LMINF_ATTN_METAL_PIECE + 8*(share*NP + j%NP);
}

// NS: simdgroups that share 8 rows, NO: 8x8 matrices of a V row that each of them has at most
// grid: tiles of 8*n_sg/NS rows, n_head_kv, n_stream
template<int NO, int NS>
static void lminf_prefill(
        constant lminf_attn_metal_args & args,
        device const char  * q,
        device const char  * k,
        device const char  * v,
        device const char  * mask,
        device const float * head_sinks,
        device const char  * q_sink,
        device const char  * k_sink,
        device const char  * v_sink,
        device float       * out,
        threadgroup float  * shared,
        uint3  group,
        ushort lane,
        ushort sg) {
    const int n_k4     = lminf_n_embd_k/4;
    const int n_v4     = lminf_n_embd_v/4;
    const int n_sg     = lminf_n_sg;
    const int n_thread = 32*n_sg;
    const int thread_i = 32*sg + lane;

    const int n_group  = args.n_head/args.n_head_kv;
    const int h_kv     = group.y;
    const int row0     = group.x*8*n_sg/NS;
    const int max_rows = 8*n_sg/NS;
    const int n_rows   = min(max_rows, args.n_q*n_group - row0);
    const int i_first  = row0/n_group;                // queries of this tile
    const int n_i      = (row0 + n_rows - 1)/n_group - i_first + 1;

    threadgroup float * sh_q  = shared;                                                    // [max_rows][n_embd_k]
    threadgroup float * sh_kv = sh_q  + max_rows*lminf_n_embd_k;                           // [32][64]
    threadgroup float * sh_s  = sh_kv + LMINF_ATTN_METAL_BLOCK*LMINF_ATTN_METAL_PIECE;     // [n_sg][8][32] scores, weights, results
    threadgroup float * sh_d  = sh_s  + n_sg*8*LMINF_ATTN_METAL_BLOCK;                     // [n_sg][8][8] diagonal matrices
    threadgroup uint  * sh_open = (threadgroup uint *) (sh_d + n_sg*64);                   // [2][n_sg]

    // this simdgroup's, or shared
    threadgroup float * q8 = sh_q + sg/NS*8*lminf_n_embd_k;
    threadgroup float * s  = sh_s + sg/NS*8*LMINF_ATTN_METAL_BLOCK;

    // this simdgroup's in any case
    threadgroup float * d     = sh_d + sg*64;
    threadgroup float * stage = sh_s + sg*8*LMINF_ATTN_METAL_BLOCK; // where results pass at the end

    const int share = sg%NS;
    const int NC    = 4/NS; // of S, as many matrices of 8 cells are this simdgroup's,
    const int NP    = 8/NS; // and of a piece of V, as many of 8 elements

    // four lanes share a row in everything that is not a matrix: a quarter of the block's cells each
    const int  r       = lane/4;
    const int  part    = lane%4;
    const int  row     = row0 + 8*(sg/NS) + r;
    const bool is_row  = 8*(sg/NS) + r < n_rows;
    const int  i_row   = is_row ? row/n_group : i_first;
    const int  h_row   = is_row ? row%n_group + h_kv*n_group : 0;
    const float slope  = lminf_slope(args, h_row);

    mask += (uint64_t) group.z*args.mask.nb3;
    device const float * mask_row = (device const float *) (mask + (uint64_t) i_row*args.mask.nb1);

    float m = LMINF_NOTHING;
    float l = 0.0f; // this lane's cells

    simdgroup_float8x8 o[NO]; // [8][n_embd_v], or a share of it
    LMINF_UNROLL
    for (int j = 0; j < NO; ++j) {
        o[j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }

    d[2*lane + 0] = 0.0f;
    d[2*lane + 1] = 0.0f;

    int turn = 0;

    for (int is_window = args.n_sink > 0 ? 0 : 1; is_window < 2; ++is_window) {
        const int type_k  = is_window ? lminf_type_k : lminf_type_k_sink;
        const int type_v  = is_window ? lminf_type_v : lminf_type_v_sink;
        const int n_cells = is_window ? args.n_kv    : args.n_sink;
        const int column0 = is_window ? args.n_sink  : 0; // of the mask

        const uint64_t nb1_k = is_window ? args.k.nb1 : args.k_sink.nb1;
        const uint64_t nb1_v = is_window ? args.v.nb1 : args.v_sink.nb1;

        device const char * data_k = is_window ?
            k      + (uint64_t) h_kv*args.k.nb2      + (uint64_t) group.z*args.k.nb3 :
            k_sink + (uint64_t) h_kv*args.k_sink.nb2 + (uint64_t) group.z*args.k_sink.nb3;
        device const char * data_v = is_window ?
            v      + (uint64_t) h_kv*args.v.nb2      + (uint64_t) group.z*args.v.nb3 :
            v_sink + (uint64_t) h_kv*args.v_sink.nb2 + (uint64_t) group.z*args.v_sink.nb3;

        // nobody needs q_sink any more: the last block with scores of sinks had barriers for its values after that
        for (int e = thread_i; e < max_rows*n_k4; e += n_thread) {
            const int i = (row0 + e/n_k4)/n_group;
            const int h = (row0 + e/n_k4)%n_group + h_kv*n_group;
            device const char * row_q = is_window ?
                q      + (uint64_t) i*args.q.nb1      + (uint64_t) h*args.q.nb2      + (uint64_t) group.z*args.q.nb3 :
                q_sink + (uint64_t) i*args.q_sink.nb1 + (uint64_t) h*args.q_sink.nb2 + (uint64_t) group.z*args.q_sink.nb3;
            ((threadgroup float4 *) sh_q)[e] = e/n_k4 < n_rows ? ((device const float4 *) row_q)[e%n_k4] : float4(0.0f);
        }

        for (int cell = 0; cell < n_cells; cell += LMINF_ATTN_METAL_BLOCK) {
            // does any query see any of these cells? Two sets of flags in turn: one barrier is enough
            bool is_open = false;
            for (int e = thread_i; e < n_i*LMINF_ATTN_METAL_BLOCK; e += n_thread) {
                const int c = cell + e%LMINF_ATTN_METAL_BLOCK;
                const int i = i_first + e/LMINF_ATTN_METAL_BLOCK;
                is_open = is_open || (c < n_cells &&
                    ((device const float *) (mask + (uint64_t) i*args.mask.nb1))[column0 + c] > LMINF_NOTHING);
            }
            turn = 1 - turn;
            const uint open_sg = simd_or(is_open ? 1u : 0u);
            if (lane == 0) {
                sh_open[turn*n_sg + sg] = open_sg;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint open = 0;
            for (int u = 0; u < n_sg; ++u) {
                open |= sh_open[turn*n_sg + u];
            }
            if (open == 0) {
                continue;
            }

            // S = Q K^T, [8][32]
            simdgroup_float8x8 ms[NC];
            LMINF_UNROLL
            for (int c = 0; c < NC; ++c) {
                ms[c] = make_filled_simdgroup_matrix<float, 8>(0.0f);
            }
            for (int e0 = 0; e0 < lminf_n_embd_k; e0 += LMINF_ATTN_METAL_PIECE) {
                threadgroup_barrier(mem_flags::mem_threadgroup); // the piece before is done with
                lminf_load_piece((threadgroup float4 *) sh_kv, data_k, nb1_k, type_k, cell, n_cells, e0/4, n_k4, thread_i, n_thread);
                threadgroup_barrier(mem_flags::mem_threadgroup);

                const int n_x = min(LMINF_ATTN_METAL_PIECE, lminf_n_embd_k - e0)/8;
                for (int x = 0; x < n_x; ++x) {
                    simdgroup_float8x8 mq;
                    simdgroup_load(mq, q8 + e0 + 8*x, lminf_n_embd_k, 0, false);
                    LMINF_UNROLL
                    for (int c = 0; c < NC; ++c) {
                        simdgroup_float8x8 mk;
                        simdgroup_load(mk, sh_kv + 8*(share*NC + c)*LMINF_ATTN_METAL_PIECE + 8*x, LMINF_ATTN_METAL_PIECE, 0, true);
                        simdgroup_multiply_accumulate(ms[c], mq, mk, ms[c]);
                    }
                }
            }
            LMINF_UNROLL
            for (int c = 0; c < NC; ++c) {
                simdgroup_store(ms[c], s + 8*(share*NC + c), LMINF_ATTN_METAL_BLOCK, 0, false);
            }
            lminf_rows_barrier<NS>();

            // softmax: this lane has cells 8*part to 8*part + 7 of row r
            threadgroup float * s_row = s + r*LMINF_ATTN_METAL_BLOCK + 8*part;

            float score[8];
            float m_new = m;
            LMINF_UNROLL
            for (int x = 0; x < 8; ++x) {
                const int   c      = cell + 8*part + x;
                const float x_mask = is_row && c < n_cells ? mask_row[column0 + c] : LMINF_NOTHING;
                score[x] = x_mask > LMINF_NOTHING ? lminf_score(args, s_row[x], slope, x_mask) : LMINF_NOTHING;
                m_new    = max(m_new, score[x]);
            }
            m_new = max(m_new, simd_shuffle_xor(m_new, 1));
            m_new = max(m_new, simd_shuffle_xor(m_new, 2));

            if (NS > 1) {
                lminf_rows_barrier<NS>(); // all have read the scores
            }

            const float alpha = exp(m - m_new);
            l *= alpha;
            LMINF_UNROLL
            for (int x = 0; x < 8; ++x) {
                const float p = score[x] > LMINF_NOTHING ? exp(score[x] - m_new) : 0.0f;
                if (share == 0) {
                    s_row[x] = p;
                }
                l += p;
            }
            const bool is_rescaled = simd_or(m_new > m ? 1u : 0u) != 0;
            m = m_new;
            if (part == 0) {
                d[8*r + r] = alpha;
            }
            lminf_rows_barrier<NS>();

            // O = diag(alpha) O + P V
            if (is_rescaled) {
                simdgroup_float8x8 md;
                simdgroup_load(md, d, 8, 0, false);
                LMINF_UNROLL
                for (int j = 0; j < NO; ++j) {
                    if (lminf_v_element<NP>(share, j) < lminf_n_embd_v) {
                        simdgroup_multiply(o[j], md, o[j]);
                    }
                }
            }

            simdgroup_float8x8 mp[4];
            LMINF_UNROLL
            for (int c = 0; c < 4; ++c) {
                simdgroup_load(mp[c], s + 8*c, LMINF_ATTN_METAL_BLOCK, 0, false);
            }
            LMINF_UNROLL
            for (int piece = 0; piece < NO/NP; ++piece) {
                if (piece*LMINF_ATTN_METAL_PIECE < lminf_n_embd_v) {
                    threadgroup_barrier(mem_flags::mem_threadgroup); // the piece before is done with
                    lminf_load_piece((threadgroup float4 *) sh_kv, data_v, nb1_v, type_v, cell, n_cells,
                            piece*LMINF_ATTN_METAL_PIECE/4, n_v4, thread_i, n_thread);
                    threadgroup_barrier(mem_flags::mem_threadgroup);

                    LMINF_UNROLL
                    for (int j = 0; j < NP; ++j) {
                        const int e = 8*(share*NP + j); // in the piece
                        if (piece*LMINF_ATTN_METAL_PIECE + e < lminf_n_embd_v) {
                            LMINF_UNROLL
                            for (int c = 0; c < 4; ++c) {
                                simdgroup_float8x8 mv;
                                simdgroup_load(mv, sh_kv + 8*c*LMINF_ATTN_METAL_PIECE + e, LMINF_ATTN_METAL_PIECE, 0, false);
                                simdgroup_multiply_accumulate(o[NP*piece + j], mp[c], mv, o[NP*piece + j]);
                            }
                        }
                    }
                }
            }
        }
    }

    l += simd_shuffle_xor(l, 1);
    l += simd_shuffle_xor(l, 2);

    float factor = 1.0f;
    if (args.has_head_sinks) {
        const float sink  = head_sinks[h_row];
        const float m_new = max(m, sink);
        factor = exp(m - m_new);
        l      = l*factor + exp(sink - m_new);
    }
    factor = l > 0.0f ? factor/l : 0.0f;

    // four matrices at a time through threadgroup memory: a lane then has 8 elements of its row. Nobody needs weights any more:
    // behind every block's there were barriers for its values
    device float4 * dst_row = (device float4 *) (out + (((uint64_t) group.z*args.n_q + i_row)*args.n_head + h_row)*lminf_n_embd_v);
    LMINF_UNROLL
    for (int j = 0; j < NO; j += 4) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        LMINF_UNROLL
        for (int x = 0; x < 4; ++x) {
            if (lminf_v_element<NP>(share, j + x) < lminf_n_embd_v) {
                simdgroup_store(o[j + x], stage + 8*x, LMINF_ATTN_METAL_BLOCK, 0, false);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (is_row && lminf_v_element<NP>(share, j + part) < lminf_n_embd_v) {
            threadgroup const float4 * from = (threadgroup const float4 *) (stage + r*LMINF_ATTN_METAL_BLOCK + 8*part);
            const int e4 = lminf_v_element<NP>(share, j + part)/4;
            dst_row[e4 + 0] = factor*from[0];
            dst_row[e4 + 1] = factor*from[1];
        }
    }
}

kernel void kernel_lminf_attn_prefill_64  (LMINF_BUFFERS) { lminf_prefill< 8, 1>(LMINF_PASS); }
kernel void kernel_lminf_attn_prefill_128 (LMINF_BUFFERS) { lminf_prefill<16, 1>(LMINF_PASS); }
kernel void kernel_lminf_attn_prefill_256 (LMINF_BUFFERS) { lminf_prefill<32, 1>(LMINF_PASS); }
kernel void kernel_lminf_attn_prefill_wide(LMINF_BUFFERS) { lminf_prefill<16, 4>(LMINF_PASS); }

#endif // __METAL_VERSION__
