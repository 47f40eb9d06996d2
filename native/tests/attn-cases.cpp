#include "attn-cases.h"

#include "lminf-attn.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <stdexcept>

static const float INF = std::numeric_limits<float>::infinity();

std::string attn_case::str() const {
    static const char * masks[] = { "window", "filling", "random", "sinks", "nothing", "one", "open" };

    char buf[512];
    snprintf(buf, sizeof(buf), "head %d/%d, heads %d/%d, n_q %d, n_stream %d, n_sink %d, n_kv %d, K %s, V %s, sinks %s %s, "
            "mask %s, max_bias %g, softcap %g, sharpness %g%s%s", n_embd_head_k, n_embd_head_v, n_head, n_head_kv, n_q, n_stream, n_sink, n_kv,
            ggml_type_name(type_k), ggml_type_name(type_v), ggml_type_name(type_k_sink), ggml_type_name(type_v_sink),
            masks[mask], max_bias, logit_softcap, sharpness, head_sinks ? ", head sinks" : "", v_in_k ? ", V in K" : "");
    return buf;
}

//
// random data
//

static std::vector<float> random_floats(std::mt19937 & rng, size_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);

    std::vector<float> res(n);
    for (auto & x : res) {
        x = normal(rng);
    }
    return res;
}

static void fill(ggml_tensor * t, const std::vector<float> & data) {
    GGML_ASSERT((int64_t) data.size() == ggml_nelements(t) && ggml_is_contiguous(t));
    ggml_quantize_chunk(t->type, data.data(), t->data, 0, ggml_nrows(t), t->ne[0], nullptr);
}

// [n_embd_head, n, n_head, n_stream] as llama.cpp lays it out: all heads of a cell or token side by side, and more
// cells in the buffer than are looked at
static ggml_tensor * random_rows(
        ggml_context * ctx, std::mt19937 & rng, ggml_type type, int64_t n_embd_head, int64_t n, int64_t n_head, int64_t n_stream, float scale, int64_t n_unused) {
    ggml_tensor * all = ggml_new_tensor_4d(ctx, type, n_embd_head, n_head, n + n_unused, n_stream);
    fill(all, random_floats(rng, ggml_nelements(all), scale));

    ggml_tensor * res = ggml_view_4d(ctx, all, n_embd_head, n_head, n, n_stream, all->nb[1], all->nb[2], all->nb[3], 0);
    return ggml_permute(ctx, res, 0, 2, 1, 3);
}

static ggml_tensor * first_elements(ggml_context * ctx, ggml_tensor * rows, int64_t n) {
    return ggml_view_4d(ctx, rows, n, rows->ne[1], rows->ne[2], rows->ne[3], rows->nb[1], rows->nb[2], rows->nb[3], 0);
}

static void fill_mask(const attn_case & c, std::mt19937 & rng, ggml_tensor * mask) {
    const bool alibi = c.max_bias > 0.0f;

    const auto below = [&](int32_t n) { return (int32_t) (rng() % std::max(n, 1)); };

    for (int32_t s = 0; s < c.n_stream; ++s) {
        const int32_t n_local = std::max(1, c.n_kv - c.n_q - below(c.n_kv/4 + 1)); // some cells have left the window
        const int32_t newest  = below(c.n_kv);                                     // the cell of the last query

        for (int32_t i = 0; i < c.n_q; ++i) {
            float * row = (float *) ((char *) mask->data + s*mask->nb[3] + i*mask->nb[1]);

            const auto open = [&](int32_t j, int32_t distance) {
                row[j] = alibi ? -(float) distance : 0.0f;
            };

            std::fill(row, row + c.n_sink + c.n_kv, -INF);

            const int32_t n_behind = c.n_q - 1 - i; // queries after this one

            switch (c.mask) {
                case ATTN_MASK_WINDOW:
                    for (int32_t j = 0; j < c.n_sink; ++j) {
                        open(j, n_local);
                    }
                    for (int32_t cell = 0; cell < c.n_kv; ++cell) {
                        const int32_t distance = ((newest - cell) % c.n_kv + c.n_kv) % c.n_kv - n_behind;
                        if (distance >= 0 && distance < n_local) {
                            open(c.n_sink + cell, distance);
                        }
                    }
                    break;
                case ATTN_MASK_FILLING:
                    for (int32_t cell = 0; cell <= newest - n_behind; ++cell) {
                        open(c.n_sink + cell, newest - n_behind - cell);
                    }
                    break;
                case ATTN_MASK_RANDOM:
                case ATTN_MASK_NOTHING:
                    for (int32_t j = 0; j < c.n_sink + c.n_kv; ++j) {
                        if (rng() % 2 && !(c.mask == ATTN_MASK_NOTHING && i % 3 != 1)) {
                            open(j, below(c.n_kv));
                        }
                    }
                    break;
                case ATTN_MASK_SINKS:
                    for (int32_t j = 0; j < c.n_sink; ++j) {
                        open(j, below(c.n_kv));
                    }
                    break;
                case ATTN_MASK_ONE:
                    open(below(c.n_sink + c.n_kv), below(c.n_kv));
                    break;
                case ATTN_MASK_OPEN:
                case ATTN_MASK_COUNT:
                    for (int32_t j = 0; j < c.n_sink + c.n_kv; ++j) {
                        open(j, below(c.n_kv));
                    }
                    break;
            }
        }
    }
}

