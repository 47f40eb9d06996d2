#include "lminf-attn-metal.h"

#include "lminf-attn.h"

#include "lminf_attn.metal" // without its kernels

#include "ggml-impl.h"

#include <algorithm>
#include <string>

static_assert(
    LMINF_ATTN_METAL_F32  == GGML_TYPE_F32  && LMINF_ATTN_METAL_F16  == GGML_TYPE_F16 && LMINF_ATTN_METAL_BF16 == GGML_TYPE_BF16 &&
    LMINF_ATTN_METAL_Q8_0 == GGML_TYPE_Q8_0 && LMINF_ATTN_METAL_Q4_0 == GGML_TYPE_Q4_0, "the kernels know other numbers");

// how an operation is divided among threadgroups; from shapes alone, as scratch memory is allocated before any data exist
struct launch_plan {
    bool    is_prefill;
    int32_t n_rows;   // per threadgroup
    int32_t n_sg;     // simdgroups per threadgroup
    int32_t n_tile;   // of rows, per KV head
    int32_t n_split;
    size_t  n_shared; // bytes
};

// upstream's flash attention changes kernels at 20 queries as well; not measured for ours
static const int32_t N_Q_PREFILL = 20;

// decode: enough threadgroups for the largest GPU, but a block of cells for each simdgroup, and a lane of `combine` for each split
static const int64_t N_THREADGROUP = 256;
static const int64_t N_SPLIT_MAX   = 32;

// elements of a head; K has 64 more than V where V is a part of it (multi-head latent attention)
static const int64_t N_EMBD_K_MAX = 576;
static const int64_t N_EMBD_V_MAX = 512;

// heads that kernels of their own are for
static bool is_wide(const lminf_attn_args & args) {
    return std::max(args.n_embd_head_k, args.n_embd_head_v) > 256;
}

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static launch_plan get_plan(const lminf_attn_args & args, int32_t n_q) {
    const int64_t n_rows_all = (int64_t) n_q*(args.n_head/args.n_head_kv);

    launch_plan res = {};

    size_t n_float;
    if (n_q >= N_Q_PREFILL) {
        res.is_prefill = true;
        res.n_sg       = args.n_embd_head_k <= 128 || is_wide(args) ? 4 : 2;
        res.n_rows     = is_wide(args) ? 8 : 8*res.n_sg;
        res.n_tile     = ceil_div(n_rows_all, res.n_rows);
        res.n_split    = 1;
        n_float        = LMINF_ATTN_METAL_PREFILL_SHARED(args.n_embd_head_k, res.n_rows, res.n_sg);
    } else {
        res.n_sg       = 4;
        res.n_rows     = n_rows_all <= 4 || is_wide(args) ? 4 : n_rows_all <= 8 || args.n_embd_head_v > 128 ? 8 : 16;
        res.n_tile     = ceil_div(n_rows_all, res.n_rows);

        const int64_t n_block = ceil_div(args.n_sink, LMINF_ATTN_METAL_BLOCK) + ceil_div(args.n_kv, LMINF_ATTN_METAL_BLOCK);
        const int64_t n_other = (int64_t) res.n_tile*args.n_head_kv*args.n_stream;
        res.n_split    = std::clamp<int64_t>(std::min(ceil_div(n_block, res.n_sg), ceil_div(N_THREADGROUP, n_other)), 1, N_SPLIT_MAX);
        n_float        = LMINF_ATTN_METAL_DECODE_SHARED(std::max(args.n_embd_head_k, args.n_embd_head_v), res.n_rows, res.n_sg);
    }
    res.n_shared = GGML_PAD(n_float*sizeof(float), 16);

    return res;
}

// rows are read four elements at a time
static bool is_aligned(const ggml_tensor * t) {
    if (!t || ggml_is_quantized(t->type)) {
        return true;
    }
    const size_t n = 4*ggml_type_size(t->type);
    return t->nb[1] % n == 0 && t->nb[2] % n == 0 && t->nb[3] % n == 0 && t->view_offs % n == 0;
}

