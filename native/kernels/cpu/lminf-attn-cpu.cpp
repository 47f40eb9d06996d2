// the operation: one of two kernels, both with f32 sums and one pass over K and V, by the number of query rows

#include "lminf-attn-cpu.h"

#include "ggml-cpu-impl.h" // first: it tells MSVC's AVX2 apart as __FMA__ and __F16C__
#include "ggml-impl.h"

#include "lminf-decode.h"
#include "lminf-tiles.h"

static bool use_decode(const lminf_attn_args & args) {
    return args.n_q*(args.n_head/args.n_head_kv) <= N_ROWS_DECODE;
}

// floats, a whole number of cache lines
static size_t get_scratch_size(const lminf_attn_args & args) {
    const size_t n = use_decode(args) ? get_decode_scratch_size(args) : get_tile_state_size(args);
    return (n + 15)/16*16;
}

size_t ggml_lminf_attn_work_size(const ggml_tensor * op, int n_threads) {
    const lminf_attn_args args = lminf_attn_get_args(op);

    const int    n_split = use_decode(args) ? n_threads : get_n_split(args, n_threads);
    const size_t n       = n_threads*get_scratch_size(args) + n_split*get_n_rows(args)*get_part_size(args);

    return n*sizeof(float);
}

void ggml_compute_forward_lminf_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const lminf_attn_args args = lminf_attn_get_args(dst);

    const int ith = params->ith;
    const int nth = params->nth;

    float * scratch = (float *) params->wdata + ith*get_scratch_size(args);
    float * parts   = (float *) params->wdata + nth*get_scratch_size(args);

    if (use_decode(args)) {
        decode(args, scratch, parts, ith, nth);
    } else {
        tiles(args, scratch, parts, ith, nth);
    }

    ggml_barrier(params->threadpool);

    const int n_split = use_decode(args) ? nth : get_n_split(args, nth);
    for (int64_t row = ith; row < get_n_rows(args); row += nth) {
        merge_parts(args, parts, n_split, row);
    }
}
