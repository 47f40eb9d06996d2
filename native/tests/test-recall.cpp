// native/src/lminf-sketch.h and lminf-rows.h against float64, by each instruction set
//
//   test-recall [ISA]...   default: all that this processor has

#include "attn-cases.h"

#include "lminf-isa.h"
#include "lminf-rows.h"
#include "lminf-sketch.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

static std::mt19937 rng;
static int          n_failed = 0;
static int          n_checks = 0;

static void check(bool ok, const std::string & what) {
    ++n_checks;
    if (!ok && n_failed++ < 20) {
        printf("FAILED: %s\n", what.c_str());
    }
}

static int64_t draw(int64_t n) {
    return (int64_t) (rng() % (uint64_t) n);
}

static std::vector<float> random_floats(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);

    std::vector<float> res(n);
    for (auto & x : res) {
        x = normal(rng);
    }
    return res;
}

static float bad_number() {
    const float all[] = { NAN, INFINITY, -INFINITY };
    return all[draw(3)];
}

// --- rows ---------------------------------------------------------------------------------------------------------------

static constexpr ggml_type TYPES[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

static std::vector<float> to_floats(ggml_type type, const char * row, int64_t n) {
    std::vector<float> res(n);
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), row, n*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(row, res.data(), n);
    }
    return res;
}