bool lminf_attn_metal_supports(const ggml_metal_device_props * props, const ggml_tensor * op) {
    if (!props->has_simdgroup_reduction || !props->has_simdgroup_mm || !lminf_attn_is_valid(op)) {
        return false;
    }

    for (const auto src : { LMINF_ATTN_Q, LMINF_ATTN_K, LMINF_ATTN_V, LMINF_ATTN_Q_SINK, LMINF_ATTN_K_SINK, LMINF_ATTN_V_SINK }) {
        if (!is_aligned(op->src[src])) {
            return false;
        }
    }

    const lminf_attn_args args = lminf_attn_get_args(op);
    return args.n_embd_head_k % 8 == 0 && args.n_embd_head_k <= N_EMBD_K_MAX &&
        args.n_embd_head_v % 8 == 0 && args.n_embd_head_v <= N_EMBD_V_MAX &&
        get_plan(args, args.n_q).n_shared <= props->max_theadgroup_memory_size;
}

// what the largest batch gets must do for every smaller one, or graphs would be allocated anew when batches alternate
size_t lminf_attn_metal_scratch_size(const ggml_tensor * op) {
    const lminf_attn_args args = lminf_attn_get_args(op);

    int64_t n_part = 0; // splits of queries
    for (int32_t n_q = 1; n_q <= args.n_q && n_q < N_Q_PREFILL; ++n_q) {
        n_part = std::max<int64_t>(n_part, (int64_t) n_q*get_plan(args, n_q).n_split);
    }
    // sums of values, the maximum, the sum of weights
    return n_part*args.n_head*args.n_stream*(args.n_embd_head_v + 2)*sizeof(float);
}

static ggml_metal_pipeline_with_params get_pipeline(ggml_metal_library_t lib, const launch_plan & plan, const lminf_attn_args & args) {
    const int32_t n_v = args.n_embd_head_v;

    const std::string base = plan.is_prefill ?
        std::string("kernel_lminf_attn_prefill_") + (is_wide(args) ? "wide" : n_v <= 64 ? "64" : n_v <= 128 ? "128" : "256") :
        "kernel_lminf_attn_decode_" + (is_wide(args) ? "wide" : std::to_string(plan.n_rows));

    const struct { int32_t index, value; } constants[] = {
        { LMINF_ATTN_METAL_FC_N_EMBD_K,    args.n_embd_head_k },
        { LMINF_ATTN_METAL_FC_N_EMBD_V,    args.n_embd_head_v },
        { LMINF_ATTN_METAL_FC_TYPE_K,      args.k.type        },
        { LMINF_ATTN_METAL_FC_TYPE_V,      args.v.type        },
        { LMINF_ATTN_METAL_FC_TYPE_K_SINK, args.n_sink > 0 ? args.k_sink.type : args.k.type },
        { LMINF_ATTN_METAL_FC_TYPE_V_SINK, args.n_sink > 0 ? args.v_sink.type : args.v.type },
        { LMINF_ATTN_METAL_FC_N_SG,        plan.n_sg          },
    };

    std::string name = base;
    for (const auto & c : constants) {
        name += "_" + std::to_string(c.value);
    }

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        for (const auto & c : constants) {
            ggml_metal_cv_set_int32(cv, c.value, c.index);
        }
        res = ggml_metal_library_compile_pipeline(lib, base.c_str(), name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    return res;
}

static ggml_metal_pipeline_with_params get_pipeline_combine(ggml_metal_library_t lib) {
    const char * name = "kernel_lminf_attn_combine";

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name);
    if (!res.pipeline) {
        res = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
    }
    return res;
}

static lminf_attn_metal_strides get_strides(const lminf_attn_operand & x) {
    return { (uint64_t) x.nb1, (uint64_t) x.nb2, (uint64_t) x.nb3 };
}