attn_problem::attn_problem(const attn_case & c, std::mt19937 & rng) : c(c) {
    const size_t n_embd_k = (size_t) c.n_embd_head_k*c.n_stream;
    const size_t n_embd_v = (size_t) c.n_embd_head_v*c.n_stream;
    const size_t n_rows   = c.n_sink + c.n_kv + 64;
    const size_t size     = sizeof(float)*(
            n_rows*c.n_head_kv*(n_embd_k + n_embd_v) + (size_t) (c.n_q + 8)*c.n_head*(2*n_embd_k + n_embd_v) +
            n_rows*c.n_q*c.n_stream) + 64*ggml_tensor_overhead() + (1 << 16);

    ctx = ggml_init({ size, nullptr, false });

    const float q_scale = c.sharpness;

    ggml_tensor * q = random_rows(ctx, rng, GGML_TYPE_F32, c.n_embd_head_k, c.n_q,  c.n_head,    c.n_stream, q_scale, 0);
    ggml_tensor * k = random_rows(ctx, rng, c.type_k,      c.n_embd_head_k, c.n_kv, c.n_head_kv, c.n_stream, 1.0f,    rng() % 32);
    ggml_tensor * v = c.v_in_k ? first_elements(ctx, k, c.n_embd_head_v) :
                      random_rows(ctx, rng, c.type_v,      c.n_embd_head_v, c.n_kv, c.n_head_kv, c.n_stream, 1.0f,    rng() % 32);

    ggml_tensor * q_sink = nullptr;
    ggml_tensor * k_sink = nullptr;
    ggml_tensor * v_sink = nullptr;
    if (c.n_sink > 0) {
        q_sink = random_rows(ctx, rng, GGML_TYPE_F32, c.n_embd_head_k, c.n_q,    c.n_head,    c.n_stream, q_scale, 0);
        k_sink = random_rows(ctx, rng, c.type_k_sink, c.n_embd_head_k, c.n_sink, c.n_head_kv, c.n_stream, 1.0f,    1);
        v_sink = c.v_in_k ? first_elements(ctx, k_sink, c.n_embd_head_v) :
                 random_rows(ctx, rng, c.type_v_sink, c.n_embd_head_v, c.n_sink, c.n_head_kv, c.n_stream, 1.0f,    1);
    }

    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.n_sink + c.n_kv, c.n_q, 1, c.n_stream);
    fill_mask(c, rng, mask);

    ggml_tensor * head_sinks = nullptr;
    if (c.head_sinks) {
        head_sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head);
        fill(head_sinks, random_floats(rng, c.n_head, 2.0f));
    }

    res = ggml_lminf_attn(ctx, q, k, v, mask, head_sinks, q_sink, k_sink, v_sink,
            1.0f/sqrtf((float) c.n_embd_head_k), c.max_bias, c.logit_softcap);
    std::fill_n((float *) res->data, ggml_nelements(res), NAN);
}

attn_problem::~attn_problem() {
    ggml_free(ctx);
}

//
// float64
//

static std::vector<float> row_to_float(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    const char * data = (const char *) t->data + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];

    std::vector<float> res(t->ne[0]);
    if (t->type == GGML_TYPE_F32) {
        std::copy_n((const float *) data, res.size(), res.begin());
    } else {
        ggml_get_type_traits(t->type)->to_float(data, res.data(), t->ne[0]);
    }
    return res;
}

static double dot(const std::vector<float> & a, const std::vector<float> & b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        sum += (double) a[i]*b[i];
    }
    return sum;
}

