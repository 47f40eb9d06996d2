#include "lminf-sketch.h"

#include "lminf-isa.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

static constexpr ggml_fp16_t F16_NAN = 0x7E00;

static bool are_finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

// --- sketches -----------------------------------------------------------------------------------------------------------

size_t lminf_sketch_size() {
    return LMINF_SKETCH_SIZE;
}

// Walsh and Hadamard's matrix, which is symmetric, after some signs. Without these a key that lies along one axis would have
// coordinates of one size, and several such keys the same ones
static constexpr uint32_t signs = 0x9E3779B9;

static void flip(float * x) {
    for (int i = 0; i < lminf_n_dirs; ++i) {
        x[i] = signs >> i & 1 ? -x[i] : x[i];
    }
}

static void mix(float * x) {
    for (int step = 1; step < lminf_n_dirs; step *= 2) {
        for (int i = 0; i < lminf_n_dirs; ++i) {
            if (!(i & step)) {
                const float a = x[i], b = x[i + step];
                x[i]        = a + b;
                x[i + step] = a - b;
            }
        }
    }
    const float norm = 1.0f/std::sqrt((float) lminf_n_dirs);
    for (int i = 0; i < lminf_n_dirs; ++i) {
        x[i] *= norm;
    }
}

void lminf_turn(float * x) {
    flip(x);
    mix(x);
}

// where the j-th of a lane's numbers lies: 4 bytes hold numbers 0 to 15, the same ones of the next 64 bytes the others
static int64_t byte_of(int64_t lane, int j) { return j/16*64 + 4*lane + j % 4; }
static int     bit_of (int j)               { return j % 16/4*2; }

void lminf_sketch_store(void * block, int64_t lane, const float * x) {
    char * data = (char *) block;

    float y[lminf_n_dirs];
    std::copy(x, x + lminf_n_dirs, y);
    lminf_turn(y);

    // numbers c - 1.5 times a step that is best for coordinates with a normal distribution
    double square = 0.0;
    for (float a : y) {
        square += (double) a*a;
    }
    const double step = 0.9957*std::sqrt(square/lminf_n_dirs);
    const double inv  = step > 0.0 && std::isfinite(step) ? 1.0/step : 0.0;

    int    c[lminf_n_dirs];
    double product = 0.0;
    for (int i = 0; i < lminf_n_dirs; ++i) {
        c[i] = inv == 0.0 ? 2 : (int) std::min(3.0, std::max(0.0, y[i]*inv + 2.0));
        product += y[i]*(c[i] - 1.5);
    }
    // the scale is such that the sketch's product with the key is that of the key with itself: scores are not too low then
    ggml_fp16_t half = are_finite(x, lminf_n_dirs) ? ggml_fp32_to_fp16(product > 0.0 ? (float) (square/product) : 0.0f) : F16_NAN;
    if (!std::isfinite(ggml_fp16_to_fp32(half))) {
        half = F16_NAN;
    }

    for (int i = 0; i < lminf_n_dirs; ++i) {
        char & byte = data[byte_of(lane, i)];
        byte = (char) ((i % 16 < 4 ? 0 : (uint8_t) byte) | c[i] << bit_of(i));
    }
    memcpy(data + 128 + 2*lane, &half, sizeof(half));
}

void lminf_sketch_load(const void * block, int64_t lane, float * x) {
    const uint8_t * data = (const uint8_t *) block;

    ggml_fp16_t scale;
    memcpy(&scale, data + 128 + 2*lane, sizeof(scale));
    for (int i = 0; i < lminf_n_dirs; ++i) {
        x[i] = ggml_fp16_to_fp32(scale)*((float) (data[byte_of(lane, i)] >> bit_of(i) & 3) - 1.5f);
    }
    mix(x);
    flip(x);
}