// equal bits, or both no number: processors differ in which
static bool are_same(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

static void test_row(ggml_type type, int64_t n, bool with_bad) {
    const std::string name = std::string(ggml_type_name(type)) + " n=" + std::to_string(n);

    auto x = random_floats(n, std::exp((float) draw(12) - 8.0f));
    std::vector<bool> is_bad(n);
    for (int i = 0; with_bad && i < 3; ++i) {
        const int64_t at = draw(n);
        x[at] = bad_number();
        for (int64_t e = at/ggml_blck_size(type)*ggml_blck_size(type), j = 0; j < ggml_blck_size(type); ++j) {
            is_bad[e + j] = true;
        }
    }
    // what is not finite goes through ggml as zero, so that blocks without it can be compared
    auto finite = x;
    for (auto & v : finite) {
        v = std::isfinite(v) || type == GGML_TYPE_F32 || type == GGML_TYPE_F16 ? v : 0.0f;
    }
    std::vector<char> expected(ggml_row_size(type, n)), row(expected.size() + 16, (char) 0xAA);
    if (type == GGML_TYPE_F32) {
        memcpy(expected.data(), finite.data(), expected.size());
    } else {
        ggml_get_type_traits(type)->from_float_ref(finite.data(), expected.data(), n);
    }
    lminf_row_store(type, x.data(), n, row.data());
    check(std::all_of(row.end() - 16, row.end(), [](char c) { return c == (char) 0xAA; }), "store, behind its end, " + name);

    const auto as_floats = to_floats(type, expected.data(), n);

    std::vector<float>       floats(n + 16, -1234.5f);
    std::vector<ggml_fp16_t> halves(n + 16, 0x5555);
    lminf_row_load(type, row.data(), n, GGML_TYPE_F32, floats.data());
    lminf_row_load(type, row.data(), n, GGML_TYPE_F16, halves.data());
    for (int64_t i = 0; i < n; ++i) {
        const bool is_nan = is_bad[i] && ggml_is_quantized(type);
        check(is_nan ? std::isnan(floats[i]) : are_same(floats[i], as_floats[i]), "load, " + name);
        check(is_nan ? std::isnan(ggml_fp16_to_fp32(halves[i]))
                     : are_same(ggml_fp16_to_fp32(halves[i]), ggml_fp16_to_fp32(ggml_fp32_to_fp16(as_floats[i]))), "load as f16, " + name);
    }
    for (int64_t i = n; i < n + 16; ++i) {
        check(floats[i] == -1234.5f && halves[i] == 0x5555, "load, behind its end, " + name);
    }
}

static void test_rows_dot(ggml_type type, int64_t n_embd, int64_t n_rows, int64_t n_q) {
    const std::string name = std::string(ggml_type_name(type)) + " n_embd=" + std::to_string(n_embd)
        + " n_rows=" + std::to_string(n_rows) + " n_q=" + std::to_string(n_q);

    // a head of several, among rows that are not asked for and are NaN
    const size_t  size    = ggml_row_size(type, n_embd);
    const int64_t n_heads = 1 + draw(3);
    const size_t  stride  = size*n_heads;
    const size_t  offset  = size*draw(n_heads);
    const int64_t n_there = 1 + draw(3*n_rows + 1);

    std::vector<char>    rows(n_there*stride, (char) 0xFF);
    std::vector<int32_t> idxs(n_rows);
    std::vector<std::vector<float>> k(n_there);
    const int64_t bad_row   = draw(3) == 0 ? draw(n_there) : -1;
    const int64_t bad_query = draw(3) == 0 ? draw(n_q) : -1;
    for (auto & idx : idxs) {
        idx = (int32_t) draw(n_there);
        if (k[idx].empty()) {
            k[idx] = random_floats(n_embd, std::exp((float) draw(8) - 4.0f));
            if (idx == bad_row) {
                k[idx][draw(n_embd)] = NAN;
            }
            lminf_row_store(type, k[idx].data(), n_embd, &rows[idx*stride + offset]);
            k[idx] = to_floats(type, &rows[idx*stride + offset], n_embd);
        }
    }
    auto q = random_floats(n_q*n_embd);
    if (bad_query >= 0) {
        q[bad_query*n_embd + draw(n_embd)] = NAN;
    }

    std::vector<float> scores(n_q*n_rows + 16, 1234.5f);
    std::vector<const char *> those;
    for (int32_t idx : idxs) {
        those.push_back(&rows[idx*stride]);
    }
    lminf_rows_dot(type, n_embd, those.data(), offset, n_rows, q.data(), n_q, scores.data());

    for (int64_t i = 0; i < n_q; ++i) {
        for (int64_t r = 0; r < n_rows; ++r) {
            double sum = 0.0, sum_abs = 0.0;
            for (int64_t e = 0; e < n_embd; ++e) {
                const double x = (double) q[i*n_embd + e]*k[idxs[r]][e];
                sum     += x;
                sum_abs += std::fabs(x);
            }
            const float score = scores[i*n_rows + r];
            if (i == bad_query || idxs[r] == bad_row) {
                check(std::isnan(score), "NaN, " + name);
            } else {
                check(std::fabs(score - sum) <= 1e-6*sum_abs, "score " + std::to_string(score) + " for " + std::to_string(sum) + ", " + name);
            }
        }
    }
    check(std::all_of(scores.end() - 16, scores.end(), [](float x) { return x == 1234.5f; }), "scores behind their end, " + name);
}

static void test_all_rows() {
    for (ggml_type type : TYPES) {
        for (int64_t n : { 1, 3, 8, 31, 32, 63, 64, 65, 80, 96, 128, 160, 192, 256, 576, 1024 }) {
            if (n % ggml_blck_size(type) != 0) {
                continue;
            }
            for (int i = 0; i < 6; ++i) {
                test_row(type, n, i % 2 == 1);
            }
            for (int64_t n_q : { 1, 2, 3, 4, 5, 7, 8, 9, 12, 19 }) {
                test_rows_dot(type, n, 1 + draw(40), n_q);
            }
        }
        test_rows_dot(type, 64, 256, 128);
        lminf_rows_dot(type, 64, nullptr, 0, 0, nullptr, 0, nullptr);
    }
}

// --- votes --------------------------------------------------------------------------------------------------------------

static void test_exp(int64_t n) {
    const std::string name = "exp n=" + std::to_string(n);

    auto x = random_floats(n + 16, std::exp((float) draw(9) - 4.0f));
    const float shift = 100.0f*random_floats(1)[0];
    for (auto & v : x) {
        v += shift;
    }
    const bool is_empty = draw(8) == 0;
    for (int64_t i = 0; i < n; ++i) {
        if (is_empty || draw(20) == 0) {
            x[i] = draw(2) ? NAN : -INFINITY;
        }
    }
    const auto before = x;

    float expected = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        expected = x[i] > expected ? x[i] : expected;
    }
    float max = NAN;
    const float sum = lminf_exp(x.data(), n, max);
    check(max == expected, "largest, " + name);

    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const double y = before[i] > -INFINITY ? std::exp((double) (before[i] - expected)) : 0.0;
        check(std::fabs(x[i] - y) <= 5e-7*y + 2e-38, "exp " + std::to_string(before[i] - expected) + ": " + std::to_string(x[i]) + ", " + name);
        total += x[i];
    }
    check(std::fabs(sum - total) <= 1e-5*total, "sum, " + name);
    check(memcmp(&before[n], &x[n], 16*sizeof(float)) == 0, "behind its end, " + name);
}

