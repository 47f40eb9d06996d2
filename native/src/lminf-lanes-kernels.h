// the scans of lminf-lanes.h, compiled once for each instruction set: lminf-lanes-kernels.cpp includes this file into a
// namespace that has
//
//   F, I        16 floats; 16 integers, or 16 times 4 bytes
//   N_SUMS      sums that fit in registers beside their operands, and are enough to keep the multipliers busy
//   N_SKETCHES  blocks of sketches that fit
//   load, load_half, store, set, add, mul, fma (a*b + c), max (b where a is not a number)
//   append_ge   writes first + i for each a[i] >= b[i]; returns how many; what it writes behind them, up to 16, does not count
//   load_bytes, set_int, to_float
//   low, high   the lower and the upper half of each byte
//   minus_8     of each byte
//   expand<j>   byte j of each lane, signed, times 2^24
//   dot4        c + the four products in each lane: bytes from 0 to 15 by signed ones
//
// Nothing of the standard library in here: it would be compiled for this instruction set, and the linker might take that
// for everybody.

// --- keys ---------------------------------------------------------------------------------------------------------------

template <ggml_type TYPE>
static inline F element(const char * block, int64_t e) {
    return TYPE == GGML_TYPE_F32 ? load((const float *) block + 16*e) : load_half((const uint16_t *) block + 16*e);
}

// four elements as signed bytes; their scales are times 2^24, for expand
template <ggml_type TYPE>
static inline I four_elements(const char * data, int64_t e) {
    if (TYPE == GGML_TYPE_Q8_0) {
        return load_bytes(data + 16*e);
    }
    const I x = load_bytes(data + e/8*64);
    return minus_8(e % 8 == 0 ? low(x) : high(x));
}

static inline F scale_of(const char * block, int64_t e) {
    return mul(load_half((const uint16_t *) block + e/32*16), set(1.0f/(1 << 24)));
}

// sum[i] += k*q[i], for N queries
template <int N>
static inline void add_products(F k, const float * q, int64_t n_embd, F * sum) {
    for (int i = 0; i < N; ++i) {
        sum[i] = fma(k, set(q[i*n_embd]), sum[i]);
    }
}

// of N queries with n elements of one block; what was summed before is in `scores` unless is_first
template <int N>
static inline void dot_floats(int64_t n, const float * k, const float * q, int64_t n_embd, float * scores, int64_t n_scores, bool is_first) {
    F sum[N];
    for (int i = 0; i < N; ++i) {
        sum[i] = is_first ? set(0.0f) : load(scores + i*n_scores);
    }
    for (int64_t e = 0; e < n; ++e) {
        add_products<N>(load(k + 16*e), q + e, n_embd, sum);
    }
    for (int i = 0; i < N; ++i) {
        store(scores + i*n_scores, sum[i]);
    }
}

