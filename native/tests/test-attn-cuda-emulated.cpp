// GGML_OP_LMINF_ATTN's CUDA kernels, run on the CPU, against float64: for machines without a GPU (with one: test-attn)
//
//   c++ -O2 -std=c++17 -I native/kernels -I native/tests -I $GGML/include -I $GGML/src -Wno-unknown-pragmas
//       native/tests/{test-attn-cuda-emulated,attn-cases,emulate/lanes}.cpp native/kernels/lminf-attn.cpp -lggml-base
//
// Half a minute on one core. With -fsanitize=undefined the alignment of vector loads is tested, too.

#include "attn-cases.h"

#include "emulate/cuda.h"

#include "../kernels/cuda/lminf-attn-launch.cuh"

#include <array>
#include <cstdio>
#include <map>
#include <string>

static std::mt19937 device_rng; // of the order in which lanes run

static std::map<std::string, int> n_launches;

static bool compute(ggml_tensor * op) {
    const lminf_attn_args args    = lminf_attn_get_args(op);
    const bool            is_wide = lminf_is_wide(args.n_embd_head_k, args.n_embd_head_v);

    // devices small and large: different numbers of splits, and different sizes of tiles
    static int n_cases[2] = {};
    const int n_sm       = 2 << device_rng() % 8;
    const int max_shared = 1024*std::array<int, 3>{ 64, 99, 227 }[n_cases[is_wide]++ % 3];

    GGML_ASSERT(lminf_attn_is_valid(op) && lminf_cuda_can(op, max_shared));

    const lminf_cuda_plan plan = lminf_cuda_get_plan(args, n_sm, max_shared);
    GGML_ASSERT(plan.n_shared <= max_shared);

    std::vector<float> scratch(plan.n_scratch, NAN);

    lminf_cuda_launch(plan, scratch.data(), [&](auto * kernel, const uint32_t * grid, int n_threads, int n_shared, const lminf_cuda_params & params) {
        // a little more shared memory than the kernel asked for must stay as it was
        constexpr int N_MORE = 256;
        lanes::launch({ grid[0], grid[1], grid[2] }, { (uint32_t) n_threads, 1, 1 }, n_shared + N_MORE, device_rng, [&] { kernel(params); });
        for (int i = 0; i < N_MORE; ++i) {
            GGML_ASSERT((uint8_t) lanes::shared()[n_shared + i] == 0xFF);
        }
    });

    ++n_launches[std::string(is_wide ? "wide " : "") + (plan.tiles ? "tiles of " : "rows ") + std::to_string(plan.n_rows) + (plan.params.n_split > 1 ? ", split" : "")];

    return true;
}

static int32_t pick(std::mt19937 & rng, std::initializer_list<int32_t> values) {
    return values.begin()[rng() % values.size()];
}

