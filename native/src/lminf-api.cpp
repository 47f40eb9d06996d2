// the C functions of lminf.h, and how parameters travel from there into a new context

#include "lminf.h"
#include "lminf-memory.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

static thread_local lminf_cparams next_params;
static thread_local std::string   last_error;

std::string lminf_set_error(std::string msg) {
    last_error = std::move(msg);
    return last_error;
}

void lminf_take_next(const llama_model & model, llama_cparams & cparams) {
    cparams.lminf = next_params;
    next_params   = lminf_cparams();

    if (cparams.lminf.enabled) {
        cparams.kv_unified = false; // a stream for each sequence
        cparams.n_seq_max  = cparams.lminf.n_seq_max > 0 ? cparams.lminf.n_seq_max : cparams.n_seq_max;
        cparams.fused_lid  = false; // what a selector computes is not asked for

        if (model.arch == LLM_ARCH_MINIMAX_M3) {
            cparams.flash_attn = false; // without it llama.cpp's graph leaves the selection out
            cparams.auto_fa    = false;
        }
    }
}

uint32_t lminf_n_ctx_rope(const llama_cparams & cparams) {
    const auto & lminf = cparams.lminf;

    return lminf.enabled ? std::max({ lminf.n_local, lminf.max_distance, lminf.recall_distance }) : cparams.n_ctx_seq;
}

lminf_memory * lminf_get_memory(const llama_context * lctx) {
    if (!lctx || !lctx->get_cparams().lminf.enabled) {
        return nullptr;
    }
    return dynamic_cast<lminf_memory *>(lctx->get_memory()); // a model that is constant already keeps its own memory
}

void lminf_before_decode(llama_context & lctx, const llama_batch & batch) {
    auto * mem = lminf_get_memory(&lctx);
    if (!mem || batch.pos) {
        return;
    }

    std::map<llama_seq_id, int32_t> n_tokens;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        n_tokens[batch.n_seq_id ? batch.seq_id[i][0] : 0]++;
    }
    for (const auto & [seq_id, n] : n_tokens) {
        if (mem->is_valid(seq_id)) {
            mem->make_room(lctx, seq_id, n);
        }
    }
}

void lminf_check_graph(llama_context & lctx) {
    if (auto * mem = lminf_get_memory(&lctx)) {
        mem->check_layers();
        mem->set_context(lctx);
    }
}

void lminf_batch_failed(llama_context & lctx) {
    if (auto * mem = lminf_get_memory(&lctx)) {
        mem->batch_failed();
    }
}

constexpr int32_t max_recall = 4096;