std::vector<double> attn_problem::reference() const {
    const auto & src = res->src;

    const int32_t n_all = c.n_sink + c.n_kv;

    std::vector<double> out(ggml_nelements(res), 0.0);

    for (int32_t s = 0; s < c.n_stream; ++s) {
        for (int32_t h_kv = 0; h_kv < c.n_head_kv; ++h_kv) {
            std::vector<std::vector<float>> k, v;
            for (int32_t j = 0; j < n_all; ++j) {
                const bool is_sink = j < c.n_sink;
                const int32_t row  = is_sink ? j : j - c.n_sink;
                k.push_back(row_to_float(src[is_sink ? LMINF_ATTN_K_SINK : LMINF_ATTN_K], row, h_kv, s));
                v.push_back(row_to_float(src[is_sink ? LMINF_ATTN_V_SINK : LMINF_ATTN_V], row, h_kv, s));
            }

            const int32_t n_group = c.n_head/c.n_head_kv;

            for (int32_t h = h_kv*n_group; h < (h_kv + 1)*n_group; ++h) {
                const int32_t n_log2 = 1 << (int) std::floor(std::log2(c.n_head));
                const double  slope  = c.max_bias == 0.0f ? 1.0 : h < n_log2 ?
                    std::pow(2.0, -c.max_bias/n_log2*(h + 1)) : std::pow(2.0, -c.max_bias/2.0/n_log2*(2*(h - n_log2) + 1));

                for (int32_t i = 0; i < c.n_q; ++i) {
                    const auto q      = row_to_float(src[LMINF_ATTN_Q], i, h, s);
                    const auto q_sink = c.n_sink > 0 ? row_to_float(src[LMINF_ATTN_Q_SINK], i, h, s) : q;

                    const ggml_tensor * mask = src[LMINF_ATTN_MASK];
                    const float * mask_row   = (const float *) ((const char *) mask->data + s*mask->nb[3] + i*mask->nb[1]);

                    std::vector<double> score(n_all, -INF);
                    double max = c.head_sinks ? ((const float *) src[LMINF_ATTN_HEAD_SINKS]->data)[h] : -INF;
                    for (int32_t j = 0; j < n_all; ++j) {
                        if (mask_row[j] == -INF) {
                            continue;
                        }
                        score[j] = dot(k[j], j < c.n_sink ? q_sink : q)/std::sqrt((double) c.n_embd_head_k);
                        if (c.logit_softcap > 0.0f) {
                            score[j] = c.logit_softcap*std::tanh(score[j]/c.logit_softcap);
                        }
                        score[j] += slope*mask_row[j];
                        max = std::max(max, score[j]);
                    }
                    if (max == -INF) {
                        continue; // sees nothing: zeros
                    }

                    double sum = c.head_sinks ? std::exp(((const float *) src[LMINF_ATTN_HEAD_SINKS]->data)[h] - max) : 0.0;
                    for (int32_t j = 0; j < n_all; ++j) {
                        sum += std::exp(score[j] - max);
                    }
                    double * o = out.data() + ((int64_t) (s*c.n_q + i)*c.n_head + h)*c.n_embd_head_v;
                    for (int32_t j = 0; j < n_all; ++j) {
                        if (score[j] == -INF) {
                            continue;
                        }
                        const double p = std::exp(score[j] - max)/sum;
                        for (int32_t e = 0; e < c.n_embd_head_v; ++e) {
                            o[e] += p*v[j][e];
                        }
                    }
                }
            }
        }
    }

    return out;
}

double attn_nmse(const std::vector<double> & expected, const float * found) {
    double error = 0.0;
    double size  = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(found[i])) {
            return INF;
        }
        error += (found[i] - expected[i])*(found[i] - expected[i]);
        size  += expected[i]*expected[i];
    }
    return size > 0.0 ? error/size : error > 0.0 ? INF : 0.0;
}

//
// the grid
//

static const std::vector<ggml_type> KV_TYPES = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

static bool fits(ggml_type type, int32_t n_embd_head) {
    return n_embd_head % ggml_blck_size(type) == 0;
}

template <typename T> static T pick(std::mt19937 & rng, const std::vector<T> & values) {
    return values[rng() % values.size()];
}