// of N queries with one block of keys
template <ggml_type TYPE, int N>
static inline void dot_block(const char * block, const float * q, int64_t n_embd, float * scores, int64_t n_scores) {
    // few queries: several sums for each, as a sum has to wait for the one before
    constexpr int N_SETS = N_SUMS/N >= 4 ? 4 : N_SUMS/N >= 2 ? 2 : 1;

    F sum[N];
    F part[N_SETS][N];
    const auto clear = [&] {
        for (int s = 0; s < N_SETS; ++s) {
            for (int i = 0; i < N; ++i) {
                part[s][i] = set(0.0f);
            }
        }
    };
    const auto collect = [&](int i) {
        F res = part[0][i];
        for (int s = 1; s < N_SETS; ++s) {
            res = add(res, part[s][i]);
        }
        return res;
    };

    if (TYPE == GGML_TYPE_F32 || TYPE == GGML_TYPE_F16) {
        clear();
        int64_t e = 0;
        for (; e + 4 <= n_embd; e += 4) {
            add_products<N>(element<TYPE>(block, e + 0), q + e + 0, n_embd, part[0]);
            add_products<N>(element<TYPE>(block, e + 1), q + e + 1, n_embd, part[1 % N_SETS]);
            add_products<N>(element<TYPE>(block, e + 2), q + e + 2, n_embd, part[2 % N_SETS]);
            add_products<N>(element<TYPE>(block, e + 3), q + e + 3, n_embd, part[3 % N_SETS]);
        }
        for (; e < n_embd; ++e) {
            add_products<N>(element<TYPE>(block, e), q + e, n_embd, part[0]);
        }
        for (int i = 0; i < N; ++i) {
            sum[i] = collect(i);
        }
    } else {
        for (int i = 0; i < N; ++i) {
            sum[i] = set(0.0f);
        }
        for (int64_t e0 = 0; e0 < n_embd; e0 += 32) {
            clear();
            for (int64_t e = e0; e < e0 + 32; e += 4) {
                const I x = four_elements<TYPE>(block + n_embd, e);
                add_products<N>(expand<0>(x), q + e + 0, n_embd, part[0]);
                add_products<N>(expand<1>(x), q + e + 1, n_embd, part[1 % N_SETS]);
                add_products<N>(expand<2>(x), q + e + 2, n_embd, part[2 % N_SETS]);
                add_products<N>(expand<3>(x), q + e + 3, n_embd, part[3 % N_SETS]);
            }
            const F scale = scale_of(block, e0);
            for (int i = 0; i < N; ++i) {
                sum[i] = fma(collect(i), scale, sum[i]);
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        store(scores + i*n_scores, sum[i]);
    }
}

// n elements, a multiple of 4 where they are quantized, as floats
template <ggml_type TYPE>
static inline void to_floats(const char * block, int64_t n_embd, int64_t first, int64_t n, float * k) {
    if (TYPE == GGML_TYPE_F32 || TYPE == GGML_TYPE_F16) {
        for (int64_t e = 0; e < n; ++e) {
            store(k + 16*e, element<TYPE>(block, first + e));
        }
        return;
    }
    for (int64_t e = 0; e < n; e += 4) {
        const I x     = four_elements<TYPE>(block + n_embd, first + e);
        const F scale = scale_of(block, first + e);
        store(k + 16*(e + 0), mul(expand<0>(x), scale));
        store(k + 16*(e + 1), mul(expand<1>(x), scale));
        store(k + 16*(e + 2), mul(expand<2>(x), scale));
        store(k + 16*(e + 3), mul(expand<3>(x), scale));
    }
}

template <ggml_type TYPE>
static void dot(int64_t n_embd, size_t size, const char * blocks, int64_t n_blocks, const float * q, int64_t n_q, float * scores) {
    const int64_t n_scores = 16*n_blocks;

    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        const char * block = blocks + ib*size;
        float      * res   = scores + 16*ib;
        prefetch(block, size);

        switch (n_q) {
            case 1: dot_block<TYPE, 1>(block, q, n_embd, res, n_scores); continue;
            case 2: dot_block<TYPE, 2>(block, q, n_embd, res, n_scores); continue;
            case 3: dot_block<TYPE, 3>(block, q, n_embd, res, n_scores); continue;
            case 4: dot_block<TYPE, 4>(block, q, n_embd, res, n_scores); continue;
            default: break;
        }
        // many queries: each key is converted once
        constexpr int64_t n_part = 64;
        float k[16*n_part];
        for (int64_t e = 0; e < n_embd; e += n_part) {
            const int64_t n = n_embd - e < n_part ? n_embd - e : n_part;
            to_floats<TYPE>(block, n_embd, e, n, k);

            for (int64_t i = 0; i < n_q; ) {
                const float * qi = q + i*n_embd + e;
                float       * ri = res + i*n_scores;
                if (i + N_SUMS <= n_q) {
                    dot_floats<N_SUMS>(n, k, qi, n_embd, ri, n_scores, e == 0);
                    i += N_SUMS;
                } else if (i + 2 <= n_q) {
                    dot_floats<2>(n, k, qi, n_embd, ri, n_scores, e == 0);
                    i += 2;
                } else {
                    dot_floats<1>(n, k, qi, n_embd, ri, n_scores, e == 0);
                    i += 1;
                }
            }
        }
    }
}

// --- sketches -----------------------------------------------------------------------------------------------------------

template <int N>
static inline void sketch_max_blocks(const char * blocks, const lminf_sketch_query * q, int64_t n_q, float * best) {
    I x[N][4];
    F scale[N];
    F top[N];
    for (int b = 0; b < N; ++b) {
        const char * block = blocks + b*LMINF_SKETCH_SIZE;

        x[b][0]  = low (load_bytes(block));
        x[b][1]  = high(load_bytes(block));
        x[b][2]  = low (load_bytes(block + 64));
        x[b][3]  = high(load_bytes(block + 64));
        scale[b] = load_half((const uint16_t *) (block + 128));
        top[b]   = load(best + 16*b);
    }
    for (int64_t i = 0; i < n_q; ++i) {
        for (int b = 0; b < N; ++b) {
            I sum = set_int(q[i].start);
            for (int j = 0; j < 4; ++j) {
                sum = dot4(x[b][j], set_int(q[i].x[j]), sum);
            }
            top[b] = max(fma(mul(to_float(sum), set(q[i].scale)), scale[b], set(q[i].offset)), top[b]);
        }
    }
    for (int b = 0; b < N; ++b) {
        store(best + 16*b, top[b]);
    }
}

static void sketch_max(const char * blocks, int64_t n_blocks, const lminf_sketch_query * q, int64_t n_q, float * best) {
    int64_t ib = 0;
    for (; ib + N_SKETCHES <= n_blocks; ib += N_SKETCHES) {
        prefetch(blocks + ib*LMINF_SKETCH_SIZE, N_SKETCHES*LMINF_SKETCH_SIZE);
        sketch_max_blocks<N_SKETCHES>(blocks + ib*LMINF_SKETCH_SIZE, q, n_q, best + 16*ib);
    }
    for (; ib < n_blocks; ++ib) {
        sketch_max_blocks<1>(blocks + ib*LMINF_SKETCH_SIZE, q, n_q, best + 16*ib);
    }
}

// --- rows ---------------------------------------------------------------------------------------------------------------

// the indices of scores that are not below the threshold; n is a multiple of 16, and there is room for 16 more than are found
static int64_t find(const float * scores, int64_t n, float threshold, int32_t * found) {
    const F t = set(threshold);

    int64_t n_found = 0;
    for (int64_t i = 0; i < n; i += 16) {
        n_found += append_ge(load(scores + i), t, (int32_t) i, found + n_found);
    }
    return n_found;
}

// res [16] = rows [16][n]·x
static void project(int64_t n, const float * rows, const float * x, float * res) {
    for (int r = 0; r < 16; r += 4) {
        F sum[4] = { set(0.0f), set(0.0f), set(0.0f), set(0.0f) };
        int64_t e = 0;
        for (; e + 16 <= n; e += 16) {
            for (int i = 0; i < 4; ++i) {
                sum[i] = fma(load(rows + (r + i)*n + e), load(x + e), sum[i]);
            }
        }
        for (int i = 0; i < 4; ++i) {
            float s[16];
            store(s, sum[i]);
            for (int w = 8; w > 0; w /= 2) {
                for (int j = 0; j < w; ++j) {
                    s[j] += s[j + w];
                }
            }
            for (int64_t j = e; j < n; ++j) {
                s[0] += rows[(r + i)*n + j]*x[j];
            }
            res[r + i] = s[0];
        }
    }
}

static const lminf_lanes_kernels kernels = {
    dot<GGML_TYPE_F32>, dot<GGML_TYPE_F16>, dot<GGML_TYPE_Q8_0>, dot<GGML_TYPE_Q4_0>, sketch_max, find, project,
};
