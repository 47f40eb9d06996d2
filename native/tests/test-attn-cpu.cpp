// the CPU kernels of GGML_OP_LMINF_ATTN as compiled for one instruction set, against float64, by 1 to 5 threads
//
//   test-attn-cpu-NAME [PERCENT]   of the cases in attn_grid, default 100

#include "attn-cases.h"

#include "lminf-attn-cpu.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <condition_variable>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

// ggml's threads are not here: ours meet at this barrier
struct ggml_threadpool {
    std::mutex              mutex;
    std::condition_variable all_here;

    int n_threads;
    int n_waiting = 0;
    int n_round   = 0;
};

extern "C" void ggml_barrier(ggml_threadpool * pool) {
    std::unique_lock<std::mutex> lock(pool->mutex);

    const int round = pool->n_round;
    if (++pool->n_waiting == pool->n_threads) {
        pool->n_waiting = 0;
        pool->n_round++;
        pool->all_here.notify_all();
    } else {
        pool->all_here.wait(lock, [&] { return pool->n_round != round; });
    }
}

static bool compute(ggml_tensor * op) {
    static int n = 0;

    ggml_threadpool pool;
    pool.n_threads = 1 + n++ % 5;

    // exactly as large as promised, and poisoned; room behind it would hide a write past its end from the sanitizers
    const size_t size = ggml_lminf_attn_work_size(op, pool.n_threads);
    std::vector<float> work(size/sizeof(float), NAN);

    const auto run = [&](int ith) {
        const ggml_compute_params params = { ith, pool.n_threads, size, work.data(), &pool, false };
        ggml_compute_forward_lminf_attn(&params, op);
    };

    std::vector<std::thread> threads;
    for (int ith = 1; ith < pool.n_threads; ++ith) {
        threads.emplace_back(run, ith);
    }
    run(0);
    for (auto & thread : threads) {
        thread.join();
    }
    return true;
}

// a query that is not a number must not get an answer that looks like one, and nobody else's may change
static bool nan_stays_nan(const std::vector<attn_case> & cases, std::mt19937 & rng) {
    int n = 0;
    for (attn_case c : cases) {
        c.mask = ATTN_MASK_OPEN;
        if (rng() % 8 != 0 || c.n_kv == 0) {
            continue;
        }
        attn_problem  problem(c, rng);
        ggml_tensor * op = problem.op();

        // the first query of the first head
        ((float *) op->src[LMINF_ATTN_Q]->data)[rng() % c.n_embd_head_k] = NAN;
        compute(op);

        const float * res = (const float *) op->data;
        for (int64_t i = 0; i < ggml_nelements(op); ++i) {
            if (std::isnan(res[i]) != (i < c.n_embd_head_v)) {
                printf("%s: FAILED, NaN in one query: %s\n", LMINF_TEST_NAME, c.str().c_str());
                return false;
            }
        }
        ++n;
    }
    printf("%s: NaN in one query, %d run\n", LMINF_TEST_NAME, n);
    return true;
}

int main(int argc, char ** argv) {
    std::mt19937 rng = attn_seed();

    const uint32_t percent = argc > 1 ? atoi(argv[1]) : 100;

    auto cases = attn_grid(rng);
    cases.erase(std::remove_if(cases.begin(), cases.end(), [&](const attn_case &) { return rng() % 100 >= percent; }), cases.end());

    const int status = attn_run(LMINF_TEST_NAME, cases, rng, compute, attn_limit_i16);

    return status || !nan_stays_nan(cases, rng);
}