// every case is large enough for what it tests and no larger: emulation is slow
static std::vector<attn_case> small_grid(std::mt19937 & rng) {
    std::vector<attn_case> res;

    for (attn_case c : attn_grid(rng)) {
        const int64_t work = (int64_t) c.n_q*c.n_head*c.n_stream*(c.n_sink + c.n_kv)*(c.n_embd_head_k + c.n_embd_head_v);
        if (work < 3000000) {
            res.push_back(c);
        }
    }

    // the tile kernel: types that it takes, in all four places
    const ggml_type types[]    = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    const int32_t   heads[][2] = { { 8, 8 }, { 40, 40 }, { 64, 64 }, { 80, 80 }, { 96, 96 }, { 112, 112 }, { 128, 128 }, { 192, 128 }, { 256, 256 }, { 64, 96 },
        { 512, 512 }, { 264, 264 }, { 320, 320 }, { 512, 128 }, { 64, 384 }, { 576, 512 } };
    for (const auto & head : heads) {
        for (int i = 0; i < 6; ++i) {
            attn_case c;
            c.n_embd_head_k = head[0];
            c.n_embd_head_v = head[1];
            for (ggml_type * t : { &c.type_k, &c.type_v, &c.type_k_sink, &c.type_v_sink }) {
                const bool is_k = t == &c.type_k || t == &c.type_k_sink;
                *t = types[rng() % 3];
                if ((is_k ? head[0] : head[1]) % ggml_blck_size(*t) != 0) {
                    *t = GGML_TYPE_F16;
                }
            }
            const int32_t n_group = pick(rng, { 1, 2, 3, 4, 5, 7, 8, 12, 16 });
            c.n_head_kv     = pick(rng, { 1, 2 });
            c.n_head        = n_group*c.n_head_kv;
            c.n_q           = (33 + rng() % 70 + n_group - 1)/n_group;
            c.n_stream      = pick(rng, { 1, 1, 2 });
            c.n_sink        = pick(rng, { 0, 1, 8, 37, 64 });
            c.n_kv          = pick(rng, { 1, 31, 64, 100, 190 });
            c.max_bias      = pick(rng, { 0, 0, 0, 8 });
            c.logit_softcap = pick(rng, { 0, 0, 0, 15 });
            c.sharpness     = pick(rng, { 1, 1, 8 });
            c.head_sinks    = pick(rng, { 0, 0, 0, 1 });
            c.mask          = (attn_mask_kind) (rng() % ATTN_MASK_COUNT);
            res.push_back(c);
        }
    }

    // every kernel with one split and with several, whatever the dice say; three sizes of shared memory take turns
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
        for (int32_t n_group : { 1, 2, 4, 8, 16, 32 }) {
            for (int32_t n_kv : { 32, 511 }) {
                for (int32_t n_embd_head : { 64, 256, 512 }) {
                    attn_case c;
                    c.type_k        = type;
                    c.type_v        = type;
                    c.type_k_sink   = type;
                    c.type_v_sink   = type;
                    c.n_embd_head_k = n_embd_head;
                    c.n_embd_head_v = n_embd_head;
                    c.n_head_kv     = 1;
                    c.n_head        = n_group;
                    c.n_sink        = 0;
                    c.n_kv          = n_kv;
                    res.push_back(c);

                    c.n_q = 40/n_group + 1;
                    res.push_back(c);
                }
            }
        }
    }
    return res;
}

// what the kernels cannot do they must decline
static bool declines(std::mt19937 & rng) {
    const int most = 1 << 20; // bytes of shared memory

    attn_case large_k, large_v, wide, odd;
    large_k.n_embd_head_k = 584;
    large_v.n_embd_head_v = 520;
    wide.n_embd_head_v    = 264;
    odd.n_embd_head_v     = 60;

    for (const auto & [c, n_shared] : std::vector<std::pair<attn_case, int>>{
            { large_k, most }, { large_v, most }, { odd, most }, { wide, LMINF_CUDA_SHARED_ANY } }) {
        if (lminf_cuda_can(attn_problem(c, rng).op(), n_shared)) {
            printf("not declined: %s\n", c.str().c_str());
            return false;
        }
    }

    attn_problem problem({}, rng);
    ggml_tensor  k = *problem.op()->src[LMINF_ATTN_K];
    problem.op()->src[LMINF_ATTN_K] = &k;
    k.nb[1] += 2;
    const bool strides = lminf_cuda_can(problem.op(), most);
    k.nb[1] -= 2;
    k.view_offs += 2;
    const bool offset  = lminf_cuda_can(problem.op(), most);
    k.view_offs -= 2;
    if (strides || offset || !lminf_cuda_can(problem.op(), most)) {
        printf("rows that are not aligned were not declined\n");
        return false;
    }
    return true;
}

int main() {
    std::mt19937 rng = attn_seed();
    device_rng.seed(rng());

    int status = attn_run("CUDA kernels on the CPU", small_grid(rng), rng, compute);

    for (const auto & [kernel, n] : n_launches) {
        printf("  %-23s %4d\n", kernel.c_str(), n);
    }
    for (const char * kernel : { "rows 1", "rows 2", "rows 4", "rows 8", "rows 16", "tiles of 16", "tiles of 32", "tiles of 64",
            "wide rows 1", "wide rows 2", "wide rows 4", "wide rows 8", "wide tiles of 16", "wide tiles of 32" }) {
        for (const char * split : { "", ", split" }) {
            if (n_launches.count(std::string(kernel) + split) == 0) {
                printf("not tested: %s%s\n", kernel, split);
                status = 1;
            }
        }
    }
    return status != 0 || !declines(rng);
}