static void test_add_scaled(int64_t n) {
    const auto  x = random_floats(n);
    const auto  before = random_floats(n + 16);
    const float a = draw(8) ? random_floats(1)[0] : NAN;

    auto y = before;
    lminf_add_scaled(y.data(), a, x.data(), n);
    for (int64_t i = 0; i < n; ++i) {
        const double expected = before[i] + (double) a*x[i];
        check(std::isnan(a) ? std::isnan(y[i]) : std::fabs(y[i] - expected) <= 2e-7*(std::fabs(before[i]) + std::fabs(a*x[i])), "add_scaled n=" + std::to_string(n));
    }
    check(memcmp(&before[n], &y[n], 16*sizeof(float)) == 0, "add_scaled, behind its end");
}

static double dot(const float * a, const float * b, int64_t n) {
    double res = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        res += (double) a[i]*b[i];
    }
    return res;
}

constexpr int n_dirs = lminf_n_dirs;

// --- sketches -----------------------------------------------------------------------------------------------------------

static void test_sketch(int64_t n_blocks, int64_t n_q) {
    const std::string name = "sketch n_blocks=" + std::to_string(n_blocks) + " n_q=" + std::to_string(n_q);

    const size_t  size     = lminf_sketch_size();
    const int64_t n_tokens = n_blocks*lminf_n_lanes;

    std::vector<char>    blocks(n_blocks*size, (char) 0xFF);
    std::vector<float>   x(n_tokens*n_dirs);
    std::vector<int64_t> order(n_tokens);
    for (int64_t i = 0; i < n_tokens; ++i) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), rng);
    for (int64_t i : order) {
        auto xi = random_floats(n_dirs, std::exp((float) draw(8) - 4.0f));
        if (draw(10) == 0) {
            std::fill(xi.begin(), xi.end(), 0.0f);
        }
        if (draw(10) == 0) {
            xi[draw(n_dirs)] = bad_number();
        }
        lminf_sketch_store(&blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, xi.data());
        std::copy(xi.begin(), xi.end(), &x[n_dirs*i]);
    }
    for (int64_t i = 0; i < n_tokens; ++i) {
        bool  bad = false;
        float turned[n_dirs], res[n_dirs], turned_res[n_dirs];
        for (int j = 0; j < n_dirs; ++j) {
            bad = bad || !std::isfinite(x[n_dirs*i + j]);
            turned[j] = x[n_dirs*i + j];
        }
        lminf_sketch_load(&blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, res);
        std::copy(res, res + n_dirs, turned_res);
        lminf_turn(turned);
        lminf_turn(turned_res);

        const double square = dot(&x[n_dirs*i], &x[n_dirs*i], n_dirs), step = 0.9957*std::sqrt(square/n_dirs);

        float least = INFINITY; // half of what a number counts
        for (float a : turned_res) {
            least = std::min(least, std::fabs(a));
        }
        for (int j = 0; j < n_dirs; ++j) {
            if (bad) {
                check(std::isnan(res[j]), "bad, " + name);
            } else if (square == 0.0) {
                check(res[j] == 0.0f, "zeros, " + name);
            } else {
                const bool   is_outer = std::fabs(turned_res[j]) > 2.0f*least;
                const double nearest  = (is_outer ? 1.5 : 0.5)*std::copysign(step, turned_res[j]);
                const bool   is_out   = is_outer && std::fabs(turned[j]) > 2.0*step;
                check(std::fabs(turned[j] - nearest) <= 0.5001*step || (is_out && turned[j]*nearest > 0.0), "load, " + name);
            }
            x[n_dirs*i + j] = res[j];
        }
        if (!bad) { // as long as it has to be
            float own[n_dirs];
            std::copy(turned, turned + n_dirs, own);
            check(std::fabs(dot(own, turned_res, n_dirs) - square) <= 1e-3*square, "length, " + name);
        }
    }

    auto q      = random_floats(n_q*n_dirs, std::exp((float) draw(8) - 4.0f));
    auto offset = random_floats(n_q, (float) draw(3));
    auto before = random_floats(n_tokens, (float) draw(3));
    if (draw(3) == 0) {
        std::fill(before.begin(), before.end(), -INFINITY);
    }
    for (int64_t i = 0; i < n_q; ++i) {
        switch (draw(8)) {
            case 0:  q[n_dirs*i + draw(n_dirs)] = bad_number(); break;
            case 1:  offset[i] = NAN;                   break;
            case 2:  std::fill(&q[n_dirs*i], &q[n_dirs*i] + n_dirs, 0.0f); break;
            default: break;
        }
    }
    auto best = before;
    // the blocks in parts of the same size
    const int64_t n_parts = n_blocks % 4 == 0 ? 4 : n_blocks % 3 == 0 ? 3 : n_blocks % 2 == 0 ? 2 : 1, n_each = n_blocks/n_parts;
    std::vector<const char *> parts;
    for (int64_t i = 0; i < n_parts; ++i) {
        parts.push_back(blocks.data() + i*n_each*size); // there may be none
    }
    lminf_sketch_max(parts.data(), n_parts, n_each, lminf_sketch_queries(q.data(), offset.data(), n_q), best.data());

    auto turned_x = x, turned_q = q;
    for (int64_t t = 0; t < n_tokens; ++t) {
        lminf_turn(&turned_x[n_dirs*t]);
    }
    double far = 0.0; // of all queries, as they have one scale
    for (int64_t i = 0; i < n_q; ++i) {
        float * y = &turned_q[n_dirs*i];
        lminf_turn(y);
        if (std::all_of(y, y + n_dirs, [](float a) { return std::isfinite(a); })) {
            far = std::accumulate(y, y + n_dirs, far, [](double a, float b) { return std::max<double>(a, std::fabs(b)); });
        }
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
        double expected = before[t], error = 0.0;
        for (int64_t i = 0; i < n_q; ++i) {
            double sum = offset[i], sum_abs = 0.0;
            for (int j = 0; j < n_dirs; ++j) {
                sum     += (double) q[n_dirs*i + j]*x[n_dirs*t + j];
                sum_abs += std::fabs(turned_x[n_dirs*t + j]);
            }
            if (std::isfinite(sum)) {
                expected = std::max(expected, sum);
                error    = std::max(error, far/254.0*sum_abs + 1e-6*(std::fabs(sum) + std::fabs(offset[i]) + far*sum_abs));
            }
        }
        check(best[t] == expected || std::fabs(best[t] - expected) <= 1.001*error,
              "best " + std::to_string(best[t]) + " for " + std::to_string(expected) + ", " + name);
    }
}

