// the Metal kernels of GGML_OP_LMINF_ATTN as C++ on the CPU (emulate/metal.h), launched by the very host code that
// launches them on a GPU: the C functions by which it talks to the Metal backend are played below
//
//   test-attn-metal-emulated [PERCENT]   of the cases in attn_grid, default 30
//
// Compiled with -Wno-attributes. LMINF_METAL_TEXT names another file to compile instead of lminf_attn.metal: the text that
// CMake embeds, which has upstream's common.h in front of it.

#include "attn-cases.h"
#include "lanes.h"

#include "lminf-attn.h"
#include "lminf-attn-metal.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#ifndef LMINF_METAL_TEXT
#define LMINF_METAL_TEXT "lminf_attn.metal"
#endif

// lminf-attn-metal.h does not include the source, but should it ever: as Metal it is something else
#include "metal.h"

namespace msl {
#include LMINF_METAL_TEXT
}

#undef kernel
#undef device
#undef constant
#undef thread
#undef threadgroup

static void fail(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    abort();
}

//
// the Metal backend, as far as the host code needs it
//

struct ggml_metal_cv {
    std::map<int32_t, int32_t> values;
};

struct ggml_metal_pipeline {
    std::string base;
    std::map<int32_t, int32_t> constants;
};

struct ggml_metal_library {
    std::map<std::string, ggml_metal_pipeline> pipelines; // by name, as upstream keeps them
};

struct ggml_metal_encoder {
    const ggml_metal_pipeline * pipeline = nullptr;

    std::vector<char> bytes;
    std::map<int, char *> buffers;
    size_t n_shared = 0;

    bool is_dispatched = false; // something that no barrier has waited for
    size_t n_dispatch  = 0;

    std::mt19937 * rng;
};

static std::map<std::string, size_t> n_launched; // by kernel

ggml_metal_cv_t ggml_metal_cv_init() { return new ggml_metal_cv; }

void ggml_metal_cv_free(ggml_metal_cv_t cv) { delete cv; }

void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) { cv->values[idx] = value; }

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params res = {};
    const auto it = lib->pipelines.find(name);
    if (it != lib->pipelines.end()) {
        res.pipeline = &it->second;
    }
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    lib->pipelines[name] = { base, cv ? cv->values : std::map<int32_t, int32_t>() };
    return ggml_metal_library_get_pipeline(lib, name);
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->pipeline = pipeline.pipeline;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    if (idx != 0 || size > 4096) {
        fail("bytes are argument 0 of every kernel, 4 KiB at most");
    }
    enc->bytes.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    enc->buffers[idx] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    if (idx != 0 || size % 16 != 0 || size > 32*1024) {
        fail("threadgroup memory is argument 0, a multiple of 16 bytes and at most 32 KiB");
    }
    enc->n_shared = size;
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) { enc->is_dispatched = false; }

static int32_t get_constant(const ggml_metal_pipeline & pipeline, int32_t index) {
    const auto it = pipeline.constants.find(index);
    if (it == pipeline.constants.end()) {
        fail("function constant " + std::to_string(index) + " is not set");
    }
    return it->second;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    // a concurrent encoder might run it together with the one before
    if (enc->is_dispatched) {
        fail("no memory barrier between two kernels");
    }
    enc->is_dispatched = true;
    enc->n_dispatch++;

    const auto & name = enc->pipeline->base;
    n_launched[name]++;

    typedef const char * bytes;
    typedef const float * floats;

    const auto b = [&](int i) {
        if (!enc->buffers[i]) {
            fail("buffer " + std::to_string(i) + " of " + name + " is not set");
        }
        return enc->buffers[i];
    };

    msl::lminf_attn_metal_args args;
    if (enc->bytes.size() != sizeof(args)) {
        fail("the arguments have another size");
    }
    memcpy(&args, enc->bytes.data(), sizeof(args));

    const auto launch = [&](const std::function<void(msl::metal::uint3, uint16_t, uint16_t)> & f) {
        const auto run = [&]() {
            const auto group = lanes::block_index();
            f({ group.x, group.y, group.z }, lanes::lane(), lanes::warp());
        };
        lanes::launch({ (uint32_t) tg0, (uint32_t) tg1, (uint32_t) tg2 }, { (uint32_t) tptg0, (uint32_t) tptg1, (uint32_t) tptg2 },
                enc->n_shared, *enc->rng, run);
    };

    if (name == "kernel_lminf_attn_combine") {
        launch([&](msl::metal::uint3 group, uint16_t lane, uint16_t) {
            msl::kernel_lminf_attn_combine(args, (floats) b(1), (floats) b(2), (float *) b(3), group, lane);
        });
        return;
    }

    static const std::map<std::string, decltype(&msl::kernel_lminf_attn_decode_4)> kernels = {
        { "kernel_lminf_attn_decode_4",     msl::kernel_lminf_attn_decode_4     },
        { "kernel_lminf_attn_decode_8",     msl::kernel_lminf_attn_decode_8     },
        { "kernel_lminf_attn_decode_16",    msl::kernel_lminf_attn_decode_16    },
        { "kernel_lminf_attn_decode_wide",  msl::kernel_lminf_attn_decode_wide  },
        { "kernel_lminf_attn_prefill_64",   msl::kernel_lminf_attn_prefill_64   },
        { "kernel_lminf_attn_prefill_128",  msl::kernel_lminf_attn_prefill_128  },
        { "kernel_lminf_attn_prefill_256",  msl::kernel_lminf_attn_prefill_256  },
        { "kernel_lminf_attn_prefill_wide", msl::kernel_lminf_attn_prefill_wide },
    };
    const auto it = kernels.find(name);
    if (it == kernels.end()) {
        fail("there is no kernel " + name);
    }

    msl::lminf_n_embd_k    = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_N_EMBD_K);
    msl::lminf_n_embd_v    = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_N_EMBD_V);
    msl::lminf_type_k      = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_TYPE_K);
    msl::lminf_type_v      = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_TYPE_V);
    msl::lminf_type_k_sink = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_TYPE_K_SINK);
    msl::lminf_type_v_sink = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_TYPE_V_SINK);
    msl::lminf_n_sg        = get_constant(*enc->pipeline, LMINF_ATTN_METAL_FC_N_SG);

    launch([&](msl::metal::uint3 group, uint16_t lane, uint16_t sg) {
        it->second(args, (bytes) b(1), (bytes) b(2), (bytes) b(3), (bytes) b(4), (floats) b(5), (bytes) b(6), (bytes) b(7), (bytes) b(8),
                (float *) b(9), (float *) lanes::shared(), group, lane, sg);
    });
}

