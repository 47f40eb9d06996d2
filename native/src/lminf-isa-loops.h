// the loops of lminf-isa.h, compiled once for each instruction set: lminf-isa.cpp includes this file into a namespace that has
//
//   F, I        16 floats; 16 integers, or 16 times 4 bytes
//   N_SUMS      sums that fit in registers beside their operands, and are enough to keep the multipliers busy
//   N_SKETCHES  blocks of sketches that fit
//   load, load_half, load_i8, set, set_half, store, store_half; load_low, load_high: 16 halves of bytes, minus 8
//   add, mul, fma (a*b + c), max (b where a is not a number)
//   scale_2     2^n for n + 1.5*2^23, n from -126 to 127
//   transpose   of a matrix of 16 rows
//   append_ge   writes first + i for each a[i] >= b[i]; returns how many; what it writes behind them, up to 16, does not count
//   load_bytes, set_int, to_float
//   twice<N>    of each byte twice the two bits from bit N on
//   dot4        c + the four products in each lane: bytes from 0 to 6 by signed ones
//
// Nothing of the standard library in here: it would be compiled for this instruction set, and the linker might take that
// for everybody.

// --- sketches -----------------------------------------------------------------------------------------------------------

// N blocks and Q queries at once: a sum takes several cycles, and the next one of the same does not wait for it
template <int N, int Q>
static inline void sketch_max_queries(const I (&x)[N][8], const F * scale, const lminf_sketch_query * q, F * top) {
    I sum[N][Q];
    for (int b = 0; b < N; ++b) {
        for (int i = 0; i < Q; ++i) {
            sum[b][i] = set_int(q[i].start);
        }
    }
    for (int j = 0; j < 8; ++j) {
        for (int i = 0; i < Q; ++i) {
            for (int b = 0; b < N; ++b) {
                sum[b][i] = dot4(x[b][j], set_int(q[i].x[j]), sum[b][i]);
            }
        }
    }
    for (int i = 0; i < Q; ++i) {
        for (int b = 0; b < N; ++b) {
            top[b] = max(fma(to_float(sum[b][i]), scale[b], set(q[i].offset)), top[b]);
        }
    }
}

// a block at the same place in each of N parts
//   best [N][n]
template <int N>
static inline void sketch_max_blocks(const char * const * parts, size_t offset, const lminf_sketch_query * q, int64_t n_q, float q_scale, float * best, int64_t n) {
    I x[N][8];
    F scale[N];
    F top[N];
    for (int b = 0; b < N; ++b) {
        const char * block = parts[b] + offset;

        // processors fetch ahead by themselves, but not far enough. Behind the end of a part this does nothing
        prefetch(block + 2048, LMINF_SKETCH_SIZE);

        for (int j = 0; j < 2; ++j) {
            const I bytes = load_bytes(block + 64*j);
            x[b][4*j    ] = twice<0>(bytes);
            x[b][4*j + 1] = twice<2>(bytes);
            x[b][4*j + 2] = twice<4>(bytes);
            x[b][4*j + 3] = twice<6>(bytes);
        }
        scale[b] = mul(load_half((const uint16_t *) (block + 128)), set(q_scale));
        top[b]   = load(best + b*n);
    }
    int64_t i = 0;
    for (; i + N_QUERIES <= n_q; i += N_QUERIES) {
        sketch_max_queries<N, N_QUERIES>(x, scale, q + i, top);
    }
    for (; i < n_q; ++i) {
        sketch_max_queries<N, 1>(x, scale, q + i, top);
    }
    for (int b = 0; b < N; ++b) {
        store(best + b*n, top[b]);
    }
}

static void sketch_max(const char * const * parts, int64_t n_parts, int64_t n_blocks, const lminf_sketch_query * q, int64_t n_q, float scale, float * best) {
    const int64_t n = 16*n_blocks;
    for (int64_t ib = 0; ib < n_blocks; ++ib) {
        int64_t p = 0;
        for (; p + N_SKETCHES <= n_parts; p += N_SKETCHES) {
            sketch_max_blocks<N_SKETCHES>(parts + p, ib*LMINF_SKETCH_SIZE, q, n_q, scale, best + p*n + 16*ib, n);
        }
        for (; p < n_parts; ++p) {
            sketch_max_blocks<1>(parts + p, ib*LMINF_SKETCH_SIZE, q, n_q, scale, best + p*n + 16*ib, n);
        }
    }
}

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
    F sum[16];
    for (int r = 0; r < 16; ++r) {
        sum[r] = set(0.0f);
        for (int64_t e = 0; e + 16 <= n; e += 16) {
            sum[r] = fma(load(rows + r*n + e), load(x + e), sum[r]);
        }
    }
    transpose(sum);
    for (int r = 1; r < 16; ++r) {
        sum[0] = add(sum[0], sum[r]);
    }
    store(res, sum[0]);
    for (int r = 0; r < 16; ++r) {
        for (int64_t e = n/16*16; e < n; ++e) {
            res[r] += rows[r*n + e]*x[e];
        }
    }
}

