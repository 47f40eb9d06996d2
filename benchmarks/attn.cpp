// The fused attention beside stock flash attention, alone: GGML_OP_LMINF_ATTN and GGML_OP_FLASH_ATTN_EXT on the same K, V
//
//   bench-attn [device] [--threads N] [--rounds N] [--shape NAME]
//
// Both run alternately; a figure is the median of the rounds, a ratio the median of the ratios within a round (smallest
// and largest beside it). GB/s counts K and V once. Each graph holds several layers with memory of their own, as in a
// model, so that the caches of the processor don't hold what a model would have to fetch.

#include "lminf-attn.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct shape {
    const char * name;
    int32_t      n_embd_head;
    int32_t      n_head;
    int32_t      n_head_kv;
};

static const shape SHAPES[] = {
    { "Llama-3.2-1B", 64,  32, 8  },
    { "Qwen3-0.6B",   128, 16, 8  },
    { "Llama-2-7B",   128, 32, 32 },
};

static constexpr int32_t N_LAYER = 8;

static std::mt19937 rng(std::random_device{}());

static void fill(ggml_tensor * t, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);

    std::vector<float> data(ggml_nelements(t));
    for (auto & x : data) {
        x = normal(rng);
    }
    std::vector<char> res(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, data.data(), res.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
    ggml_backend_tensor_set(t, res.data(), 0, res.size());
}

// N_LAYER attentions over n_kv cells, all of them open, by one operation or the other
class problem {
public:
    problem(ggml_backend_t backend, const shape & s, ggml_type type, int32_t n_q, int32_t n_kv, int32_t n_sink, bool flash) : backend(backend) {
        ctx = ggml_init({ 256*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
        gf  = ggml_new_graph(ctx);

        std::vector<ggml_tensor *> random;
        const auto rows = [&](ggml_type t, int64_t n_head, int64_t n) {
            ggml_tensor * all = ggml_new_tensor_3d(ctx, t, s.n_embd_head, n_head, n);
            random.push_back(all);
            return ggml_permute(ctx, all, 0, 2, 1, 3);
        };

        ggml_tensor * mask = ggml_new_tensor_2d(ctx, flash ? GGML_TYPE_F16 : GGML_TYPE_F32, n_sink + n_kv, n_q);
        const float scale = 1.0f/sqrtf((float) s.n_embd_head);

        for (int32_t il = 0; il < N_LAYER; ++il) {
            ggml_tensor * q = rows(GGML_TYPE_F32, s.n_head, n_q);
            ggml_tensor * k = rows(type, s.n_head_kv, n_kv);
            ggml_tensor * v = rows(type, s.n_head_kv, n_kv);
            if (flash) {
                res.push_back(ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f));
                ggml_flash_attn_ext_set_prec(res.back(), GGML_PREC_F32);
            } else {
                ggml_tensor * q_sink = n_sink > 0 ? rows(GGML_TYPE_F32, s.n_head, n_q) : nullptr;
                ggml_tensor * k_sink = n_sink > 0 ? rows(GGML_TYPE_F16, s.n_head_kv, n_sink) : nullptr;
                ggml_tensor * v_sink = n_sink > 0 ? rows(GGML_TYPE_F16, s.n_head_kv, n_sink) : nullptr;
                res.push_back(ggml_lminf_attn(ctx, q, k, v, mask, nullptr, q_sink, k_sink, v_sink, scale, 0.0f, 0.0f));
            }
            ggml_build_forward_expand(gf, res.back());
        }

        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        ggml_backend_buffer_clear(buffer, 0);
        for (ggml_tensor * t : random) {
            fill(t, 1.0f);
        }
        n_bytes = 2.0*N_LAYER*n_kv*ggml_row_size(type, s.n_embd_head)*s.n_head_kv;
    }

    ~problem() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    problem(const problem &) = delete;

    bool is_supported() const { return ggml_backend_supports_op(backend, res[0]); }

    // microseconds for one layer
    double run(int n) {
        const int64_t t0 = ggml_time_us();
        for (int i = 0; i < n; ++i) {
            ggml_backend_graph_compute_async(backend, gf);
        }
        ggml_backend_synchronize(backend);
        return (double) (ggml_time_us() - t0)/n/N_LAYER;
    }

    double get_gb_per_layer() const { return n_bytes/N_LAYER*1e-9; }

private:
    ggml_backend_t        backend;
    ggml_backend_buffer_t buffer;

    ggml_context * ctx;
    ggml_cgraph  * gf;

    std::vector<ggml_tensor *> res;

    double n_bytes;
};

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size()/2];
}

static void bench(ggml_backend_t backend, const shape & s, ggml_type type, int32_t n_q, int32_t n_kv, int n_rounds) {
    problem stock (backend, s, type, n_q, n_kv, 0,  true);
    problem fused (backend, s, type, n_q, n_kv, 16, false);
    problem window(backend, s, type, n_q, n_kv, 0,  false);

    if (!stock.is_supported() || !fused.is_supported()) {
        return;
    }

    const double first  = fused.run(1);
    const int    n_reps = std::max(1, std::min(200, (int) (20000.0/first/N_LAYER)));
    stock.run(1);
    window.run(1);

    std::vector<double> t_stock, t_fused, ratio, sinks;
    for (int i = 0; i < n_rounds; ++i) {
        t_stock.push_back(stock.run(n_reps));
        t_fused.push_back(fused.run(n_reps));
        ratio.push_back(t_stock.back()/t_fused.back());
        sinks.push_back(t_fused.back()/window.run(n_reps) - 1.0);
    }

    printf("| %-12s | %-4s | %3d | %5d | %9.1f | %9.1f | %6.1f | %5.2f (%.2f-%.2f) | %+5.1f %% |\n", s.name, ggml_type_name(type), n_q, n_kv,
            median(t_stock), median(t_fused), fused.get_gb_per_layer()/median(t_fused)*1e6,
            median(ratio), *std::min_element(ratio.begin(), ratio.end()), *std::max_element(ratio.begin(), ratio.end()), 100.0*median(sinks));
    fflush(stdout);
}

int main(int argc, char ** argv) {
    int          n_threads = 2;
    int          n_rounds  = 9;
    const char * name      = nullptr;
    const char * only      = nullptr;

    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) {
            n_rounds = std::max(1, atoi(argv[++i]));
        } else if (strcmp(argv[i], "--shape") == 0 && i + 1 < argc) {
            only = argv[++i];
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
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        ggml_backend_cpu_set_n_threads(backend, n_threads);
    }
    ggml_time_init();

    printf("%s, %d threads where it is a CPU, median of %d rounds, microseconds per layer\n\n", ggml_backend_dev_description(dev), n_threads, n_rounds);
    printf("| shape        | KV   | n_q |  n_kv |     flash |     fused |   GB/s | flash/fused       | 16 sinks |\n");
    printf("|--------------|------|----:|------:|----------:|----------:|-------:|-------------------|---------:|\n");

    for (const auto & s : SHAPES) {
        if (only && strcmp(only, s.name) != 0) {
            continue;
        }
        for (int32_t n_q : { 1, 4, 512 }) {
            for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                for (int32_t n_kv : { 1024, 4096, 16384 }) {
                    if (n_q <= 4 || n_kv <= 4096) {
                        bench(backend, s, type, n_q, n_kv, n_q <= 4 ? n_rounds : std::min(n_rounds, 3));
                    }
                }
            }
        }
    }

    ggml_backend_free(backend);
    return 0;
}
