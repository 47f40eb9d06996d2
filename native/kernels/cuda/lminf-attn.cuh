// GGML_OP_LMINF_ATTN on CUDA, called by ggml-cuda.cu

#pragma once

struct ggml_backend_cuda_context;
struct ggml_tensor;

bool ggml_cuda_lminf_attn_supported(int device, const ggml_tensor * op);

void ggml_cuda_lminf_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
