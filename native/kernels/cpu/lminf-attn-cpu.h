// GGML_OP_LMINF_ATTN on the CPU, called by ggml-cpu.c

#pragma once

#include "lminf-attn.h"

#include <stddef.h>

struct ggml_compute_params;

#ifdef __cplusplus
extern "C" {
#endif

// bytes of params->wdata the operation needs with so many threads
size_t ggml_lminf_attn_work_size(const struct ggml_tensor * op, int n_threads);

// called by every thread
void ggml_compute_forward_lminf_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