//
// the test
//

static std::mt19937       lane_rng;
static ggml_metal_library library;
static const ggml_tensor * current;
static std::vector<float> memory; // result, scratch, and a margin nobody may touch

static ggml_metal_buffer_id get_buffer(const ggml_tensor * t) {
    if (!t) {
        return { nullptr, 0 };
    }
    return t == current ? ggml_metal_buffer_id{ memory.data(), 0 } : ggml_metal_buffer_id{ t->data, 0 };
}

static ggml_metal_device_props get_props() {
    ggml_metal_device_props props = {};
    props.has_simdgroup_reduction    = true;
    props.has_simdgroup_mm           = true;
    props.max_theadgroup_memory_size = 32*1024;
    return props;
}

static bool compute(ggml_tensor * op) {
    const auto props = get_props();
    if (!lminf_attn_metal_supports(&props, op)) {
        return false;
    }

    const size_t n        = ggml_nelements(op);
    const size_t n_used   = n + lminf_attn_metal_scratch_size(op)/sizeof(float);
    const size_t n_margin = 1024;
    memory.assign(n_used + n_margin, NAN);
    current = op;

    ggml_metal_encoder enc;
    enc.rng = &lane_rng;
    lminf_attn_metal_encode(&library, &enc, op, get_buffer);

    const std::vector<float> margin(n_margin, NAN);
    if (memcmp(memory.data() + n_used, margin.data(), n_margin*sizeof(float)) != 0) {
        fail("something was written behind the scratch memory");
    }
    memcpy(op->data, memory.data(), n*sizeof(float));
    return true;
}

// what must be declined is, and a larger batch never needs less memory
static void check_host_code(std::mt19937 & rng) {
    const auto is_taken = [&](const attn_case & c, const ggml_metal_device_props & props) {
        return lminf_attn_metal_supports(&props, attn_problem(c, rng).op());
    };

    const attn_case usual;
    attn_case long_k  = usual, long_v = usual, odd_v = usual;
    long_k.n_embd_head_k = 584;
    long_v.n_embd_head_v = 520;
    odd_v.n_embd_head_v  = 12;

    auto no_reduction = get_props(), no_mm = get_props(), little = get_props();
    no_reduction.has_simdgroup_reduction = false;
    no_mm.has_simdgroup_mm               = false;
    little.max_theadgroup_memory_size    = 1024;

    if (!is_taken(usual, get_props()) || is_taken(long_k, get_props()) || is_taken(long_v, get_props()) || is_taken(odd_v, get_props()) ||
            is_taken(usual, no_reduction) || is_taken(usual, no_mm) || is_taken(usual, little)) {
        fail("operations or devices are not declined as they should be");
    }

    size_t n_before = 0;
    for (int32_t n_q = 1; n_q < 40; ++n_q) {
        attn_case c = usual;
        c.n_q  = n_q;
        c.n_kv = 2048;
        const attn_problem problem(c, rng);
        const size_t n = ggml_nbytes(problem.op()) + lminf_attn_metal_scratch_size(problem.op());
        if (n < n_before) {
            fail("a larger batch needs less memory");
        }
        n_before = n;
    }
}

int main(int argc, char ** argv) {
    const uint32_t percent = argc > 1 ? atoi(argv[1]) : 30;

    std::mt19937 rng = attn_seed();
    lane_rng.seed(rng());

    check_host_code(rng);

    std::vector<attn_case> cases;
    for (const attn_case & c : attn_grid(rng)) {
        if (rng() % 100 < percent) {
            cases.push_back(c);
        }
    }

    // as many splits as there can be, and many that see nothing
    for (attn_mask_kind mask : { ATTN_MASK_OPEN, ATTN_MASK_ONE, ATTN_MASK_WINDOW }) {
        attn_case c;
        c.n_head    = 4;
        c.n_head_kv = 1;
        c.n_kv      = 4500;
        c.mask      = mask;
        cases.push_back(c);
    }

    const int status = attn_run("Metal kernels on the CPU", cases, rng, compute, attn_limit_f32);

    printf("launched:");
    for (const auto & [name, count] : n_launched) {
        printf(" %zu %s", count, name.c_str() + strlen("kernel_lminf_attn_"));
    }
    printf("\n");

    if (n_launched.size() < 9 && percent >= 30) {
        printf("not every kernel was run\n");
        return 1;
    }
    return status;
}
