// the scans of native/src/lminf-lanes.h against float64, by each instruction set
//
//   test-lanes [ISA]...   default: all that this processor has

#include "attn-cases.h"

#include "lminf-lanes.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
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

// --- keys ---------------------------------------------------------------------------------------------------------------

static void test_keys(ggml_type type, int64_t n_embd, int64_t n_blocks, int64_t n_q) {
    const std::string name = std::string(ggml_type_name(type)) + " n_embd=" + std::to_string(n_embd)
        + " n_blocks=" + std::to_string(n_blocks) + " n_q=" + std::to_string(n_q);

    const size_t  size     = lminf_lanes_size(type, n_embd);
    const int64_t n_tokens = n_blocks*lminf_n_lanes;
    check(size == lminf_n_lanes*ggml_row_size(type, n_embd), "size of a block, " + name);

    std::vector<char> blocks(n_blocks*size, (char) 0xFF);

    // in any order, some of them twice
    std::vector<int64_t> order;
    for (int64_t i = 0; i < n_tokens; ++i) {
        order.push_back(i);
        if (draw(4) == 0) {
            order.push_back(i);
        }
    }
    std::shuffle(order.begin(), order.end(), rng);

    std::vector<std::vector<float>> keys(n_tokens);
    for (int64_t i : order) {
        keys[i] = random_floats(n_embd, std::exp((float) draw(8) - 4.0f));
        lminf_lanes_store(type, n_embd, &blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, keys[i].data());
    }

    // as ggml would have stored them
    std::vector<float> row(n_embd);
    std::vector<char>  stored(ggml_row_size(type, n_embd));
    for (int64_t i = 0; i < n_tokens; ++i) {
        ggml_quantize_chunk(type, keys[i].data(), stored.data(), 0, 1, n_embd, nullptr);
        if (type == GGML_TYPE_F32) {
            memcpy(row.data(), stored.data(), stored.size());
        } else {
            ggml_get_type_traits(type)->to_float(stored.data(), row.data(), n_embd);
        }
        lminf_lanes_load(type, n_embd, &blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, keys[i].data());
        check(memcmp(row.data(), keys[i].data(), n_embd*sizeof(float)) == 0, "load, " + name);
    }

    // a key and a query that are not numbers
    const int64_t bad_key   = draw(3) == 0 ? draw(n_tokens) : -1;
    const int64_t bad_query = draw(3) == 0 ? draw(n_q) : -1;
    auto q = random_floats(n_q*n_embd);
    if (bad_key >= 0) {
        std::vector<float> k = random_floats(n_embd);
        k[draw(n_embd)] = NAN;
        lminf_lanes_store(type, n_embd, &blocks[bad_key/lminf_n_lanes*size], bad_key % lminf_n_lanes, k.data());
    }
    if (bad_query >= 0) {
        q[bad_query*n_embd + draw(n_embd)] = NAN;
    }

    std::vector<float> scores(n_q*n_tokens, 1234.5f);
    lminf_lanes_dot(type, n_embd, blocks.data(), n_blocks, q.data(), n_q, scores.data());

    for (int64_t i = 0; i < n_q; ++i) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            double sum = 0.0, sum_abs = 0.0;
            for (int64_t e = 0; e < n_embd; ++e) {
                const double x = (double) q[i*n_embd + e]*keys[t][e];
                sum     += x;
                sum_abs += std::fabs(x);
            }
            const float score = scores[i*n_tokens + t];
            if (i == bad_query || t == bad_key) {
                check(std::isnan(score), "NaN, " + name);
            } else {
                check(std::fabs(score - sum) <= 1e-6*sum_abs, "score " + std::to_string(score) + " for " + std::to_string(sum) + ", " + name);
            }
        }
    }
}

static void test_all_keys() {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int64_t n_embd : { 1, 3, 8, 31, 32, 63, 64, 65, 80, 96, 128, 160, 192, 256, 576 }) {
            if (n_embd % ggml_blck_size(type) != 0) {
                continue;
            }
            for (int64_t n_q : { 1, 2, 3, 4, 5, 7, 8, 9, 12, 19 }) {
                test_keys(type, n_embd, 1 + draw(4), n_q);
            }
        }
        test_keys(type, 64, 3, 128);
        lminf_lanes_dot(type, 64, nullptr, 0, nullptr, 0, nullptr);
    }
    // what is not finite in 32 quantized elements makes no number of the others
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        std::vector<char> block(lminf_lanes_size(type, 64));
        auto k = random_floats(64), res = k;
        k[draw(64)] = bad_number();
        lminf_lanes_store(type, 64, block.data(), 5, k.data());
        lminf_lanes_load (type, 64, block.data(), 5, res.data());
        for (int64_t e = 0; e < 64; ++e) {
            const bool is_bad = !std::isfinite(k[e/32*32]) || std::any_of(&k[e/32*32], &k[e/32*32] + 32, [](float x) { return !std::isfinite(x); });
            check(std::isnan(res[e]) == is_bad, "a quantized key that is not finite");
        }
    }
}

// --- sketches -----------------------------------------------------------------------------------------------------------