static bool is_archive_type(int32_t type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

static const char * check_recall(const lminf_params & params) {
    if (params.sink_mode != LMINF_SINK_CEILING) {
        return "n_recall needs the sink_mode CEILING: what is recalled stands at a distance of its own";
    }
    if (params.recall_distance < 0) {
        return "recall_distance must be 1 or more, or 0 for half of max_distance";
    }
    if (params.recall_from < 0) {
        return "recall_from must be 0 or more";
    }
    if (params.recall_every < 1) {
        return "recall_every must be 1 or more";
    }
    if (params.recall_rule < LMINF_RECALL_LAYER || params.recall_rule > LMINF_RECALL_PAPER) {
        return "recall_rule must be one of enum lminf_recall_rule";
    }
    if (params.recall_index < LMINF_RECALL_SKETCH || params.recall_index > LMINF_RECALL_EXACT) {
        return "recall_index must be one of enum lminf_recall_index";
    }
    if (params.recall_rule == LMINF_RECALL_PAPER && params.attention == LMINF_ATTENTION_FUSED) {
        return "the paper's recall needs the stock attention: its heads attend to different tokens";
    }
    if (params.n_archive < 0) {
        return "n_archive must be 1 or more, or 0";
    }
    if (!is_archive_type(params.archive_type_k) || !is_archive_type(params.archive_type_v)) {
        return "an archive's types are f32, f16, q8_0 or q4_0";
    }
    return nullptr;
}

// NULL if the parameters make sense
static const char * check_params(const lminf_params & params) {
    if (params.n_global < 0) {
        return "n_global must be 0 or more";
    }
    if (params.n_local < 1) {
        return "n_local must be 1 or more";
    }
    if (params.max_distance < 0) {
        return "max_distance must be 1 or more, or 0 for n_local";
    }
    if (params.n_slack < -1) {
        return "n_slack must be 0 or more, or -1 for the default";
    }
    if (params.sink_mode < LMINF_SINK_CEILING || params.sink_mode > LMINF_SINK_TRUE) {
        return "sink_mode must be one of enum lminf_sink_mode";
    }
    if (params.attention < LMINF_ATTENTION_AUTO || params.attention > LMINF_ATTENTION_STOCK) {
        return "attention must be one of enum lminf_attention";
    }
    if (params.pos_bound < 0) {
        return "pos_bound must be 1 or more, or 0 to have it chosen";
    }
    if (params.n_seq_max < 0 || (size_t) params.n_seq_max > llama_max_parallel_sequences()) {
        return "n_seq_max must be 0 or more, and no more than llama_max_parallel_sequences()";
    }
    if (params.n_recall < 0 || params.n_recall > max_recall) {
        return "n_recall must be 0 to 4096";
    }
    if (params.n_recall > 0) {
        return check_recall(params);
    }
    return nullptr;
}

//
// lminf.h
//

lminf_params lminf_default_params() {
    return {
        /*.n_global     =*/ 10,
        /*.n_local      =*/ 4096,
        /*.max_distance =*/ 0,
        /*.n_slack      =*/ -1,
        /*.sink_mode    =*/ LMINF_SINK_CEILING,
        /*.pos_bound    =*/ 0,
        /*.attention    =*/ LMINF_ATTENTION_AUTO,
        /*.n_seq_max    =*/ 0,

        /*.n_recall        =*/ 0,
        /*.recall_distance =*/ 0,
        /*.recall_from     =*/ 0,
        /*.recall_every    =*/ 1,
        /*.recall_rule     =*/ LMINF_RECALL_LAYER,
        /*.recall_index    =*/ LMINF_RECALL_SKETCH,
        /*.n_archive       =*/ 0,
        /*.archive_type_k  =*/ GGML_TYPE_Q8_0,
        /*.archive_type_v  =*/ GGML_TYPE_Q8_0,
        /*.archive_bytes   =*/ 0,
        /*.archive_disk    =*/ 0,
    };
}

bool lminf_set_next(const lminf_params * params) {
    next_params = lminf_cparams();
    last_error.clear();

    if (!params) {
        return true;
    }
    if (const char * why = check_params(*params)) {
        lminf_set_error(why);
        return false;
    }

    next_params.enabled      = true;
    next_params.n_global     = params->n_global;
    next_params.n_local      = params->n_local;
    next_params.max_distance = params->max_distance > 0 ? params->max_distance : params->n_local;
    next_params.n_slack      = params->n_slack >= 0 ? params->n_slack : 64;
    next_params.pos_bound    = params->pos_bound;
    next_params.sink_mode    = (lminf_sink_mode) params->sink_mode;
    next_params.attention    = (lminf_attention) params->attention;
    next_params.n_seq_max    = params->n_seq_max;

    next_params.recall_distance = next_params.max_distance;
    if (params->n_recall == 0) {
        return true;
    }
    next_params.n_recall        = params->n_recall;
    next_params.recall_distance = params->recall_distance > 0 ? params->recall_distance : std::max(1, next_params.max_distance/2);
    next_params.recall_from     = params->recall_from;
    next_params.recall_every    = params->recall_every;
    next_params.recall_rule     = (lminf_recall_rule)  params->recall_rule;
    next_params.recall_index    = (lminf_recall_index) params->recall_index;
    next_params.n_archive       = params->n_archive;
    next_params.archive_type_k  = (ggml_type) params->archive_type_k;
    next_params.archive_type_v  = (ggml_type) params->archive_type_v;
    next_params.archive_bytes   = params->archive_bytes;
    next_params.archive_disk    = params->archive_disk;

    return true;
}

llama_context * lminf_init_from_model(llama_model * model, llama_context_params params, lminf_params lminf) {
    if (!lminf_set_next(&lminf)) {
        return nullptr;
    }
    if (const char * refusal = model ? lminf_refusal(model) : "there is no model") {
        next_params = lminf_cparams();
        lminf_set_error(refusal);
        return nullptr;
    }

    llama_context * res = llama_init_from_model(model, params);

    next_params = lminf_cparams();
    if (!res && last_error.empty()) {
        lminf_set_error("llama.cpp could not make the context: its log says why");
    }

    return res;
}

const char * lminf_last_error() {
    return last_error.c_str();
}

bool lminf_enabled(const llama_context * ctx) {
    return lminf_get_memory(ctx) != nullptr;
}

bool lminf_get_params(const llama_context * ctx, lminf_params * params) {
    const auto * mem = lminf_get_memory(ctx);
    if (!mem) {
        return false;
    }

    const auto & p = mem->get_params();
    *params = {
        p.n_global, p.n_local, p.max_distance, p.n_slack, p.sink_mode, p.pos_bound, p.attention,
        (int32_t) llama_n_seq_max(ctx),
        p.n_recall, p.recall_distance, p.recall_from, p.recall_every, p.recall_rule, p.recall_index, p.n_archive, p.archive_type_k, p.archive_type_v,
        p.archive_bytes, p.archive_disk,
    };

    return true;
}

// the memory, if the context has one and the sequence exists there
static lminf_memory * get_memory(const llama_context * ctx, llama_seq_id seq_id) {
    auto * mem = lminf_get_memory(ctx);
    if (!mem) {
        lminf_set_error("the context has no Λ cache");
        return nullptr;
    }
    if (!mem->is_valid(seq_id)) {
        lminf_set_error(format("sequence %d does not exist in this context", seq_id));
        return nullptr;
    }
    return mem;
}

bool lminf_get_info(const llama_context * ctx, llama_seq_id seq_id, lminf_info * info) {
    const auto * mem = get_memory(ctx, seq_id);
    if (!mem) {
        return false;
    }

    *info = mem->get_info(seq_id);

    return true;
}

bool lminf_get_parts(const llama_context * ctx, lminf_parts * parts) {
    const auto * mem = lminf_get_memory(ctx);
    if (!mem) {
        return false;
    }

    *parts = mem->get_parts();

    return true;
}

llama_pos lminf_next_pos(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    auto * mem = get_memory(ctx, seq_id);

    return mem ? mem->make_room(*ctx, seq_id, n_tokens) : -1;
}

bool lminf_rollback(llama_context * ctx, llama_seq_id seq_id, int64_t stream_pos) {
    auto * mem = get_memory(ctx, seq_id);
    if (!mem) {
        return false;
    }

    const auto & stream = mem->get_stream(seq_id);
    if (stream_pos <= stream.start) {
        return mem->seq_rm(seq_id, -1, -1);
    }

    const llama_pos pos = mem->graph_pos(seq_id, stream_pos);
    if ((pos <= 0 || !mem->seq_rm(seq_id, pos, -1)) && !mem->rebuild(seq_id, stream_pos)) {
        lminf_set_error(format("the sequence cannot go back to stream position %lld: what the next query needs of the tokens before it is gone",
                (long long) stream_pos));
        return false;
    }

    return true;
}

bool lminf_skip(llama_context * ctx, llama_seq_id seq_id, int64_t n_tokens) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && mem->skip(seq_id, n_tokens, nullptr);
}

