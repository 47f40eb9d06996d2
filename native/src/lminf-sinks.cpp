#include "lminf-sinks.h"
#include "lminf-params.h"

#include "llama-model.h"

#include <stdexcept>

lminf_sinks::lminf_sinks(const llama_model & model, ggml_type type_k, ggml_type type_v, bool offload, int64_t n_rows, uint32_t n_seq_max,
        const std::vector<int32_t> & layers_kv) : rows(n_seq_max), no_alloc(model.hparams.no_alloc) {
    const auto & hparams = model.hparams;

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;

    for (const int32_t il : layers_kv) {
        ggml_backend_buffer_type_t buft = offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();

        if (ctx_map.find(buft) == ctx_map.end()) {
            const ggml_init_params params_ctx = {
                /*.mem_size   =*/ 2*(1 + n_seq_max)*layers_kv.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            };
            ctx_map[buft] = ggml_init(params_ctx);
            ctxs_bufs.emplace_back(ggml_context_ptr(ctx_map[buft]), nullptr);
        }

        const auto new_store = [&](const char * name, ggml_type type, uint32_t n_embd_gqa) {
            ggml_tensor * t = ggml_new_tensor_3d(ctx_map[buft], store_type(type), n_embd_gqa, n_rows, n_seq_max);
            ggml_format_name(t, "sink_%s_l%d", name, il);
            for (uint32_t s = 0; s < n_seq_max; ++s) {
                rows[s].push_back(ggml_view_2d(ctx_map[buft], t, t->ne[0], t->ne[1], t->nb[1], s*t->nb[2]));
            }
            return t;
        };

        ggml_tensor * k = new_store("k", type_k, hparams.n_embd_k_gqa(il));
        ggml_tensor * v = hparams.is_mla() ? k : new_store("v", type_v, hparams.n_embd_v_gqa(il));

        map_layer_ids[il] = layers.size();
        layers.push_back({ k, v });
    }

    for (auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = nullptr;
        for (const auto & [type, ctx_of_type] : ctx_map) {
            buft = ctx_of_type == ctx.get() ? type : buft;
        }

        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        }
        if (!buf) {
            throw std::runtime_error(lminf_set_error("failed to allocate the sink store"));
        }
    }
    clear();
}

void lminf_sinks::zero(llama_seq_id seq_id, int32_t i0, int32_t i1) {
    if (i0 == i1) {
        return;
    }
    for (ggml_tensor * t : rows[seq_id]) {
        ggml_backend_tensor_memset(t, 0, i0*t->nb[1], (i1 - i0)*t->nb[1]);
    }
}

void lminf_sinks::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    for (size_t i = 0; i < rows[seq_id_src].size(); ++i) {
        ggml_backend_tensor_copy(rows[seq_id_src][i], rows[seq_id_dst][i]);
    }
}

void lminf_sinks::clear() {
    for (auto & [_, buf] : ctxs_bufs) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_sinks::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}