static void test_sketch(int64_t n_blocks, int64_t n_q) {
    const std::string name = "sketch n_blocks=" + std::to_string(n_blocks) + " n_q=" + std::to_string(n_q);

    const size_t  size     = lminf_sketch_size();
    const int64_t n_tokens = n_blocks*lminf_n_lanes;

    std::vector<char>    blocks(n_blocks*size, (char) 0xFF);
    std::vector<float>   x(n_tokens*16);
    std::vector<int64_t> order(n_tokens);
    for (int64_t i = 0; i < n_tokens; ++i) {
        order[i] = i;
    }
    std::shuffle(order.begin(), order.end(), rng);
    for (int64_t i : order) {
        auto xi = random_floats(16, std::exp((float) draw(8) - 4.0f));
        if (draw(10) == 0) {
            std::fill(xi.begin(), xi.end(), 0.0f);
        }
        if (draw(10) == 0) {
            xi[draw(16)] = bad_number();
        }
        lminf_sketch_store(&blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, xi.data());
        std::copy(xi.begin(), xi.end(), &x[16*i]);
    }
    for (int64_t i = 0; i < n_tokens; ++i) {
        float far = 0.0f;
        bool  bad = false;
        for (int j = 0; j < 16; ++j) {
            bad = bad || !std::isfinite(x[16*i + j]);
            far = std::max(far, std::fabs(x[16*i + j]));
        }
        float res[16];
        lminf_sketch_load(&blocks[i/lminf_n_lanes*size], i % lminf_n_lanes, res);
        for (int j = 0; j < 16; ++j) {
            // a step is an eighth of the largest; what lies opposite to that has one step less
            const bool is_opposite = std::fabs(x[16*i + j]) > far*7.4f/8.0f;
            check(bad ? std::isnan(res[j]) : std::fabs(res[j] - x[16*i + j]) <= far/8.0f*(is_opposite ? 1.01f : 0.51f), "load, " + name);
            x[16*i + j] = res[j];
        }
    }

    auto q      = random_floats(n_q*16, std::exp((float) draw(8) - 4.0f));
    auto offset = random_floats(n_q, (float) draw(3));
    auto before = random_floats(n_tokens, (float) draw(3));
    if (draw(3) == 0) {
        std::fill(before.begin(), before.end(), -INFINITY);
    }
    for (int64_t i = 0; i < n_q; ++i) {
        switch (draw(8)) {
            case 0:  q[16*i + draw(16)] = bad_number(); break;
            case 1:  offset[i] = NAN;                   break;
            case 2:  std::fill(&q[16*i], &q[16*i] + 16, 0.0f); break;
            default: break;
        }
    }
    auto best = before;
    lminf_sketch_max(blocks.data(), n_blocks, q.data(), offset.data(), n_q, best.data());

    for (int64_t t = 0; t < n_tokens; ++t) {
        double expected = before[t], error = 0.0;
        for (int64_t i = 0; i < n_q; ++i) {
            double sum = offset[i], sum_abs = 0.0, far = 0.0;
            for (int j = 0; j < 16; ++j) {
                sum     += (double) q[16*i + j]*x[16*t + j];
                sum_abs += std::fabs(x[16*t + j]);
                far      = std::max<double>(far, std::fabs(q[16*i + j]));
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

static double dot(const float * a, const float * b, int64_t n) {
    double res = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        res += (double) a[i]*b[i];
    }
    return res;
}

// the largest part of the variance that 16 directions can have: the sum of the largest eigenvalues, by deflation
static double best_variance(std::vector<double> cov, int64_t n) {
    double res = 0.0;
    for (int64_t k = 0; k < std::min<int64_t>(16, n); ++k) {
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
    check(axes.mean == same.mean && axes.axes == same.axes && axes.var == same.var, "the same again, " + name);
    check(axes.n_embd == n && (int64_t) axes.mean.size() == n && (int64_t) axes.axes.size() == 16*n && axes.var.size() == 16, "sizes, " + name);

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

    double total = 0.0;
    for (int64_t a = 0; a < 16; ++a) {
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
        check(std::fabs(var - axes.var[a]) <= 1e-3*axes.var[0] + 1e-6, "variance, " + name);
        check(a == 0 || axes.var[a] <= axes.var[a - 1], "order, " + name);
        total += var;
    }
    const double best = best_variance(cov, n);
    check(total >= (falling ? 0.9999 : 0.98)*best - 1e-6, "variance " + std::to_string(total) + " of " + std::to_string(best) + ", " + name);

    // projections
    const auto q = random_floats(n);
    std::vector<float> centered(n), x(16, NAN), y(16, NAN);
    for (int64_t i = 0; i < n; ++i) {
        centered[i] = q[i] - axes.mean[i];
    }
    lminf_project(axes, q.data(), x.data());
    const float offset = lminf_project_query(axes, q.data(), y.data());
    check(std::fabs(offset - dot(q.data(), axes.mean.data(), n)) <= 1e-4, "offset, " + name);
    for (int64_t a = 0; a < 16; ++a) {
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
        for (int64_t a = 0; a < 16; ++a) {
            check(std::fabs(dot(&axes.axes[a*24], &axes.axes[a*24], 24) - 1.0) <= 1e-4 && axes.var[a] <= 1e-6, "axes of equal keys");
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------------

int main(int argc, char ** argv) {
    rng = attn_seed();

    std::vector<const char *> isas(argv + 1, argv + argc);
    if (isas.empty()) {
        isas = lminf_lanes_isas();
    }
    for (const char * isa : isas) {
        if (!lminf_lanes_set_isa(isa)) {
            printf("lanes, %s: this build or this processor does not have it\n", isa);
            return 1;
        }
        n_checks = 0;
        test_all_keys();
        for (int i = 0; i < 300; ++i) {
            test_sketch(draw(11), draw(2) ? draw(6) : draw(150));
        }
        for (int i = 0; i < 1000; ++i) {
            test_best();
        }
        test_all_axes();
        printf("lanes, %s: %d checks, %d failed\n", isa, n_checks, n_failed);
    }
    check(!lminf_lanes_set_isa("none"), "an instruction set that does not exist");

    return n_failed > 0;
}
