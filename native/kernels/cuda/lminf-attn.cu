// GGML_OP_LMINF_ATTN on CUDA: the host's side. The kernels are in lminf-attn-kernels.cuh, which one is launched and how in
// lminf-attn-launch.cuh; this file only ties them to ggml's backend.
//
// All heads that share a KV head are computed together: a "row" is a query of one head, and a tile of rows walks K and V
// once for a whole group. Sinks are cells before the window's, padded to whole tiles of 32, so that a tile reads one q, one
// K and one V. A block takes a tile of rows and a range of cells ("split"); there are as many splits as it takes to fill the
// device, and with more than one the blocks leave sums to a third kernel that combines them.
//
// Row kernel, 1 to 16 rows (f32 and bf16; of f16 up to 4 rows, of quantized types 16, of wide heads 0 and 8): f32 throughout, no tensor cores, as
// it waits for memory. 4 warps work on their own tiles of 32 cells, without barriers. K goes through shared memory 32
// elements at a time, 4.5 KiB per warp whatever the head size, so that a lane can be a cell and a score needs no exchange
// between lanes; V is read once, each lane 8 elements, and multiplied from registers. 16 rows are the most for which the sums
// fit into registers, 8 where a head of V has more than 256 elements and a lane 16 of them. Cells that no row sees are not
// read at all.
//
// Tile kernel, all else: 16 rows per warp on tensor cores, 1 to 4 warps, as many as there are rows. Tiles are 64 cells with
// heads of up to 64, else 32. mma leaves scores as the next product wants its weights, so they stay in registers; K and V
// of the next tile come to shared memory by copies that go on meanwhile, one barrier a tile. q, K and V take 45 KiB with
// heads of 64, 51 with 128; where they take more than a block can have, V takes K's place, and there are less rows. Softmax
// and sums are f32; q, quantized K and V, and the weights are rounded to f16. Tiles that no query of the block sees are
// skipped, after a look at the mask of 32 of them. Wide heads, of more than 256 elements: the sums of 16 rows fill a warp's
// registers at 256 elements of V, so two warps share 16 rows, each with half of V, and scores of its own.
//
// Per token and layer, decoding reads (n_sink + n_kv)*n_head_kv rows of K and V once, up to 64 heads per KV head: with 4096
// f16 cells, 8 KV heads of 64 elements, 8.4 MB. The mask is 4 bytes per cell for each KV head, from L2.

#include "common.cuh"

#include "lminf-attn.cuh"
#include "lminf-attn-ptx.cuh"
#include "lminf-attn-launch.cuh"

bool ggml_cuda_lminf_attn_supported(int device, const ggml_tensor * op) {
    const auto & info = ggml_cuda_info().devices[device];

    return ggml_cuda_highest_compiled_arch(info.cc) >= GGML_CUDA_CC_TURING && lminf_attn_is_valid(op) && lminf_cuda_can(op, info.smpbo);
}

void ggml_cuda_lminf_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const auto & info = ggml_cuda_info().devices[ctx.device];

    const lminf_cuda_plan plan = lminf_cuda_get_plan(lminf_attn_get_args(dst), info.nsm, info.smpbo);

    ggml_cuda_pool_alloc<float> scratch(ctx.pool());
    if (plan.n_scratch > 0) {
        scratch.alloc(plan.n_scratch);
    }

    const cudaStream_t stream = ctx.stream();

    lminf_cuda_launch(plan, scratch.get(), [&](auto * kernel, const uint32_t * grid, int n_threads, int n_shared, const lminf_cuda_params & params) {
        if (n_shared > LMINF_CUDA_SHARED_ANY) {
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_shared));
        }
        kernel<<<dim3(grid[0], grid[1], grid[2]), n_threads, n_shared, stream>>>(params);
        CUDA_CHECK(cudaGetLastError());
    });
}
