// GGML_OP_LMINF_ATTN on CUDA, called by ggml-cuda.cu

#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// no nvcuda::wmma, and warps may be 64 lanes: the stock operations take over

static inline bool ggml_cuda_lminf_attn_supported(int, const ggml_tensor *) {
    return false;
}

static inline void ggml_cuda_lminf_attn(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("fatal error");
}

#else

bool ggml_cuda_lminf_attn_supported(int device, const ggml_tensor * op);

void ggml_cuda_lminf_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

#endif