// --- choice -------------------------------------------------------------------------------------------------------------

static void test_best() {
    const int64_t n_scores = draw(6000);
    const int64_t sizes[]  = { 0, 1, 2, 16, 100, 700, n_scores, n_scores + 5 };
    const int64_t n        = sizes[draw(8)];
    const int     kind     = (int) draw(5);

    std::vector<float> scores = random_floats(n_scores);
    for (int64_t i = 0; i < n_scores; ++i) {
        switch (kind) {
            case 0:  scores[i] = (float) draw(4) - 1.0f;  break; // ties
            case 1:  scores[i] = (float) i;               break; // the worst order
            case 2:  scores[i] = draw(2) ? 0.0f : -0.0f;  break;
            default: break;
        }
        switch (kind == 3 ? draw(4) : draw(50)) {
            case 0:  scores[i] = NAN;                                         break;
            case 1:  scores[i] = -INFINITY;                                   break;
            case 2:  scores[i] = draw(2) ? -FLT_MAX : -FLT_MIN/8.0f;          break;
            case 3:  scores[i] = draw(2) ? INFINITY : -std::fabs(bad_number()); break; // also -NaN
            default: break;
        }
    }

    std::vector<lminf_best::entry> expected;
    const auto get_expected = [&](const std::vector<bool> & is_added) {
        expected.clear();
        for (int64_t i = 0; i < n_scores; ++i) {
            if (is_added[i] && scores[i] > -INFINITY) {
                expected.push_back({ i, scores[i] });
            }
        }
        std::stable_sort(expected.begin(), expected.end(), [](const auto & a, const auto & b) { return a.second > b.second; });
        expected.resize(std::min<size_t>(expected.size(), n));
        std::sort(expected.begin(), expected.end());
    };

    // in parts, by order or not, into one or several
    std::vector<std::pair<int64_t, int64_t>> parts;
    for (int64_t i = 0; i < n_scores; ) {
        const int64_t size = std::min(n_scores - i, draw(4) == 0 ? draw(40) : draw(2000));
        parts.push_back({ i, size });
        i += size;
    }
    if (draw(2) == 0) {
        std::shuffle(parts.begin(), parts.end(), rng);
    }
    std::vector<lminf_best> found(1 + draw(3), lminf_best(draw(100)));
    for (auto & f : found) {
        f.clear(n);
    }
    std::vector<bool> is_added(n_scores);
    for (const auto & part : parts) {
        const std::vector<float> exact(scores.begin() + part.first, scores.begin() + part.first + part.second); // for the sanitizers
        found[draw((int64_t) found.size())].add(exact.data(), part.second, part.first);
        std::fill(is_added.begin() + part.first, is_added.begin() + part.first + part.second, true);
        if (found.size() == 1 && draw(8) == 0) {
            get_expected(is_added);
            check(found[0].finish() == expected, "best so far, kind " + std::to_string(kind));
        }
    }
    for (size_t i = 1; i < found.size(); ++i) {
        found[0].add(found[i]);
    }
    get_expected(is_added);
    check(found[0].finish() == expected, "best " + std::to_string(n) + " of " + std::to_string(n_scores) + ", kind " + std::to_string(kind));
}