static attn_case random_case(std::mt19937 & rng, int32_t n_embd_head_k, int32_t n_embd_head_v, ggml_type type_k, ggml_type type_v, int32_t n_q) {
    attn_case c;

    c.n_embd_head_k = n_embd_head_k;
    c.n_embd_head_v = n_embd_head_v;
    c.type_k        = type_k;
    c.type_v        = type_v;
    c.n_q           = n_q;
    c.n_head_kv     = pick<int32_t>(rng, { 1, 2, 3 });
    c.n_head        = c.n_head_kv*pick<int32_t>(rng, { 1, 2, 3, 4, 5, 7, 8, 12, 16 });
    c.n_stream      = pick<int32_t>(rng, { 1, 1, 2, 3 });
    c.n_sink        = pick<int32_t>(rng, { 0, 1, 8, 16, 37, 104 });
    c.n_kv          = pick<int32_t>(rng, { 1, 17, 64, 127, 256, 300, 511 });

    do {
        c.type_k_sink = pick(rng, KV_TYPES);
        c.type_v_sink = pick(rng, KV_TYPES);
    } while (!fits(c.type_k_sink, n_embd_head_k) || !fits(c.type_v_sink, n_embd_head_v));

    c.max_bias      = rng() % 4 == 0 ? 8.0f  : 0.0f;
    c.logit_softcap = rng() % 4 == 0 ? 15.0f : 0.0f;
    c.sharpness     = pick<float>(rng, { 0.1f, 1.0f, 1.0f, 8.0f });
    c.head_sinks    = rng() % 4 == 0;
    c.mask          = (attn_mask_kind) (rng() % ATTN_MASK_COUNT);

    return c;
}

std::vector<attn_case> attn_grid(std::mt19937 & rng) {
    std::vector<attn_case> res;

    for (int32_t n_embd_head : { 8, 40, 48, 64, 80, 96, 112, 128, 192, 256, 512 }) {
        for (ggml_type type_k : KV_TYPES) {
            for (ggml_type type_v : KV_TYPES) {
                if (fits(type_k, n_embd_head) && fits(type_v, n_embd_head)) {
                    for (int32_t n_q : { 1, pick<int32_t>(rng, { 2, 3, 5, 8 }), pick<int32_t>(rng, { 13, 33, 64, 100 }) }) {
                        res.push_back(random_case(rng, n_embd_head, n_embd_head, type_k, type_v, n_q));
                    }
                }
            }
        }
    }

    // V of another size than K
    for (int32_t n_q : { 1, 4, 40 }) {
        res.push_back(random_case(rng, 192, 128, GGML_TYPE_F16, GGML_TYPE_F16, n_q));
        res.push_back(random_case(rng, 64, 96, GGML_TYPE_Q8_0, GGML_TYPE_F32, n_q));
        res.push_back(random_case(rng, 512, 256, GGML_TYPE_F16, GGML_TYPE_F16, n_q));
        res.push_back(random_case(rng, 128, 384, GGML_TYPE_F32, GGML_TYPE_Q8_0, n_q));
    }

    // every kind of mask, one and many queries, with and without sinks; cells about the sizes of tiles
    for (int32_t mask = 0; mask < ATTN_MASK_COUNT; ++mask) {
        for (int32_t n_q : { 1, 6, 70 }) {
            for (int32_t n_sink : { 0, 16 }) {
                attn_case c = random_case(rng, 64, 64, GGML_TYPE_F16, GGML_TYPE_F16, n_q);
                c.mask   = (attn_mask_kind) mask;
                c.n_sink = n_sink;
                res.push_back(c);
            }
        }
    }
    for (int32_t n_kv : { 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 128, 129, 1000 }) {
        for (int32_t n_q : { 1, 2, 16, 17, 65 }) {
            attn_case c = random_case(rng, 64, 64, GGML_TYPE_F16, GGML_TYPE_F16, n_q);
            c.n_kv = n_kv;
            c.mask = rng() % 2 ? ATTN_MASK_OPEN : ATTN_MASK_WINDOW;
            res.push_back(c);
        }
    }

    // GQA ratios 1 to 16
    for (int32_t n_group = 1; n_group <= 16; ++n_group) {
        for (int32_t n_q : { 1, 9 }) {
            attn_case c = random_case(rng, 64, 64, GGML_TYPE_F16, GGML_TYPE_F16, n_q);
            c.n_head_kv = 2;
            c.n_head    = 2*n_group;
            res.push_back(c);
        }
    }

    // the largest heads again, with the groups, sinks and few cells that GPUs are emulated with
    for (int32_t n_group : { 1, 2, 4, 8 }) {
        for (int32_t n_q : { 1, 3, 24 }) {
            for (int32_t n_sink : { 0, 8 }) {
                for (bool head_sinks : { false, true }) {
                    attn_case c = random_case(rng, 512, 512, pick(rng, KV_TYPES), pick(rng, KV_TYPES), n_q);
                    c.n_head_kv  = 1;
                    c.n_head     = n_group;
                    c.n_stream   = pick<int32_t>(rng, { 1, 2 });
                    c.n_sink     = n_sink;
                    c.n_kv       = pick<int32_t>(rng, { 33, 64, 100 });
                    c.head_sinks = head_sinks;
                    res.push_back(c);
                }
            }
        }
    }

    // multi-head latent attention
    for (ggml_type type : KV_TYPES) {
        for (int32_t n_head : { 8, 16, 20, 128 }) {
            for (int32_t n_q : { 1, 5, 33 }) {
                attn_case c = random_case(rng, 576, 512, type, type, n_q);
                c.n_head_kv   = 1;
                c.n_head      = n_head;
                c.n_stream    = n_q == 1 ? 2 : 1;
                c.n_sink      = pick<int32_t>(rng, { 0, 8, 37 });
                c.n_kv        = pick<int32_t>(rng, { 33, 64, 100 });
                c.type_k_sink = pick(rng, KV_TYPES);
                c.type_v_sink = c.type_k_sink;
                c.v_in_k      = true;
                res.push_back(c);
            }
        }
    }

    return res;
}