lminf_sketch_queries::lminf_sketch_queries(const float * q, const float * offset, int64_t n) : each(n), scale(0.0f) {
    std::vector<float> turned(q, q + n*lminf_n_dirs);

    float far = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        float * y = &turned[i*lminf_n_dirs];
        lminf_turn(y);
        each[i] = { {}, 0, offset[i] };
        if (!are_finite(y, lminf_n_dirs)) {
            each[i].offset = NAN;
            std::fill(y, y + lminf_n_dirs, 0.0f);
        }
        far = std::accumulate(y, y + lminf_n_dirs, far, [](float a, float b) { return std::max(a, std::fabs(b)); });
    }
    const float step = far/127.0f;
    const float inv  = step >= FLT_MIN ? 1.0f/step : 0.0f;

    scale = 0.5f*step; // as a scan counts halves of a sketch's steps

    for (int64_t i = 0; i < n; ++i) {
        int8_t bytes[lminf_n_dirs];
        for (int j = 0; j < lminf_n_dirs; ++j) {
            bytes[j] = (int8_t) ((int) (turned[i*lminf_n_dirs + j]*inv + 128.5f) - 128); // rounded; the conversion cuts
            each[i].start -= 3*bytes[j];
        }
        memcpy(each[i].x, bytes, sizeof(bytes));
    }
}

void lminf_sketch_max(const char * const * parts, int64_t n_parts, int64_t n_blocks, const lminf_sketch_queries & q, float * best) {
    lminf_get_isa().sketch_max(parts, n_parts, n_blocks, q.each.data(), q.each.size(), q.scale, best);
}

// --- principal axes -----------------------------------------------------------------------------------------------------

static double dot(const float * a, const float * b, int64_t n) {
    double res = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        res += (double) a[i]*b[i];
    }
    return res;
}

// makes the rows of v [n_rows][n] orthonormal; one that the rows before it span is replaced by a unit vector's rest
static void orthonormalize(std::vector<float> & v, int64_t n_rows, int64_t n) {
    int64_t unit = 0;
    for (int64_t r = 0; r < n_rows; ++r) {
        float * row = &v[r*n];
        for (;;) {
            const double before = std::sqrt(dot(row, row, n));
            for (int pass = 0; pass < 2; ++pass) { // once leaves rounding errors of the row's first length
                for (int64_t s = 0; s < r; ++s) {
                    const float * other = &v[s*n];
                    const float   x     = (float) dot(row, other, n);
                    for (int64_t i = 0; i < n; ++i) {
                        row[i] -= x*other[i];
                    }
                }
            }
            const double after = std::sqrt(dot(row, row, n));
            if (after > 1e-4*before) {
                for (int64_t i = 0; i < n; ++i) {
                    row[i] = (float) (row[i]/after);
                }
                break;
            }
            std::fill(row, row + n, 0.0f);
            row[unit++] = 1.0f;
        }
    }
}

// eigenvectors, in rows, of the symmetric a [n][n], of which the diagonal is left; by Jacobi's rotations
static std::vector<double> diagonalize(std::vector<double> & a, int64_t n) {
    std::vector<double> v(n*n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        v[i*n + i] = 1.0;
    }
    for (int sweep = 0; sweep < 12; ++sweep) {
        for (int64_t p = 0; p < n; ++p) {
            for (int64_t q = p + 1; q < n; ++q) {
                const double apq = a[p*n + q];
                if (apq == 0.0) {
                    continue;
                }
                const double theta = (a[q*n + q] - a[p*n + p])/(2.0*apq);
                const double t     = (theta < 0.0 ? -1.0 : 1.0)/(std::fabs(theta) + std::sqrt(theta*theta + 1.0));
                const double c     = 1.0/std::sqrt(t*t + 1.0);
                const double s     = t*c;

                const auto rotate = [&](double & x, double & y) {
                    const double x0 = x;
                    x = c*x0 - s*y;
                    y = s*x0 + c*y;
                };
                for (int64_t i = 0; i < n; ++i) {
                    rotate(a[i*n + p], a[i*n + q]);
                }
                for (int64_t i = 0; i < n; ++i) {
                    rotate(a[p*n + i], a[q*n + i]);
                    rotate(v[p*n + i], v[q*n + i]);
                }
            }
        }
    }
    return v;
}

