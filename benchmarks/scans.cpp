// The loops of recall (native/src/lminf-sketch.h and lminf-rows.h) over the keys of a 1B model: 16 layers of 8 KV heads of 64
// elements, 4 queries each
//
//   bench-scans [--tokens N] [--threads N] [--rounds N] [--isa NAME]
//
// A figure is the processor time of the busiest thread for all layers, added up from the best of the rounds for each head. Data lies in memory once for every layer and head, up to 512 MiB; what
// would be more is scanned again from the start. GB/s counts keys or sketches, once per scan.

#include "lminf-isa.h"
#include "lminf-rows.h"
#include "lminf-sketch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

static constexpr int64_t N_LAYER   = 16;
static constexpr int64_t N_HEAD_KV = 8;
static constexpr int64_t N_EMBD    = 64;
static constexpr int64_t N_CHUNK   = 128; // blocks that are scanned at a time: their scores stay in the caches

static int n_threads = 2;
static int n_rounds  = 15;

static std::mt19937 rng(std::random_device{}());

// processor time of this thread: others may use the cores as well
static double now() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
#else
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

static std::vector<float> random_floats(int64_t n) {
    std::normal_distribution<float> normal;

    std::vector<float> res(n);
    for (auto & x : res) {
        x = normal(rng);
    }
    return res;
}

// seconds for work(i) of all i < n, split among the threads: of each n_together of them the best of the rounds
static double measure(int64_t n, int64_t n_together, const std::function<void(int, int64_t)> & work) {
    std::vector<double> best(n, INFINITY);
    std::vector<double> total(n_threads, 0.0);

    for (int round = 0; round < n_rounds; ++round) {
        std::atomic<int> n_ready{0};

        const auto run = [&](int ith) {
            n_ready++;
            while (n_ready < n_threads) {
                std::this_thread::yield();
            }
            const int64_t end = n*(ith + 1)/n_threads;
            for (int64_t i = n*ith/n_threads; i < end; ) {
                const int64_t first = i;
                const double  start = now();
                for (; i < end && i < first + n_together; ++i) {
                    work(ith, i);
                }
                best[first] = std::min(best[first], now() - start);
            }
        };
        std::vector<std::thread> threads;
        for (int ith = 1; ith < n_threads; ++ith) {
            threads.emplace_back(run, ith);
        }
        run(0);
        for (auto & thread : threads) {
            thread.join();
        }
    }
    for (int ith = 0; ith < n_threads; ++ith) {
        for (int64_t i = n*ith/n_threads; i < n*(ith + 1)/n_threads; ++i) {
            total[ith] += std::isfinite(best[i]) ? best[i] : 0.0;
        }
    }
    return *std::max_element(total.begin(), total.end());
}

// blocks of one head after another, copies of the first
class archive {
public:
    archive(int64_t n_blocks, size_t size, const std::function<void(char *, int64_t)> & store) : n_blocks(n_blocks), size(size) {
        n_heads = std::max<int64_t>(1, std::min<int64_t>(N_LAYER*N_HEAD_KV, (512 << 20)/(n_blocks*size)));
        const size_t page = 2 << 20; // as the archive: in huge pages where the system has them
        memory.reset(new char[n_heads*n_blocks*size + page]);
        data = memory.get() + (page - (uintptr_t) memory.get() % page) % page;
#if defined(MADV_HUGEPAGE)
        madvise(data, n_heads*n_blocks*size, MADV_HUGEPAGE);
#endif

        for (int64_t i = 0; i < n_blocks*lminf_n_lanes; ++i) {
            store(data + i/lminf_n_lanes*size, i % lminf_n_lanes);
        }
        for (int64_t head = 1; head < n_heads; ++head) {
            memcpy(data + head*n_blocks*size, data, n_blocks*size);
        }
    }

    const char * get(int64_t head, int64_t block) const { return data + (head % n_heads*n_blocks + block)*size; }

private:
    int64_t n_blocks;
    int64_t n_heads;
    size_t  size;

    std::unique_ptr<char[]> memory;
    char                  * data;
};

static void print(const char * isa, const std::string & what, int64_t n_q, double seconds, double bytes) {
    printf("| %-12s | %-24s | %4d | %9.2f | %6.1f |\n", isa, what.c_str(), (int) n_q, 1e3*seconds, 1e-9*bytes/seconds);
    fflush(stdout);
}