// --- axes ---------------------------------------------------------------------------------------------------------------

// the largest part of the variance that n_dirs directions can have: the sum of the largest eigenvalues, by deflation
static double best_variance(std::vector<double> cov, int64_t n) {
    double res = 0.0;
    for (int64_t k = 0; k < std::min<int64_t>(n_dirs, n); ++k) {
        std::vector<double> v(n), w(n);
        for (auto & x : v) {
            x = (double) rng()/4294967296.0 - 0.5;
        }
        double value = 0.0;
        for (int it = 0; it < 3000; ++it) {
            double norm = 0.0;
            for (int64_t i = 0; i < n; ++i) {
                w[i] = 0.0;
                for (int64_t j = 0; j < n; ++j) {
                    w[i] += cov[i*n + j]*v[j];
                }
                norm += w[i]*w[i];
            }
            norm = std::sqrt(norm);
            if (norm < 1e-12) {
                return res;
            }
            for (int64_t i = 0; i < n; ++i) {
                v[i] = w[i]/norm;
            }
            value = norm;
        }
        res += value;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                cov[i*n + j] -= value*v[i]*v[j];
            }
        }
    }
    return res;
}

static void test_axes(int64_t n_rows, int64_t n, bool falling) {
    const std::string name = "axes n_rows=" + std::to_string(n_rows) + " n_embd=" + std::to_string(n);

    // around a mean, along random directions of falling variance
    const auto mix  = random_floats(n*n);
    const auto mean = random_floats(n, 3.0f);
    std::vector<float> k(n_rows*n);
    for (int64_t r = 0; r < n_rows; ++r) {
        const auto x = random_floats(n);
        for (int64_t i = 0; i < n; ++i) {
            double sum = mean[i];
            for (int64_t j = 0; j < n; ++j) {
                sum += (falling ? std::exp(-0.08*j) : 1.0)*x[j]*mix[j*n + i];
            }
            k[r*n + i] = (float) sum;
        }
    }
    // rows that are not finite do not count
    auto with_bad = k;
    for (int64_t i = 0; i < 3; ++i) {
        auto row = random_floats(n);
        row[draw(n)] = bad_number();
        with_bad.insert(with_bad.begin() + draw((int64_t) with_bad.size()/n + 1)*n, row.begin(), row.end());
    }
    const lminf_axes axes = lminf_find_axes(k.data(), n_rows, n);
    const lminf_axes same = lminf_find_axes(with_bad.data(), n_rows + 3, n);
    check(axes.mean == same.mean && axes.axes == same.axes, "the same again, " + name);
    check(axes.n_embd == n && (int64_t) axes.mean.size() == n && (int64_t) axes.axes.size() == n_dirs*n, "sizes, " + name);

    std::vector<double> true_mean(n), cov(n*n);
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            true_mean[i] += k[r*n + i]/(double) n_rows;
        }
    }
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                cov[i*n + j] += (k[r*n + i] - true_mean[i])*(k[r*n + j] - true_mean[j])/(double) n_rows;
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        check(std::fabs(axes.mean[i] - true_mean[i]) <= 1e-5, "mean, " + name);
    }

    double total = 0.0, first = 0.0, last = 0.0;
    for (int64_t a = 0; a < n_dirs; ++a) {
        for (int64_t b = 0; b <= a; ++b) {
            const double expected = a == b && a < n ? 1.0 : 0.0;
            check(std::fabs(dot(&axes.axes[a*n], &axes.axes[b*n], n) - expected) <= 1e-4, "orthonormal, " + name);
        }
        double var = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                var += axes.axes[a*n + i]*cov[i*n + j]*axes.axes[a*n + j];
            }
        }
        first = a == 0 ? var : first;
        check(a == 0 || var <= last + 1e-3*first + 1e-6, "order, " + name);
        last = var;
        total += var;
    }
    const double best = best_variance(cov, n);
    check(total >= (falling ? 0.9999 : 0.98)*best - 1e-6, "variance " + std::to_string(total) + " of " + std::to_string(best) + ", " + name);

    // projections
    const auto q = random_floats(n);
    std::vector<float> centered(n), x(n_dirs, NAN), y(n_dirs, NAN);
    for (int64_t i = 0; i < n; ++i) {
        centered[i] = q[i] - axes.mean[i];
    }
    lminf_project(axes, q.data(), x.data());
    const float offset = lminf_project_query(axes, q.data(), y.data());
    check(std::fabs(offset - dot(q.data(), axes.mean.data(), n)) <= 1e-4, "offset, " + name);
    for (int64_t a = 0; a < n_dirs; ++a) {
        check(std::fabs(x[a] - dot(&axes.axes[a*n], centered.data(), n)) <= 1e-4, "projection, " + name);
        check(std::fabs(y[a] - dot(&axes.axes[a*n], q.data(), n)) <= 1e-4, "projection of a query, " + name);
    }
}