void lminf_attn_metal_encode(
        ggml_metal_library_t   lib,
        ggml_metal_encoder_t   enc,
        const ggml_tensor    * op,
        ggml_metal_buffer_id (*get_buffer)(const ggml_tensor * t)) {
    const lminf_attn_args args = lminf_attn_get_args(op);
    const launch_plan     plan = get_plan(args, args.n_q);

    lminf_attn_metal_args kargs = {};

    kargs.q      = get_strides(args.q);
    kargs.k      = get_strides(args.k);
    kargs.v      = get_strides(args.v);
    kargs.mask   = get_strides(args.mask);
    kargs.q_sink = get_strides(args.q_sink);
    kargs.k_sink = get_strides(args.k_sink);
    kargs.v_sink = get_strides(args.v_sink);

    kargs.n_q            = args.n_q;
    kargs.n_head         = args.n_head;
    kargs.n_head_kv      = args.n_head_kv;
    kargs.n_sink         = args.n_sink;
    kargs.n_kv           = args.n_kv;
    kargs.n_embd_head_v  = args.n_embd_head_v;
    kargs.n_split        = plan.n_split;
    kargs.n_rows_all     = ggml_nrows(op);
    kargs.has_head_sinks = args.head_sinks != nullptr;

    kargs.scale         = args.scale;
    kargs.logit_softcap = args.logit_softcap;
    kargs.max_bias      = args.max_bias;
    kargs.m0            = args.m0;
    kargs.m1            = args.m1;
    kargs.n_head_log2   = args.n_head_log2;

    const ggml_metal_buffer_id dst = get_buffer(op);

    ggml_metal_buffer_id scratch = dst;
    scratch.offs += ggml_nbytes(op);

    // every buffer of a kernel wants to be set, operands that do not exist to any that does
    const auto buffer = [&](lminf_attn_src src) {
        return get_buffer(op->src[op->src[src] ? src : LMINF_ATTN_Q]);
    };

    const ggml_metal_pipeline_with_params pipeline = get_pipeline(lib, plan, args);

    GGML_ASSERT(pipeline.pipeline && 32*plan.n_sg <= ggml_metal_pipeline_max_theads_per_threadgroup(pipeline));

    ggml_metal_encoder_set_pipeline(enc, pipeline);
    ggml_metal_encoder_set_bytes   (enc, &kargs, sizeof(kargs), 0);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_Q),          1);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_K),          2);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_V),          3);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_MASK),       4);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_HEAD_SINKS), 5);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_Q_SINK),     6);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_K_SINK),     7);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_V_SINK),     8);
    ggml_metal_encoder_set_buffer  (enc, plan.is_prefill ? dst : scratch, 9);

    ggml_metal_encoder_set_threadgroup_memory_size(enc, plan.n_shared, 0);

    if (plan.is_prefill) {
        ggml_metal_encoder_dispatch_threadgroups(enc, plan.n_tile, args.n_head_kv, args.n_stream, 32, plan.n_sg, 1);
        return;
    }

    ggml_metal_encoder_dispatch_threadgroups(enc, plan.n_split, plan.n_tile*args.n_head_kv, args.n_stream, 32, plan.n_sg, 1);

    // kernels of one encoder run concurrently
    ggml_metal_encoder_memory_barrier(enc);

    ggml_metal_encoder_set_pipeline(enc, get_pipeline_combine(lib));
    ggml_metal_encoder_set_bytes   (enc, &kargs, sizeof(kargs), 0);
    ggml_metal_encoder_set_buffer  (enc, scratch,                       1);
    ggml_metal_encoder_set_buffer  (enc, buffer(LMINF_ATTN_HEAD_SINKS), 2);
    ggml_metal_encoder_set_buffer  (enc, dst,                           3);

    ggml_metal_encoder_dispatch_threadgroups(enc, kargs.n_rows_all, 1, 1, 32, 1, 1);
}