lminf_axes lminf_find_axes(const float * k, int64_t n_rows, int64_t n_embd) {
    const int64_t n = n_embd;

    lminf_axes res;
    res.n_embd = n;
    res.mean.resize(n);
    res.axes.resize(lminf_n_dirs*n);

    std::vector<float>  x;
    std::vector<double> mean(n);
    for (int64_t r = 0; r < n_rows; ++r) {
        if (are_finite(k + r*n, n)) {
            x.insert(x.end(), k + r*n, k + (r + 1)*n);
        }
    }
    n_rows = (int64_t) x.size()/n;
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            mean[i] += x[r*n + i];
        }
    }
    for (int64_t i = 0; i < n && n_rows > 0; ++i) {
        res.mean[i] = (float) (mean[i]/n_rows);
    }
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n; ++i) {
            x[r*n + i] -= res.mean[i];
        }
    }

    // covariance; several rows at a time, as it may be larger than the first level cache
    constexpr int64_t n_at_once = 8;
    x.resize((n_rows + n_at_once - 1)/n_at_once*n_at_once*n);

    std::vector<float> cov(n*n);
    for (int64_t r = 0; r < n_rows; r += n_at_once) {
        const float * rows = &x[r*n];
        for (int64_t i = 0; i < n; ++i) {
            float * c = &cov[i*n];
            for (int64_t j = 0; j < n; ++j) {
                float sum = 0.0f;
                for (int64_t s = 0; s < n_at_once; ++s) {
                    sum += rows[s*n + i]*rows[s*n + j];
                }
                c[j] += sum;
            }
        }
    }
    for (float & c : cov) {
        c /= std::max<int64_t>(n_rows, 1);
    }

    // orthogonal iteration, on a few vectors more than are wanted: each time the error falls by (var[39]/var[31])^2
    const int64_t n_vec = std::min(lminf_n_dirs + 8, n);
    std::vector<float> v(n_vec*n), w(n_vec*n);

    uint32_t state = 1;
    for (float & a : v) {
        state = state*1664525 + 1013904223;
        a = (float) (int32_t) state;
    }
    const auto multiply = [&] { // w = v·cov
        std::fill(w.begin(), w.end(), 0.0f);
        for (int64_t r = 0; r < n_vec; ++r) {
            for (int64_t i = 0; i < n; ++i) {
                const float a = v[r*n + i];
                for (int64_t j = 0; j < n; ++j) {
                    w[r*n + j] += a*cov[i*n + j];
                }
            }
        }
    };
    orthonormalize(v, n_vec, n);
    for (int i = 0; i < 12; ++i) {
        multiply();
        v.swap(w);
        orthonormalize(v, n_vec, n);
    }

    // the axes within what they span
    multiply();
    std::vector<double> inner(n_vec*n_vec);
    for (int64_t r = 0; r < n_vec; ++r) {
        for (int64_t s = 0; s <= r; ++s) {
            inner[r*n_vec + s] = inner[s*n_vec + r] = dot(&v[r*n], &w[s*n], n);
        }
    }
    const std::vector<double> rotation = diagonalize(inner, n_vec);

    std::vector<int64_t> order(n_vec);
    for (int64_t r = 0; r < n_vec; ++r) {
        order[r] = r;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return inner[a*n_vec + a] > inner[b*n_vec + b]; });

    for (int64_t r = 0; r < std::min(lminf_n_dirs, n_vec); ++r) {
        for (int64_t s = 0; s < n_vec; ++s) {
            const float a = (float) rotation[order[r]*n_vec + s];
            for (int64_t i = 0; i < n; ++i) {
                res.axes[r*n + i] += a*v[s*n + i];
            }
        }
    }
    return res;
}

static void project(const lminf_axes & axes, const float * x, float * res) {
    for (int64_t d = 0; d < lminf_n_dirs; d += 16) {
        lminf_get_isa().project(axes.n_embd, axes.axes.data() + d*axes.n_embd, x, res + d);
    }
}

void lminf_project(const lminf_axes & axes, const float * k, float * x) {
    std::vector<float> centered(k, k + axes.n_embd);
    for (int64_t i = 0; i < axes.n_embd; ++i) {
        centered[i] -= axes.mean[i];
    }
    project(axes, centered.data(), x);
}

float lminf_project_query(const lminf_axes & axes, const float * q, float * y) {
    project(axes, q, y);
    return (float) dot(q, axes.mean.data(), axes.n_embd);
}

// --- choice of the best -------------------------------------------------------------------------------------------------

// numbers that are larger where the score is, and among equal scores where the index is lower
static uint64_t get_key(float score, uint32_t index) {
    score += 0.0f; // of the two zeros the positive one
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    bits = bits >> 31 ? ~bits : bits | 0x80000000;
    return (uint64_t) bits << 32 | ~index;
}