static void test_all_axes() {
    for (int64_t n_rows : { 1, 2, 7, 100, 500 }) {
        for (int64_t n : { 1, 7, 15, 16, 17, 33, 64, 80 }) {
            test_axes(n_rows, n, true);
        }
    }
    test_axes(300, 64, false);

    // nothing to go by: any axes, as long as they are some
    for (int64_t n_rows : { 0, 20 }) {
        const std::vector<float> same(n_rows*24, 1.5f);
        const lminf_axes axes = lminf_find_axes(same.data(), n_rows, 24);
        for (int64_t a = 0; a < n_dirs; ++a) {
            check(std::fabs(dot(&axes.axes[a*24], &axes.axes[a*24], 24) - (a < 24 ? 1.0 : 0.0)) <= 1e-4, "axes of equal keys");
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------------

int main(int argc, char ** argv) {
    rng = attn_seed();

    for (const char * isa : argc > 1 ? std::vector<const char *>(argv + 1, argv + argc) : lminf_isa_names()) {
        if (!lminf_set_isa(isa)) {
            printf("recall, %s: this build or this processor does not have it\n", isa);
            return 1;
        }
        n_checks = 0;
        test_all_rows();
        for (int i = 0; i < 400; ++i) {
            test_exp(draw(70));
            test_add_scaled(draw(70));
        }
        test_exp(1000);
        for (int i = 0; i < 300; ++i) {
            test_sketch(draw(11), draw(2) ? draw(6) : draw(150));
        }
        for (int i = 0; i < 1000; ++i) {
            test_best();
        }
        test_all_axes();
        printf("recall, %s: %d checks, %d failed\n", isa, n_checks, n_failed);
    }
    check(!lminf_set_isa("none"), "an instruction set that does not exist");

    return n_failed > 0;
}
