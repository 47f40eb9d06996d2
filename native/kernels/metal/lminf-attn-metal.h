// GGML_OP_LMINF_ATTN on Metal: what the Metal backend asks and calls

#pragma once

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

bool lminf_attn_metal_supports(const struct ggml_metal_device_props * props, const struct ggml_tensor * op);

// bytes of scratch memory right behind the operation's result
size_t lminf_attn_metal_scratch_size(const struct ggml_tensor * op);

void lminf_attn_metal_encode(
        ggml_metal_library_t        lib,
        ggml_metal_encoder_t        enc,
        const struct ggml_tensor  * op,
        struct ggml_metal_buffer_id (*get_buffer)(const struct ggml_tensor * t)); // no buffer for NULL

#ifdef __cplusplus
}
#endif
