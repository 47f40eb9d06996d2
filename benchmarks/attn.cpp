// The fused attention beside stock flash attention, alone: GGML_OP_LMINF_ATTN and GGML_OP_FLASH_ATTN_EXT on the same K, V
//
//   bench-attn [device] [--threads N] [--rounds N] [--json] [--shape NAME] [--kv TYPE] [--queries N] [--cells N]
//
// The last four measure only what they name.
//
// Both run alternately; a figure is the median of the rounds, a ratio the median of the ratios within a round (smallest
// and largest beside it). GB/s counts K and V once. Each graph holds several layers with memory of their own, as in a
// model, so that the caches of the processor don't hold what a model would have to fetch; on a GPU as many as it takes to
// fill half a gigabyte. To compare with, there are two more figures: a copy, bytes read and written, and decoding's
// product of Q4_0 matrices and a vector, bytes of the matrices.
//
// --json prints one object a line: {"what": "copy" or "product", "gb_per_s"} or {"what": "attention", "shape", "kv", "n_q",
// "n_kv", "flash_us", "fused_us", "gb", "tflop", "ratio", "ratio_min", "ratio_max", "sinks"}; flash_us null where there is none.

#include "lminf-attn.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

struct shape {
    const char * name;
    int32_t      n_embd_head_k;
    int32_t      n_embd_head_v;
    int32_t      n_head;
    int32_t      n_head_kv;
    bool         v_in_k; // V: the first elements of K's rows

    bool is_wide() const { return n_embd_head_k > 256; }
};

static const shape SHAPES[] = {
    { "Llama-3.2-1B",     64,  64,  32, 8,  false },
    { "Qwen3-0.6B",       128, 128, 16, 8,  false },
    { "Llama-2-7B",       128, 128, 32, 32, false },
    { "Gemma-4-E4B",      512, 512, 8,  2,  false }, // its layers that attend to everything
    { "DeepSeek-V2-Lite", 576, 512, 16, 1,  true  }, // multi-head latent attention
};

static bool is_cpu(ggml_backend_t backend) {
    return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

static constexpr int64_t N_RANDOM = 1 << 20;

// as many random elements in rows of this type and length, made once
static const std::vector<char> & random_rows(ggml_type type, int64_t n_embd) {
    static std::map<std::pair<ggml_type, int64_t>, std::vector<char>> made;

    std::vector<char> & res = made[{ type, n_embd }];
    if (res.empty()) {
        std::mt19937 rng(std::random_device{}());
        std::normal_distribution<float> normal;

        const int64_t n_rows = (N_RANDOM + n_embd - 1)/n_embd;

        std::vector<float> data(n_rows*n_embd);
        for (auto & x : data) {
            x = normal(rng);
        }
        res.resize(n_rows*ggml_row_size(type, n_embd));
        ggml_quantize_chunk(type, data.data(), res.data(), 0, n_rows, n_embd, nullptr);
    }
    return res;
}

// over and over
static void fill(ggml_tensor * t) {
    const std::vector<char> & rows = random_rows(t->type, std::min(t->ne[0], N_RANDOM));
    for (size_t i = 0; i < ggml_nbytes(t); i += rows.size()) {
        ggml_backend_tensor_set(t, rows.data(), i, std::min(rows.size(), ggml_nbytes(t) - i));
    }
}

// a graph that is computed over and over
class work {
public:
    work(ggml_backend_t backend) : backend(backend) {
        ctx = ggml_init({ 4096*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        gf  = ggml_new_graph(ctx);
    }

    ~work() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    work(const work &) = delete;

    bool is_supported() const { return ggml_backend_supports_op(backend, ggml_graph_node(gf, -1)); }

    // microseconds for one of n computations
    double run(int n) {
        const int64_t t0 = ggml_time_us();
        for (int i = 0; i < n; ++i) {
            ggml_backend_graph_compute_async(backend, gf);
        }
        ggml_backend_synchronize(backend);
        return (double) (ggml_time_us() - t0)/n;
    }

    // computations that take 20 ms
    int get_n_reps() {
        run(1);
        return std::max(1, std::min(200, (int) (20000.0/run(3))));
    }

protected:
    void allocate(const std::vector<ggml_tensor *> & random) {
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        if (!buffer) {
            fprintf(stderr, "error: the device has not enough memory\n");
            exit(1);
        }
        for (ggml_tensor * t : random) {
            fill(t);
        }
    }

    ggml_backend_t        backend;
    ggml_backend_buffer_t buffer = nullptr;

    ggml_context * ctx;
    ggml_cgraph  * gf;
};

static constexpr int64_t N_BYTES = 512ll*1024*1024; // more than any cache

class copy : public work {
public:
    copy(ggml_backend_t backend) : work(backend) {
        ggml_tensor * from = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, N_BYTES/sizeof(float));
        ggml_tensor * to   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, N_BYTES/sizeof(float));
        ggml_build_forward_expand(gf, ggml_cpy(ctx, from, to));
        allocate({ from });
    }

    double get_gb() const { return 2*N_BYTES*1e-9; }
};

// the product of Llama-3.2-1B's feed-forward matrices and a vector
class product : public work {
public:
    product(ggml_backend_t backend) : work(backend) {
        std::vector<ggml_tensor *> random;
        ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 2048);
        random.push_back(x);
        while (n_bytes < N_BYTES) {
            random.push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_Q4_0, 2048, 8192));
            n_bytes += ggml_nbytes(random.back());
            ggml_build_forward_expand(gf, ggml_mul_mat(ctx, random.back(), x));
        }
        allocate(random);
    }

    double get_gb() const { return n_bytes*1e-9; }

