#include "lminf-rope.h"

#include "lminf-params.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

// ggml_rope's op_params; see ggml_rope_impl and ggml_rope_set_offset
enum rope_op_param {
    ROPE_N_DIMS      = 1,
    ROPE_MODE        = 2,
    ROPE_FREQ_SCALE  = 6,
    ROPE_EXT_FACTOR  = 7,
    ROPE_ATTN_FACTOR = 8,
    ROPE_SECTIONS    = 11,
    ROPE_N_OFFS      = 15,
};

static float get_f32(const int32_t * op_params, rope_op_param i) {
    float res;
    memcpy(&res, op_params + i, sizeof(res));
    return res;
}

void lminf_refuse_layer(llm_arch arch, int il, const char * why) {
    throw std::runtime_error(lminf_set_error(format(
        "models of architecture '%s' cannot run with a Λ cache: layer %d %s: run it without one, within its training length",
        llm_arch_name(arch), il, why)));
}

//
// lminf_text_factors
//

// the pair takes its position from one of the three sections that text has; see ggml_mrope_cache_init
static bool has_text_position(const int32_t * op_params, int32_t pair) {
    const int32_t * s = op_params + ROPE_SECTIONS;
    const int32_t   i = pair % (s[0] + s[1] + s[2] + s[3]);

    return op_params[ROPE_MODE] == GGML_ROPE_TYPE_IMROPE ? i < 3*s[i % 3] : i < s[0] + s[1] + s[2];
}

ggml_tensor * lminf_text_factors::get(const ggml_tensor * mrope) {
    const int32_t n_pairs = mrope->op_params[ROPE_N_DIMS]/2;

    std::vector<float> data;
    bool all_turn = true;
    for (int32_t pair = 0; pair < n_pairs; ++pair) {
        const bool turns = has_text_position(mrope->op_params, pair);

        data.push_back(turns ? 1.0f : 1e30f);
        all_turn &= turns;
    }
    if (all_turn) {
        return nullptr;
    }
    if (factors) {
        GGML_ASSERT(factors->ne[0] == n_pairs);
        return factors;
    }

    const ggml_init_params params_ctx = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params_ctx));
    factors = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_pairs);
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    if (!buf) {
        throw std::runtime_error(lminf_set_error("failed to allocate the factors of M-RoPE"));
    }
    ggml_backend_tensor_set(factors, data.data(), 0, ggml_nbytes(factors));

    return factors;
}

//
// reading the rotation off the graph
//

// a tensor, seen through what only names its data anew
static const ggml_tensor * see_through(const ggml_tensor * t) {
    while (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE) {
        t = t->src[0];
    }
    return t;
}

// the factor by which a model scales its queries the further they are into the text: the context computes it from the
// number of keys in view (lminf_n_in_view)
static bool is_temperature(const ggml_tensor * input) {
    return strcmp(input->name, "inp_attn_scale") == 0;
}

static bool has_rope_below(const ggml_tensor * t) {
    while (t && t->op != GGML_OP_MUL_MAT && t->op != GGML_OP_ROPE) {
        t = t->src[0];
    }
    return t && t->op == GGML_OP_ROPE;
}

struct found_rope {
    const ggml_tensor * node   = nullptr; // NULL: not rotated
    int32_t             n_offs = 0;
};

