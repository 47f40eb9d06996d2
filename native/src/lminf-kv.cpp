#include "lminf-kv.h"
#include "lminf-pages.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

// llama_kv_cache hands out its values as views only
static ggml_tensor * find_v_storage(const llama_kv_cache & cache, int32_t il) {
    const ggml_init_params params_ctx = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    const ggml_context_ptr ctx(ggml_init(params_ctx));

    return cache.get_v(ctx.get(), il, 1, { 0, 0, { 0 }, { { 0 } } })->view_src;
}

lminf_kv::lminf_kv(const llama_model & model, const params & p, const std::vector<int32_t> & layers_kv, const llama_memory_i::layer_reuse_cb & reuse) :
    p(p) {
    const llama_memory_i::layer_filter_cb filter = [&](int32_t il) {
        return std::count(layers_kv.begin(), layers_kv.end(), il) > 0 || (reuse && std::count(layers_kv.begin(), layers_kv.end(), reuse(il)) > 0);
    };

    // the cache's own sliding window decides what is recycled
    cache = std::make_unique<llama_kv_cache>(
            model, model.hparams, p.type_k, p.type_v, p.v_trans, p.offload, /*unified =*/ false, p.n_cells, p.n_seq_max, /*n_pad =*/ 1,
            p.n_seen + p.n_slack, LLAMA_SWA_TYPE_STANDARD, /*mem_other =*/ nullptr, filter,
            reuse ? llama_memory_i::layer_reuse_cb([&](int32_t il) { return filter(il) ? reuse(il) : -1; }) : nullptr, /*share =*/ nullptr);

    dirty.assign(p.n_seq_max, 0);

    std::set<ggml_backend_buffer_t> buffers; // one for each device, K and V of all of its layers
    for (const int32_t il : layers_kv) {
        layers.push_back({ cache->get_k_storage(il), model.hparams.is_mla() ? nullptr : find_v_storage(*cache, il) });
        buffers.insert(layers.back().k->buffer);
    }
    if (!model.hparams.no_alloc) {
        for (const auto & buffer : buffers) {
            lminf_use_huge_pages(buffer);
        }
    }
}

llama_pos lminf_kv::rollback_min(llama_seq_id seq_id, int64_t pos_resume) const {
    const int64_t pos_min = cache->seq_pos_min(seq_id);

    // nothing has been recycled yet: any token can be the last one. Else one is left at least, to count on from
    return (llama_pos) (pos_min <= pos_resume ? pos_resume : pos_min + std::max<int64_t>(p.n_seen - 1, 1));
}

void lminf_kv::free_cells(llama_seq_id seq_id, llama_pos p0) {
    mark_dirty(seq_id);

    if (p0 < 0) {
        zero_cells(seq_id, 0, dirty[seq_id]);
        dirty[seq_id] = 0;
    } else {
        const auto & cells = get_cells(seq_id);

        for (uint32_t i = 0, n = 0; i < p.n_cells; i += n + 1, n = 0) {
            while (i + n < p.n_cells && cells.pos_in(i + n, p0, std::numeric_limits<llama_pos>::max())) {
                n++;
            }
            zero_cells(seq_id, i, n);
        }
    }

    cache->seq_rm(seq_id, p0, -1);
}

void lminf_kv::zero_cells(llama_seq_id seq_id, uint32_t i0, uint32_t n) {
    if (n == 0) {
        return;
    }

    for (const auto & layer : layers) {
        for (ggml_tensor * t : { layer.k, layer.v }) {
            if (!t) {
                continue;
            }
            const size_t at = cache->get_stream(seq_id)*t->nb[2];

            if (t == layer.k || !p.v_trans) {
                ggml_backend_tensor_memset(t, 0, at + i0*t->nb[1], n*t->nb[1]);
            } else if (n == p.n_cells) {
                ggml_backend_tensor_memset(t, 0, at, t->nb[2]);
            } else {
                for (int64_t row = 0; row < t->ne[0]; ++row) {
                    ggml_backend_tensor_memset(t, 0, at + (row*p.n_cells + i0)*t->nb[0], n*t->nb[0]);
                }
            }
        }
    }
}

void lminf_kv::shift(llama_seq_id seq_id, llama_pos by) {
    // llama_kv_cache::seq_add refuses models with several positions per token; text has one
    auto & cells = const_cast<llama_kv_cells &>(get_cells(seq_id));

    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            cells.pos_add(i, -by);
        }
    }
}

std::vector<uint32_t> lminf_kv::shifted_streams(const ggml_tensor * k) const {
    std::vector<uint32_t> res;

    if (std::none_of(layers.begin(), layers.end(), [&](const layer & l) { return l.k == k; })) {
        return res;
    }
    for (uint32_t s = 0; s < p.n_seq_max; ++s) {
        if (get_cells(s).get_has_shift()) {
            res.push_back(cache->get_stream(s));
        }
    }
    return res;
}

void lminf_kv::copy(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    mark_dirty(seq_id_src);

    cache->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    dirty[seq_id_dst] = dirty[seq_id_src];
}

void lminf_kv::fill(llama_seq_id seq_id, llama_pos p0, int64_t n, const std::function<void(size_t layer, int64_t i, char * k, char * v)> & load) {
    free_cells(seq_id, -1);

    for (size_t il = 0; il < layers.size(); ++il) {
        const auto & [k, v] = layers[il];

        const size_t stream = cache->get_stream(seq_id);
        const size_t size_v = v ? v->ne[0]*v->nb[0] : 0;

        std::vector<char> rows_k(n*k->nb[1]);
        std::vector<char> rows_v(n*size_v);
        for (int64_t i = 0; i < n; ++i) {
            load(il, i, rows_k.data() + i*k->nb[1], v ? rows_v.data() + i*size_v : nullptr);
        }

        ggml_backend_tensor_set(k, rows_k.data(), stream*k->nb[2], rows_k.size());
        if (v && !p.v_trans) {
            ggml_backend_tensor_set(v, rows_v.data(), stream*v->nb[2], rows_v.size());
        } else if (v) {
            std::vector<char> column(n*v->nb[0]);
            for (int64_t j = 0; j < v->ne[0]; ++j) {
                for (int64_t i = 0; i < n; ++i) {
                    memcpy(column.data() + i*v->nb[0], rows_v.data() + i*size_v + j*v->nb[0], v->nb[0]);
                }
                ggml_backend_tensor_set(v, column.data(), stream*v->nb[2] + j*p.n_cells*v->nb[0], column.size());
            }
        }
    }

    auto & cells = const_cast<llama_kv_cells &>(get_cells(seq_id));
    for (int64_t i = 0; i < n; ++i) {
        cells.pos_set(i, 0);
        cells.seq_add(i, seq_id);
        cells.pos_add(i, p0 + i);
    }
}

void lminf_kv::mark_dirty(llama_seq_id seq_id) {
    dirty[seq_id] = std::max(dirty[seq_id], get_cells(seq_id).used_max_p1());
}

std::vector<uint32_t> lminf_kv::saved_cells(llama_seq_id seq_id) const {
    const auto & cells = get_cells(seq_id);

    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) &&
                !llama_hparams::is_masked_swa(p.n_seen + p.n_slack, LLAMA_SWA_TYPE_STANDARD, cells.pos_get(i), cells.seq_pos_max(seq_id))) {
            res.push_back(i);
        }
    }
    return res;
}