int main(int argc, char ** argv) {
    int64_t      n_tokens = 100000;
    const char * only     = nullptr;

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--tokens") == 0) {
            n_tokens = std::max(1, atoi(argv[i + 1]));
        } else if (strcmp(argv[i], "--threads") == 0) {
            n_threads = std::max(1, atoi(argv[i + 1]));
        } else if (strcmp(argv[i], "--rounds") == 0) {
            n_rounds = std::max(1, atoi(argv[i + 1]));
        } else if (strcmp(argv[i], "--isa") == 0) {
            only = argv[i + 1];
        }
    }

    const int64_t n_blocks = (n_tokens + lminf_n_lanes - 1)/lminf_n_lanes;
    const int64_t n_chunks = (n_blocks + N_CHUNK - 1)/N_CHUNK;
    const int64_t n_work   = N_LAYER*N_HEAD_KV*n_chunks;

    const auto keys = random_floats(1 << 20);
    const auto q    = random_floats(128*N_EMBD);

    printf("%d tokens, %d threads, the best of %d rounds\n\n", (int) n_tokens, n_threads, n_rounds);
    printf("| set          | scan                     |  n_q |        ms |   GB/s |\n");
    printf("|--------------|--------------------------|-----:|----------:|-------:|\n");

    {
        const archive sketches(n_blocks, lminf_sketch_size(), [&](char * block, int64_t lane) {
            lminf_sketch_store(block, lane, &keys[rng() % (keys.size() - N_EMBD)]);
        });
        const double bytes = (double) N_LAYER*N_HEAD_KV*n_blocks*lminf_sketch_size();

        for (const char * isa : lminf_isa_names()) {
            if (only && strcmp(only, isa) != 0) {
                continue;
            }
            lminf_set_isa(isa);

            std::vector<lminf_sketch_query> queries;
            for (int64_t i = 0; i < 128; ++i) {
                queries.emplace_back(&q[i*lminf_n_dirs], keys[i]);
            }
            for (int64_t n_q : { 4, 128 }) {
                for (const bool choose : { false, true }) {
                    std::vector<std::vector<float>> best(n_threads, std::vector<float>(N_CHUNK*lminf_n_lanes));
                    std::vector<lminf_best>         found(n_threads, lminf_best(1024));

                    const double t = measure(n_work, n_chunks, [&](int ith, int64_t i) {
                        const int64_t first = i % n_chunks*N_CHUNK;
                        const int64_t n     = std::min(N_CHUNK, n_blocks - first);
                        std::fill(best[ith].begin(), best[ith].end(), -INFINITY);
                        lminf_sketch_max(sketches.get(i/n_chunks, first), n, queries.data(), n_q, best[ith].data());
                        if (choose) {
                            if (first == 0) {
                                found[ith].clear(1024);
                            }
                            found[ith].add(best[ith].data(), n*lminf_n_lanes, first*lminf_n_lanes);
                        }
                    });
                    print(isa, choose ? "sketch, best 1024" : "sketch", n_q, t, bytes);
                }
            }
        }
    }

    // rows of all heads, some of them after a scan: 256 of 2048 at a time, a token's heads one after the other
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16, GGML_TYPE_F32 }) {
        constexpr int64_t n_rows = 256, n_there = 2048;

        const size_t size   = ggml_row_size(type, N_EMBD);
        const size_t stride = size*N_HEAD_KV;

        std::vector<char> rows(n_there*stride);
        for (int64_t i = 0; i < n_there*N_HEAD_KV; ++i) {
            lminf_row_store(type, &keys[rng() % (keys.size() - N_EMBD)], N_EMBD, &rows[i*size]);
        }
        std::vector<const char *> those;
        for (int64_t i = 0; i < n_there; ++i) {
            those.push_back(&rows[i*stride]);
        }
        std::shuffle(those.begin(), those.end(), rng);
        for (int64_t i = 0; i < n_there; i += n_rows) {
            std::sort(those.begin() + i, those.begin() + i + n_rows);
        }

        for (const char * isa : lminf_isa_names()) {
            if (only && strcmp(only, isa) != 0) {
                continue;
            }
            lminf_set_isa(isa);

            for (int64_t n_q : { 4, 128 }) {
                std::vector<std::vector<float>> scores(n_threads, std::vector<float>(n_q*n_rows));

                const int64_t n = N_LAYER*n_there/n_rows;
                print(isa, std::string("2048 rows ") + ggml_type_name(type), n_q, measure(n, n_there/n_rows, [&](int ith, int64_t i) {
                    for (int64_t h = 0; h < N_HEAD_KV; ++h) {
                        lminf_rows_dot(type, N_EMBD, &those[i*n_rows % n_there], h*size, n_rows, q.data(), n_q, scores[ith].data());
                    }
                }), (double) N_LAYER*n_there*stride);
            }
            std::vector<std::vector<ggml_fp16_t>> halves(n_threads, std::vector<ggml_fp16_t>(N_EMBD*N_HEAD_KV));
            print(isa, std::string("2048 rows to f16, ") + ggml_type_name(type), 0, measure(N_LAYER*n_there, n_there, [&](int ith, int64_t i) {
                lminf_row_load(type, those[i % n_there], N_EMBD*N_HEAD_KV, GGML_TYPE_F16, halves[ith].data());
            }), (double) N_LAYER*n_there*stride);
        }
    }

    for (const char * isa : lminf_isa_names()) {
        if (only && strcmp(only, isa) != 0) {
            continue;
        }
        lminf_set_isa(isa);

        constexpr int64_t n = 256, n_all = 1024;
        std::vector<std::vector<float>> x(n_threads, std::vector<float>(n*n_all)), votes(n_threads, std::vector<float>(n));
        print(isa, "exp of 4M scores", 0, measure(16, 16, [&](int ith, int64_t) {
            memcpy(x[ith].data(), keys.data(), n*n_all*sizeof(float));
            for (int64_t i = 0; i < n_all; ++i) {
                float max;
                lminf_exp(&x[ith][i*n], n, max);
            }
        }), 16.0*n*n_all*sizeof(float));
        print(isa, "4M scores added", 0, measure(16, 16, [&](int ith, int64_t) {
            for (int64_t i = 0; i < n_all; ++i) {
                lminf_add_scaled(votes[ith].data(), 0.5f, &x[ith][i*n], n);
            }
        }), 16.0*n*n_all*sizeof(float));
    }
    return 0;
}
