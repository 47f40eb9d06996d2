// GGML_OP_LMINF_ATTN on CUDA: the host's side. The kernels are in lminf-attn-kernels.cuh, which one is launched and how in
// lminf-attn-launch.cuh; this file only ties them to ggml's backend.
//
// All heads that share a KV head are computed together: a "row" is a query of one head, and a tile of rows walks K and V
// once for a whole group. Sinks are cells before the window's, padded to whole tiles of 32, so that a tile reads one q, one
// K and one V. A block takes a tile of rows and a range of cells ("split"); there are as many splits as it takes to fill the
// device, and with more than one the blocks leave sums to a third kernel that combines them.
//
// Row kernel, 1 to 16 rows (decoding, and every K or V in f32 or bf16): f32 throughout, no tensor cores, as it waits for
// memory. 4 warps work on their own tiles of 32 cells, without barriers. K goes through shared memory 32 elements at a time,
// 4.5 KiB per warp whatever the head size, so that a lane can be a cell and a score needs no exchange between lanes;
// V is read once, each lane 8 elements, and multiplied from registers. 16 rows are the most for which the sums fit into
// registers, 8 where a head of V has more than 256 elements and a lane 16 of them. Cells that no row sees are not read at all.
//
// Tile kernel, more than 32 rows (prefill): 16 rows per warp on tensor cores by way of nvcuda::wmma, 4 warps, or 2 where
// large heads need the shared memory (48 KiB are there on every device). Tiles are 32 cells, and K and V share a buffer in
// f16, one after the other: with heads of 128 a block takes 36 to 44 KiB, so that two fit on a multiprocessor (one on
// Turing, which has 64). Softmax and sums are f32; q, quantized K and V, and the weights are rounded to f16. Tiles that no
// query of the block sees are skipped. f32 and bf16 do not fit into f16 and go to the row kernel, 16 rows at a time.
// Wide heads, of more than 256 elements, from 17 rows on: the sums of 16 rows fill a warp's registers at 256 elements of V, so
// two warps share 16 rows, each with half of the scores and half of V. K or V of a tile takes up to 37 KiB, and so does q of
// 32 rows: a block asks for 70 to 82 KiB, and where the device has not that much, on Turing, for 51 to 60 KiB with 16 rows.
//
// Per token and layer, decoding reads (n_sink + n_kv)*n_head_kv rows of K and V once, up to 16 heads per KV head: with 4096
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
