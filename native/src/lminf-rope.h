// how a layer rotates its queries and keys, read off its own RoPE node when the graph is built: no architecture needs to
// be known here

#pragma once

#include "llama-arch.h"

#include "ggml-cpp.h"

struct lminf_rope {
    bool known    = false; // the layer's attention has been built once
    bool hadamard = false; // its keys are stored under a Hadamard rotation, as quantized ones are

    ggml_tensor * factors = nullptr; // per-frequency factors
    int32_t       n_dims  = 0;       // 0: no RoPE on this layer
    int32_t       n_offs  = 0;       // elements of a head before those that are rotated

    int32_t op_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)] = { 0 };
};

// A token of text has its position in three sections of M-RoPE and 0 in the fourth. So it is rotated as NeoX does, but for
// pairs of the fourth section, which stand still: 1 for a pair that turns, a huge frequency factor for one that does not.
class lminf_text_factors {
public:
    // NULL if all pairs turn
    ggml_tensor * get(const ggml_tensor * mrope);

private:
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor           * factors = nullptr;
};

// Throws, with one sentence, if a further rotation would not be the same as a rotation by the sum of positions.
//   k is NULL where the layer attends to another one's keys
lminf_rope lminf_read_rope(const ggml_tensor * q, const ggml_tensor * k, lminf_text_factors & text, llm_arch arch, int il);

// rotates t [n_embd_head, n_head, n_tokens] further, by shift [n_tokens] positions, keeping its magnitude
ggml_tensor * lminf_rotate(ggml_context * ctx, const lminf_rope & rope, ggml_tensor * t, ggml_tensor * shift, bool inplace = false);

// ends the making of the context: a layer of this architecture cannot have the rule
[[noreturn]] void lminf_refuse_layer(llm_arch arch, int il, const char * why);