static float get_score(uint64_t key) {
    uint32_t bits = (uint32_t) (key >> 32);
    bits = bits >> 31 ? bits & 0x7FFFFFFF : ~bits;
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

static uint32_t get_index(uint64_t key) {
    return ~(uint32_t) key;
}

// the nth largest, from 1. Without branches that depend on the data: half of them would be mispredicted
//   scratch [2*size]
static uint64_t find_nth_largest(const uint64_t * a, int64_t size, int64_t nth, uint64_t * scratch) {
    uint64_t * above = scratch;
    uint64_t * below = scratch + size; // those that are not above the pivot

    for (int pass = 0; pass < 40 && size > 64; ++pass) {
        constexpr int n_sample = 16;
        uint64_t sample[n_sample];
        for (int i = 0; i < n_sample; ++i) {
            sample[i] = a[i*(size - 1)/(n_sample - 1)];
        }
        std::sort(sample, sample + n_sample, std::greater<uint64_t>());
        const uint64_t pivot = sample[nth*(n_sample - 1)/size];

        int64_t n_above = 0, n_below = 0;
        for (int64_t i = 0; i < size; ++i) {
            const uint64_t x = a[i];
            above[n_above] = x;
            below[n_below] = x;
            n_above += x > pivot;
            n_below += x <= pivot;
        }
        // what was chosen is read next, and its rest stays there; the other place is free
        if (nth <= n_above) {
            a    = above;
            size = n_above;
            std::swap(above, below);
        } else {
            a    = below;
            size = n_below;
            nth -= n_above;
        }
    }
    if (a != below) {
        std::copy(a, a + size, below);
    }
    std::nth_element(below, below + nth - 1, below + size, std::greater<uint64_t>());
    return below[nth - 1];
}

void lminf_best::clear(int64_t n) {
    this->n = n;
    n_keys  = 0;
    border  = get_key(n > 0 ? -INFINITY : INFINITY, 0);
    keys.resize(4*n + 512);
}

// leaves the n best, in their order
void lminf_best::cut() {
    if (n_keys < n || n == 0) {
        return;
    }
    scratch.resize(std::max<size_t>(scratch.size(), 2*n_keys));
    const uint64_t last = find_nth_largest(keys.data(), n_keys, n, scratch.data());

    uint64_t * all    = keys.data();
    int64_t    n_left = 0;
    for (int64_t i = 0; i < n_keys; ++i) {
        const uint64_t key = all[i];
        all[n_left] = key;
        n_left += key >= last;
    }
    n_keys = n_left;
    border = last;
}

void lminf_best::add(const float * scores, int64_t n_scores, int64_t first_index) {
    GGML_ASSERT(first_index >= 0 && first_index + n_scores <= UINT32_MAX);

    constexpr int64_t n_part = 512;

    for (int64_t i = 0; i < n_scores; i += n_part) {
        float   last[16];
        int32_t found[n_part + 16];

        const int64_t n         = std::min(n_part, n_scores - i);
        const float   threshold = get_score(border);

        int64_t n_found = lminf_get_isa().find(scores + i, n/16*16, threshold, found);
        if (n % 16 != 0) {
            std::fill(last, last + 16, NAN);
            std::copy(scores + i + n/16*16, scores + i + n, last);
            const int64_t n_last = lminf_get_isa().find(last, 16, threshold, found + n_found);
            for (int64_t j = 0; j < n_last; ++j) {
                found[n_found++] += n/16*16;
            }
        }
        if (n_keys + n_found >= (int64_t) keys.size()) {
            cut();
            keys.resize(std::max<size_t>(keys.size(), n_keys + n_found + 1));
        }
        uint64_t     * dst = keys.data() + n_keys;
        const uint64_t end = border;
        for (int64_t j = 0; j < n_found; ++j) {
            const uint64_t key = get_key(scores[i + found[j]], (uint32_t) (first_index + i + found[j]));
            *dst = key;
            dst += key > end;
        }
        n_keys = dst - keys.data();
    }
}

void lminf_best::add(const lminf_best & other) {
    for (int64_t i = 0; i < other.n_keys; ++i) {
        if (n_keys == (int64_t) keys.size()) {
            cut();
            keys.resize(std::max<size_t>(keys.size(), n_keys + 1));
        }
        keys[n_keys] = other.keys[i];
        n_keys += keys[n_keys] > border;
    }
}

const std::vector<lminf_best::entry> & lminf_best::finish() {
    cut();
    found.clear();
    for (int64_t i = 0; i < n_keys; ++i) {
        found.emplace_back(get_index(keys[i]), get_score(keys[i]));
    }
    if (!std::is_sorted(found.begin(), found.end())) { // they are if they came in order
        std::sort(found.begin(), found.end());
    }
    return found;
}