double attn_limit(const attn_case & c) {
    const std::vector<ggml_type> types = { c.type_k, c.type_v, c.type_k_sink, c.type_v_sink };
    return std::all_of(types.begin(), types.end(), [](ggml_type t) { return t == GGML_TYPE_F32; }) ? 1e-6 : 1e-5;
}

double attn_limit_f32(const attn_case &) {
    return 1e-10;
}

double attn_limit_i16(const attn_case & c) {
    const auto is_integer = [](ggml_type t) { return t == GGML_TYPE_Q8_0 || t == GGML_TYPE_Q4_0; };

    double res = attn_limit_f32(c);

    // An element of q is off by 1/sqrt(12) of a step at random, a step being the largest one over 32767, 3 to 4 times their
    // standard deviation. So a score is off by 3.5e-5 of a standard deviation of scores, and a weight by that of itself: 1.2e-9
    // in the mean. A case may have one row with one such error, normally distributed: 50 times its mean is 7 deviations.
    if (is_integer(c.type_k) || (c.n_sink > 0 && is_integer(c.type_k_sink))) {
        res += 50*1.2e-9*c.sharpness*c.sharpness;
    }
    // A weight is off by half a step at most, the largest of its 64 cells over 32767: with one large weight in a block and nothing
    // anywhere else, the sum of their squares is 64/4/32767^2 of the output's, 1.5e-8. Values differ in size: twice that.
    if (is_integer(c.type_v) || (c.n_sink > 0 && is_integer(c.type_v_sink))) {
        res += 3e-8;
    }
    return res;
}

int attn_run(const char * name, const std::vector<attn_case> & cases, std::mt19937 & rng, bool (*compute)(ggml_tensor * op),
        double (*limit)(const attn_case & c)) {
    size_t n_run = 0, n_failed = 0, n_declined = 0;

    std::map<std::string, double> worst; // by the type of K and V

    for (const auto & c : cases) {
        attn_problem problem(c, rng);
        ggml_tensor * op = problem.op();

        if (!compute(op)) {
            ++n_declined;
            continue;
        }
        ++n_run;

        const double nmse = attn_nmse(problem.reference(), (const float *) op->data);
        const double most = limit(c);

        double & w = worst[std::string(ggml_type_name(c.type_k)) + "/" + ggml_type_name(c.type_v)];
        w = std::max(w, nmse);

        if (!(nmse <= most)) {
            ++n_failed;
            printf("%s: FAILED, NMSE %.2e above %.0e: %s\n", name, nmse, most, c.str().c_str());
        }
    }

    printf("%s: worst NMSE by K/V type:", name);
    for (const auto & [types, nmse] : worst) {
        printf(" %s %.1e", types.c_str(), nmse);
    }
    printf("\n%s: %zu run, %zu failed, %zu declined\n", name, n_run, n_failed, n_declined);

    return n_failed > 0 || n_run == 0;
}

std::mt19937 attn_seed() {
    const char * env = getenv("LMINF_TEST_SEED");
    const uint32_t seed = env ? (uint32_t) strtoul(env, nullptr, 10) : std::random_device()();
    printf("LMINF_TEST_SEED=%u\n", seed);
    return std::mt19937(seed);
}