private:
    int64_t n_bytes = 0;
};

// attentions over n_kv cells, all of them open, by one operation or the other, one for each layer
class attention : public work {
public:
    attention(ggml_backend_t backend, const shape & s, ggml_type type, int32_t n_q, int32_t n_kv, int32_t n_sink, bool flash) : work(backend) {
        const int64_t n_elements = (int64_t) s.n_head_kv*(s.n_embd_head_k + (s.v_in_k ? 0 : s.n_embd_head_v));
        n_bytes = ggml_row_size(type, n_elements)*n_kv;
        n_flop  = 2.0*s.n_head*(s.n_embd_head_k + s.n_embd_head_v)*n_q*n_kv;
        n_layer = is_cpu(backend) ? 8 : std::max<int64_t>(4, std::min<int64_t>(64, N_BYTES/n_bytes));

        std::vector<ggml_tensor *> random;
        const auto rows = [&](ggml_type t, int64_t n_embd_head, int64_t n_head, int64_t n) {
            ggml_tensor * all = ggml_new_tensor_3d(ctx, t, n_embd_head, n_head, n);
            random.push_back(all);
            return ggml_permute(ctx, all, 0, 2, 1, 3);
        };
        const auto values = [&](ggml_type t, ggml_tensor * k, int64_t n) {
            if (!s.v_in_k) {
                return rows(t, s.n_embd_head_v, s.n_head_kv, n);
            }
            return ggml_view_4d(ctx, k, s.n_embd_head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
        };

        ggml_tensor * mask = ggml_new_tensor_2d(ctx, flash ? GGML_TYPE_F16 : GGML_TYPE_F32, n_sink + n_kv, n_q);
        const float scale = 1.0f/sqrtf((float) s.n_embd_head_k);

        for (int32_t il = 0; il < n_layer; ++il) {
            ggml_tensor * q = rows(GGML_TYPE_F32, s.n_embd_head_k, s.n_head, n_q);
            ggml_tensor * k = rows(type, s.n_embd_head_k, s.n_head_kv, n_kv);
            ggml_tensor * v = values(type, k, n_kv);
            ggml_tensor * res;
            if (flash) {
                res = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
                ggml_prec_set_acc(res, GGML_PREC_F32);
            } else {
                ggml_tensor * q_sink = n_sink > 0 ? rows(GGML_TYPE_F32, s.n_embd_head_k, s.n_head, n_q) : nullptr;
                ggml_tensor * k_sink = n_sink > 0 ? rows(GGML_TYPE_F16, s.n_embd_head_k, s.n_head_kv, n_sink) : nullptr;
                ggml_tensor * v_sink = n_sink > 0 ? values(GGML_TYPE_F16, k_sink, n_sink) : nullptr;
                res = ggml_lminf_attn(ctx, q, k, v, mask, nullptr, q_sink, k_sink, v_sink, scale, 0.0f, 0.0f);
            }
            ggml_build_forward_expand(gf, res);
        }

        allocate(random);

        std::vector<char> open(ggml_nbytes(mask));
        ggml_backend_tensor_set(mask, open.data(), 0, open.size());
    }

    // microseconds for one layer
    double run_layer(int n) { return run(n)/n_layer; }

    double get_gb_per_layer()    const { return n_bytes*1e-9; }
    double get_tflop_per_layer() const { return n_flop*1e-12; }

private:
    int64_t n_bytes; // of K and V of a layer
    double  n_flop;
    int64_t n_layer;
};

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size()/2];
}

static bool as_json = false;

template <typename T>
static void bench_machine(ggml_backend_t backend, const char * what, int n_rounds) {
    T it(backend);
    if (!it.is_supported()) {
        return;
    }
    const int n_reps = it.get_n_reps();

    std::vector<double> gb_per_s;
    for (int i = 0; i < n_rounds; ++i) {
        gb_per_s.push_back(it.get_gb()/it.run(n_reps)*1e6);
    }
    printf(as_json ? "{\"what\": \"%s\", \"gb_per_s\": %.1f}\n" : "%s: %.1f GB/s\n", what, median(gb_per_s));
    fflush(stdout);
}