// --- rows ---------------------------------------------------------------------------------------------------------------

// elements e to e + 15. Quantized ones come in blocks of 32, each behind its f16 scale
template <ggml_type TYPE>
static inline F load_row(const char * row, int64_t e) {
    if (TYPE == GGML_TYPE_F32) {
        return load((const float *) row + e);
    }
    if (TYPE == GGML_TYPE_F16) {
        return load_half((const uint16_t *) row + e);
    }
    const char * block = row + e/32*(TYPE == GGML_TYPE_Q8_0 ? 34 : 18);
    const char * data  = block + 2;

    const F x = TYPE == GGML_TYPE_Q8_0 ? load_i8(data + e % 32) : e % 32 == 0 ? load_low(data) : load_high(data);

    return mul(x, set_half(*(const uint16_t *) block));
}

// one of those that no 16 are left of, as only F32 and F16 have them
template <ggml_type TYPE>
static inline float load_element(const char * row, int64_t e) {
    return TYPE == GGML_TYPE_F32 ? ((const float *) row)[e] : ggml_fp16_to_fp32(((const uint16_t *) row)[e]);
}

template <ggml_type TYPE>
static void to_floats(const char * src, int64_t n, float * dst) {
    int64_t e = 0;
    for (; e + 16 <= n; e += 16) {
        store(dst + e, load_row<TYPE>(src, e));
    }
    for (; e < n; ++e) {
        dst[e] = load_element<TYPE>(src, e);
    }
}

static void to_floats(ggml_type type, const char * src, int64_t n, float * dst) {
    switch (type) {
        case GGML_TYPE_F32:  return to_floats<GGML_TYPE_F32> (src, n, dst);
        case GGML_TYPE_F16:  return to_floats<GGML_TYPE_F16> (src, n, dst);
        case GGML_TYPE_Q8_0: return to_floats<GGML_TYPE_Q8_0>(src, n, dst);
        default:             return to_floats<GGML_TYPE_Q4_0>(src, n, dst);
    }
}

static void to_halves(const float * src, int64_t n, uint16_t * dst) {
    int64_t e = 0;
    for (; e + 16 <= n; e += 16) {
        store_half(dst + e, load(src + e));
    }
    for (; e < n; ++e) {
        dst[e] = ggml_fp32_to_fp16(src[e]);
    }
}