// A further rotation by other positions is the same as rotating by their sum only if everything between the RoPE node and
// the attention commutes with a rotation.
static found_rope find_rope(const ggml_tensor * t, llm_arch arch, int il) {
    bool commutes = true;

    found_rope res;

    while (t) {
        switch (t->op) {
            case GGML_OP_ROPE:
                if (!commutes) {
                    lminf_refuse_layer(arch, il, "changes its queries or keys between RoPE and attention, so that scores depend on more than distances");
                }
                if (t->op_params[ROPE_MODE] == GGML_ROPE_TYPE_VISION) {
                    lminf_refuse_layer(arch, il, "rotates its queries by positions in a picture");
                }
                res.node    = t;
                res.n_offs += t->op_params[ROPE_N_OFFS];
                return res;

            case GGML_OP_MUL_MAT:
            case GGML_OP_GET_ROWS:
                return {}; // the projection: nothing was rotated

            // a part of each head is rotated, the other is not
            case GGML_OP_CONCAT:
                {
                    const bool first  = has_rope_below(t->src[0]);
                    const bool second = has_rope_below(t->src[1]);

                    if ((first || second) && (first == second || t->op_params[0] != 0)) {
                        lminf_refuse_layer(arch, il, "joins parts that are rotated differently");
                    }
                    if (second) {
                        res.n_offs += (int32_t) t->src[0]->ne[0];
                        t = t->src[1];
                        continue;
                    }
                } break;

            // the same key for several heads
            case GGML_OP_REPEAT:
                commutes = commutes && t->ne[0] == t->src[0]->ne[0];
                break;

            // these move data, scale whole heads, or depend on the norm of a head alone
            case GGML_OP_NONE:
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_SCALE:
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
                break;

            case GGML_OP_MUL:
                {
                    const ggml_tensor * factor = see_through(t->src[1]);
                    if ((factor->flags & GGML_TENSOR_FLAG_INPUT) && !is_temperature(factor)) {
                        lminf_refuse_layer(arch, il, "scales its queries by something that depends on their absolute position");
                    }
                    commutes = commutes && factor->ne[0] == 1;
                } break;

            default:
                commutes = false;
                break;
        }
        t = t->src[0];
    }

    return {};
}

lminf_rope lminf_read_rope(const ggml_tensor * q, const ggml_tensor * k, lminf_text_factors & text, llm_arch arch, int il) {
    const found_rope q_rope = find_rope(q, arch, il);
    const found_rope k_rope = k ? find_rope(k, arch, il) : q_rope;

    lminf_rope rope;
    rope.known = true;

    if (!q_rope.node && !k_rope.node) {
        return rope;
    }
    // all but the offset within a tensor that may be a part of a head
    if (!q_rope.node || !k_rope.node || q_rope.node->src[2] != k_rope.node->src[2] || q_rope.n_offs != k_rope.n_offs ||
            memcmp(q_rope.node->op_params, k_rope.node->op_params, ROPE_N_OFFS*sizeof(int32_t)) != 0) {
        lminf_refuse_layer(arch, il, "rotates its queries and its keys differently");
    }

    const ggml_tensor * node = q_rope.node;

    rope.factors = node->src[2];
    rope.n_dims  = node->op_params[ROPE_N_DIMS];
    rope.n_offs  = q_rope.n_offs;
    memcpy(rope.op_params, node->op_params, sizeof(rope.op_params));

    if (rope.op_params[ROPE_MODE] & GGML_ROPE_TYPE_MROPE) {
        ggml_tensor * factors = text.get(node);
        if (factors && rope.factors) {
            lminf_refuse_layer(arch, il, "has frequency factors on top of an M-RoPE with pairs that text does not turn");
        }
        rope.factors = factors ? factors : rope.factors;
        rope.op_params[ROPE_MODE] = GGML_ROPE_TYPE_NEOX;
    }

    return rope;
}

ggml_tensor * lminf_rotate(ggml_context * ctx, const lminf_rope & rope, ggml_tensor * t, ggml_tensor * shift, bool inplace) {
    ggml_tensor * res = (inplace ? ggml_rope_ext_inplace : ggml_rope_ext)(ctx, t, shift, rope.factors, rope.n_dims, rope.op_params[ROPE_MODE],
            0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);

    memcpy(res->op_params, rope.op_params, sizeof(rope.op_params));

    // ggml multiplies by attn_factor, and with YaRN by this factor as well (rope_yarn in ggml-cpu/ops.cpp): t has both
    const bool  yarn        = get_f32(rope.op_params, ROPE_EXT_FACTOR) != 0.0f;
    const float attn_factor = yarn ? 1.0f/(1.0f + 0.1f*logf(1.0f/get_f32(rope.op_params, ROPE_FREQ_SCALE))) : 1.0f;
    memcpy(res->op_params + ROPE_ATTN_FACTOR, &attn_factor, sizeof(attn_factor));

    res->op_params[ROPE_N_OFFS] = rope.n_offs;

    return res;
}