static void bench(ggml_backend_t backend, const shape & s, ggml_type type, int32_t n_q, int32_t n_kv, int n_rounds) {
    attention stock (backend, s, type, n_q, n_kv, 0,  true);
    attention fused (backend, s, type, n_q, n_kv, 16, false);
    attention window(backend, s, type, n_q, n_kv, 0,  false);

    const bool has_stock = stock.is_supported();
    if (!fused.is_supported() || (!has_stock && is_cpu(backend))) {
        return;
    }

    const int n_reps = fused.get_n_reps();
    if (has_stock) {
        stock.run(3);
    }
    window.run(3);

    std::vector<double> t_stock, t_fused, ratio, sinks;
    for (int i = 0; i < n_rounds; ++i) {
        t_stock.push_back(has_stock ? stock.run_layer(n_reps) : NAN);
        t_fused.push_back(fused.run_layer(n_reps));
        ratio.push_back(t_stock.back()/t_fused.back());
        sinks.push_back(t_fused.back()/window.run_layer(n_reps) - 1.0);
    }

    const double gb = fused.get_gb_per_layer();
    const double least = *std::min_element(ratio.begin(), ratio.end());
    const double most  = *std::max_element(ratio.begin(), ratio.end());
    if (as_json) {
        printf("{\"what\": \"attention\", \"shape\": \"%s\", \"kv\": \"%s\", \"n_q\": %d, \"n_kv\": %d, \"fused_us\": %.2f, \"gb\": %.6f, \"tflop\": %.6f, ",
                s.name, ggml_type_name(type), n_q, n_kv, median(t_fused), gb, fused.get_tflop_per_layer());
        if (has_stock) {
            printf("\"flash_us\": %.2f, \"ratio\": %.3f, \"ratio_min\": %.3f, \"ratio_max\": %.3f, ", median(t_stock), median(ratio), least, most);
        } else {
            printf("\"flash_us\": null, ");
        }
        printf("\"sinks\": %.3f}\n", median(sinks));
    } else {
        printf("| %-16s | %-4s | %3d | %5d | %9.1f | %9.1f | %6.1f | %5.2f (%.2f-%.2f) | %+5.1f %% |\n", s.name, ggml_type_name(type), n_q, n_kv,
                median(t_stock), median(t_fused), gb/median(t_fused)*1e6, median(ratio), least, most, 100.0*median(sinks));
    }
    fflush(stdout);
}

int main(int argc, char ** argv) {
    int          n_threads = 2;
    int          n_rounds  = 9;
    const char * name      = nullptr;
    const char * only      = nullptr;
    const char * only_kv   = nullptr;
    int          only_q    = 0;
    int          only_n_kv = 0;

    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) {
            n_rounds = std::max(1, atoi(argv[++i]));
        } else if (strcmp(argv[i], "--shape") == 0 && i + 1 < argc) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--kv") == 0 && i + 1 < argc) {
            only_kv = argv[++i];
        } else if (strcmp(argv[i], "--queries") == 0 && i + 1 < argc) {
            only_q = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--cells") == 0 && i + 1 < argc) {
            only_n_kv = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--json") == 0) {
            as_json = true;
        } else {
            name = argv[i];
        }
    }

    ggml_backend_dev_t dev = name ? ggml_backend_dev_by_name(name) : ggml_backend_dev_get(0);
    if (!dev) {
        fprintf(stderr, "error: there is no device %s\n", name);
        return 1;
    }
    ggml_backend_t backend = ggml_backend_dev_init(dev, nullptr);
    if (is_cpu(backend)) {
        ggml_backend_cpu_set_n_threads(backend, n_threads);
    }
    ggml_time_init();

    if (!as_json) {
        printf("%s, %d threads where it is a CPU, median of %d rounds, microseconds per layer\n\n", ggml_backend_dev_description(dev), n_threads, n_rounds);
    }
    bench_machine<copy>   (backend, "copy",    n_rounds);
    bench_machine<product>(backend, "product", n_rounds);
    if (!as_json) {
        printf("\n| shape            | KV   | n_q |  n_kv |     flash |     fused |   GB/s | flash/fused       | 16 sinks |\n");
        printf("|------------------|------|----:|------:|----------:|----------:|-------:|-------------------|---------:|\n");
    }

    for (const auto & s : SHAPES) {
        if (only ? strcmp(only, s.name) != 0 : s.is_wide() && is_cpu(backend)) {
            continue;
        }
        for (int32_t n_q : { 1, 4, 512 }) {
            for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                for (int32_t n_kv : { 1024, 4096, 16384 }) {
                    const bool is_asked = (!only_kv || strcmp(only_kv, ggml_type_name(type)) == 0) &&
                        (only_q == 0 || only_q == n_q) && (only_n_kv == 0 || only_n_kv == n_kv);
                    if (is_asked && (n_q <= 4 || n_kv <= 4096 || !is_cpu(backend))) {
                        bench(backend, s, type, n_q, n_kv, n_q <= 4 ? n_rounds : std::min(n_rounds, 3));
                    }
                }
            }
        }
    }

    ggml_backend_free(backend);
    return 0;
}