// of N queries with 16 rows, which lie in k [n_embd][16]; the first n_rows count
template <int N>
static inline void dot_16(int64_t n_embd, const float * k, const float * q, int64_t n_rows, float * scores, int64_t n_scores) {
    // few queries: two sums for each, as a sum has to wait for the one before
    constexpr int N_SETS = 2*N <= N_SUMS ? 2 : 1;

    F sum[N_SETS][N];
    for (int i = 0; i < N_SETS*N; ++i) {
        sum[i/N][i % N] = set(0.0f);
    }
    int64_t e = 0;
    for (; e + N_SETS <= n_embd; e += N_SETS) {
        for (int s = 0; s < N_SETS; ++s) {
            const F x = load(k + 16*(e + s));
            for (int i = 0; i < N; ++i) {
                sum[s][i] = fma(x, set(q[i*n_embd + e + s]), sum[s][i]);
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        F res = sum[0][i];
        if (e < n_embd) {
            res = fma(load(k + 16*e), set(q[i*n_embd + e]), res);
        }
        if (N_SETS == 2) {
            res = add(res, sum[N_SETS - 1][i]);
        }
        if (n_rows == 16) {
            store(scores + i*n_scores, res);
            continue;
        }
        float all[16];
        store(all, res);
        for (int64_t r = 0; r < n_rows; ++r) {
            scores[i*n_scores + r] = all[r];
        }
    }
}

template <ggml_type TYPE>
static void rows_dot(int64_t n_embd, const char * const * rows, size_t offset, int64_t n_rows, const float * q, int64_t n_q,
        float * k, float * scores) {
    const size_t size = TYPE == GGML_TYPE_F32 ? n_embd*4 : TYPE == GGML_TYPE_F16 ? n_embd*2 : n_embd/32*(TYPE == GGML_TYPE_Q8_0 ? 34 : 18);

    for (int64_t r0 = 0; r0 < n_rows; r0 += 16) {
        const int64_t n = n_rows - r0 < 16 ? n_rows - r0 : 16;

        const char * row[16];
        for (int64_t r = 0; r < 16; ++r) {
            row[r] = rows[r0 + (r < n ? r : 0)] + offset;
            if (r0 + 16 + r < n_rows) {
                prefetch(rows[r0 + 16 + r] + offset, size);
            }
        }
        // rows as lanes: sums stay within lanes, however many queries there are
        int64_t e = 0;
        for (; e + 16 <= n_embd; e += 16) {
            F x[16];
            for (int r = 0; r < 16; ++r) {
                x[r] = load_row<TYPE>(row[r], e);
            }
            transpose(x);
            for (int i = 0; i < 16; ++i) {
                store(k + 16*(e + i), x[i]);
            }
        }
        for (; e < n_embd; ++e) {
            for (int r = 0; r < 16; ++r) {
                k[16*e + r] = load_element<TYPE>(row[r], e);
            }
        }
        for (int64_t i = 0; i < n_q; ) {
            if (i + N_SUMS <= n_q) {
                dot_16<N_SUMS>(n_embd, k, q + i*n_embd, n, scores + i*n_rows + r0, n_rows);
                i += N_SUMS;
            } else if (i + N_SUMS/2 <= n_q) {
                dot_16<N_SUMS/2>(n_embd, k, q + i*n_embd, n, scores + i*n_rows + r0, n_rows);
                i += N_SUMS/2;
            } else {
                dot_16<1>(n_embd, k, q + i*n_embd, n, scores + i*n_rows + r0, n_rows);
                i += 1;
            }
        }
    }
}

static void rows_dot(ggml_type type, int64_t n_embd, const char * const * rows, size_t offset, int64_t n_rows, const float * q,
        int64_t n_q, float * k, float * scores) {
    switch (type) {
        case GGML_TYPE_F32:  return rows_dot<GGML_TYPE_F32> (n_embd, rows, offset, n_rows, q, n_q, k, scores);
        case GGML_TYPE_F16:  return rows_dot<GGML_TYPE_F16> (n_embd, rows, offset, n_rows, q, n_q, k, scores);
        case GGML_TYPE_Q8_0: return rows_dot<GGML_TYPE_Q8_0>(n_embd, rows, offset, n_rows, q, n_q, k, scores);
        default:             return rows_dot<GGML_TYPE_Q4_0>(n_embd, rows, offset, n_rows, q, n_q, k, scores);
    }
}

// --- votes --------------------------------------------------------------------------------------------------------------

// 2^n * e^r, r within +-ln(2)/2: the series to r^6 is exact to 2e-7. Below -87, and what is not a number: e^-87
static inline F exp_below_0(F x) {
    const F t = max(x, set(-87.0f));
    const F m = fma(t, set(1.44269504f), set(12582912.0f)); // 1.5*2^23: from there on floats are whole numbers
    const F n = add(m, set(-12582912.0f));
    const F r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), t));

    F p = set(1.38888889e-3f);
    p = fma(p, r, set(8.33333333e-3f));
    p = fma(p, r, set(4.16666667e-2f));
    p = fma(p, r, set(1.66666667e-1f));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));

    return mul(p, scale_2(m));
}

static float exp(float * x, int64_t n, float & max_x) {
    const int64_t n_last = n % 16;

    float last[16], lanes[16];
    for (int64_t i = 0; i < 16; ++i) {
        last[i] = i < n_last ? x[n - n_last + i] : -INFINITY;
    }
    F top = max(load(last), set(-INFINITY));
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        top = max(load(x + i), top);
    }
    store(lanes, top);
    max_x = lanes[0];
    for (int i = 1; i < 16; ++i) {
        max_x = lanes[i] > max_x ? lanes[i] : max_x;
    }

    const F minus = set(max_x == -INFINITY ? 0.0f : -max_x);

    F sum = set(0.0f);
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        const F y = exp_below_0(add(load(x + i), minus));
        store(x + i, y);
        sum = add(sum, y);
    }
    store(last, exp_below_0(add(load(last), minus)));
    store(lanes, sum);

    float res = 0.0f;
    for (int64_t i = 0; i < n_last; ++i) {
        res += x[n - n_last + i] = last[i];
    }
    for (int i = 0; i < 16; ++i) {
        res += lanes[i];
    }
    return res;
}

static void add_scaled(float * y, float a, const float * x, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        store(y + i, fma(set(a), load(x + i), load(y + i)));
    }
    for (; i < n; ++i) {
        y[i] += a*x[i];
    }
}

static const lminf_isa isa = { NAME, sketch_max, find, project, to_floats, to_halves, rows_dot, exp, add_scaled };