bool lminf_skip_tokens(llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int64_t n_tokens) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && mem->skip(seq_id, n_tokens, tokens);
}

bool lminf_seq_set_sinks(llama_context * ctx, llama_seq_id seq_id, int32_t n_global) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && mem->seq_set_sinks(seq_id, n_global);
}

bool lminf_seq_set_recall(llama_context * ctx, llama_seq_id seq_id, int32_t n_recall) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && mem->seq_set_recall(seq_id, n_recall);
}

struct lminf_archived {
    lminf_archive archive;

    const lminf_memory * owner; // to be compared only
};

lminf_archived * lminf_archive_get(const llama_context * ctx, llama_seq_id seq_id) {
    auto * mem = get_memory(ctx, seq_id);
    if (!mem || !mem->get_recall()) {
        return nullptr;
    }
    mem->wait();

    return new lminf_archived{ mem->get_recall()->get_archive(seq_id), mem };
}

bool lminf_archive_set(llama_context * ctx, llama_seq_id seq_id, const lminf_archived * archived) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && archived && mem->seq_set_archive(seq_id, archived->archive, archived->owner != mem);
}

void lminf_archive_free(lminf_archived * archived) {
    delete archived;
}

uint64_t lminf_archive_bytes() {
    return lminf_archive::n_bytes_all();
}

int32_t lminf_archive_segments(const lminf_archived * archived, lminf_segment * segments, int32_t n_max) {
    const auto found = archived->archive.get_segments();

    std::copy_n(found.begin(), std::min<size_t>(found.size(), std::max(0, n_max)), segments);
    return (int32_t) found.size();
}

void lminf_archive_read(const lminf_archived * archived, const lminf_segment * segment, void * data) {
    archived->archive.read(*segment, (char *) data);
}

int32_t lminf_archive_ranges(const lminf_archived * archived, int64_t * ranges, int32_t n_max) {
    const auto & found = archived->archive.get_ranges();

    for (int32_t i = 0; i < std::min((int32_t) found.size(), n_max); ++i) {
        ranges[2*i + 0] = found[i].first;
        ranges[2*i + 1] = found[i].second;
    }
    return (int32_t) found.size();
}

lminf_archived * lminf_archive_new(const llama_context * ctx) {
    const auto * mem = get_memory(ctx, 0);

    return mem && mem->get_recall() ? new lminf_archived{ mem->get_recall()->new_archive(), mem } : nullptr;
}

bool lminf_archive_add(lminf_archived * archived, lminf_segment * segment, const void * data) {
    return archived->archive.add(*segment, (const char *) data);
}

bool lminf_archive_map(lminf_archived * archived, int64_t first, const char * path, uint64_t offset) {
    return archived->archive.map(first, path, offset);
}

void lminf_archive_set_ranges(lminf_archived * archived, const int64_t * ranges, int32_t n) {
    std::vector<lminf_archive::range> wanted;
    for (int32_t i = 0; i < n; ++i) {
        wanted.push_back({ ranges[2*i], ranges[2*i + 1] });
    }
    archived->archive.set_ranges(wanted);
}

bool lminf_seq_start(llama_context * ctx, llama_seq_id seq_id, int64_t stream_pos) {
    auto * mem = get_memory(ctx, seq_id);

    return mem && mem->seq_start(seq_id, stream_pos);
}
