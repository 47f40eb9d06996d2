// the scans of lminf-lanes.h, compiled once for each instruction set: lminf-lanes-kernels.cpp includes this file into a
// namespace that has
//
//   F, I        16 floats; 16 integers, or 16 times 4 bytes
//   N_SUMS      sums that fit in registers beside their operands
//   load, load_half, store, set, mul, fma (a*b + c), max (b where a is not a number)
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

// of N queries with one block of keys; what was summed before is in `scores` unless is_first
template <int N>
static inline void dot_floats(int64_t n, const float * k, const float * q, int64_t n_embd, float * scores, int64_t n_scores, bool is_first) {
    F sum[N];
    for (int i = 0; i < N; ++i) {
        sum[i] = is_first ? set(0.0f) : load(scores + i*n_scores);
    }
    for (int64_t e = 0; e < n; ++e) {
        const F x = load(k + 16*e);
        for (int i = 0; i < N; ++i) {
            sum[i] = fma(x, set(q[i*n_embd + e]), sum[i]);
        }
    }
    for (int i = 0; i < N; ++i) {
        store(scores + i*n_scores, sum[i]);
    }
}

template <int N, int J>
static inline void add_products(I x, const float * q, int64_t n_embd, F * sum) {
    const F k = expand<J>(x);
    for (int i = 0; i < N; ++i) {
        sum[i] = fma(k, set(q[i*n_embd + J]), sum[i]);
    }
}

template <ggml_type TYPE, int N>
static inline void dot_block(const char * block, const float * q, int64_t n_embd, float * scores, int64_t n_scores) {
    F sum[N];
    for (int i = 0; i < N; ++i) {
        sum[i] = set(0.0f);
    }
    if (TYPE == GGML_TYPE_F32 || TYPE == GGML_TYPE_F16) {
        for (int64_t e = 0; e < n_embd; ++e) {
            const F x = element<TYPE>(block, e);
            for (int i = 0; i < N; ++i) {
                sum[i] = fma(x, set(q[i*n_embd + e]), sum[i]);
            }
        }
    } else {
        const char * data = block + n_embd;
        for (int64_t e0 = 0; e0 < n_embd; e0 += 32) {
            F part[N];
            for (int i = 0; i < N; ++i) {
                part[i] = set(0.0f);
            }
            for (int64_t e = e0; e < e0 + 32; e += 4) {
                const I x = four_elements<TYPE>(data, e);
                add_products<N, 0>(x, q + e, n_embd, part);
                add_products<N, 1>(x, q + e, n_embd, part);
                add_products<N, 2>(x, q + e, n_embd, part);
                add_products<N, 3>(x, q + e, n_embd, part);
            }
            const F scale = scale_of(block, e0);
            for (int i = 0; i < N; ++i) {
                sum[i] = fma(part[i], scale, sum[i]);
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

            int64_t i = 0;
            for (; i + N_SUMS <= n_q; i += N_SUMS) {
                dot_floats<N_SUMS>(n, k, q + i*n_embd + e, n_embd, res + i*n_scores, n_scores, e == 0);
            }
            for (; i < n_q; ++i) {
                dot_floats<1>(n, k, q + i*n_embd + e, n_embd, res + i*n_scores, n_scores, e == 0);
            }
        }
    }
}

// --- sketches -----------------------------------------------------------------------------------------------------------

static void sketch_max(const char * blocks, int64_t n_blocks, const lminf_sketch_query * q, int64_t n_q, float * best) {
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        const char * block = blocks + ib*LMINF_SKETCH_SIZE;

        const I x01 = load_bytes(block);
        const I x23 = load_bytes(block + 64);
        const I x0  = low(x01);
        const I x1  = high(x01);
        const I x2  = low(x23);
        const I x3  = high(x23);
        const F d   = load_half((const uint16_t *) (block + 128));

        F top = load(best + 16*ib);
        for (int64_t i = 0; i < n_q; ++i) {
            I sum = set_int(q[i].start);
            sum = dot4(x0, set_int(q[i].x[0]), sum);
            sum = dot4(x1, set_int(q[i].x[1]), sum);
            sum = dot4(x2, set_int(q[i].x[2]), sum);
            sum = dot4(x3, set_int(q[i].x[3]), sum);
            top = max(fma(mul(to_float(sum), set(q[i].scale)), d, set(q[i].offset)), top);
        }
        store(best + 16*ib, top);
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
