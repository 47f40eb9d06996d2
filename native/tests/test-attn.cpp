// GGML_OP_LMINF_ATTN on a ggml device against float64
//
//   test-attn [device]     the device's name as ggml has it (CPU, CUDA0, MTL0, ...); default: every device that takes the op
//   test-attn --threads N  on the CPU with so many threads
//   test-attn --load PATH  with the best of the backends in a folder, or the one in a file: for those that are modules
//   test-attn --percent N  so many of the cases

#include "attn-cases.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

static ggml_backend_t backend;

static std::vector<char> host_copy(const ggml_tensor * t) {
    return { (const char *) t->data, (const char *) t->data + ggml_nbytes(t) };
}

// the same operation on the backend's own memory
static bool compute(ggml_tensor * op) {
    ggml_context * ctx = ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });

    // a view's data lies in the tensor it views: move that one, and point the copy of the view at it
    std::map<const ggml_tensor *, ggml_tensor *> moved;
    const auto move = [&](const ggml_tensor * t) {
        const ggml_tensor * all = t->view_src ? t->view_src : t;
        if (!moved[all]) {
            moved[all] = ggml_dup_tensor(ctx, all);
        }
        ggml_tensor * res = moved[all];
        if (t->view_src) {
            res = ggml_view_4d(ctx, res, t->ne[0], t->ne[1], t->ne[2], t->ne[3], t->nb[1], t->nb[2], t->nb[3], t->view_offs);
        }
        return res;
    };

    ggml_tensor * res = ggml_dup_tensor(ctx, op);
    res->op = op->op;
    memcpy(res->op_params, op->op_params, sizeof(op->op_params));
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        res->src[i] = op->src[i] ? move(op->src[i]) : nullptr;
    }

    if (!ggml_backend_supports_op(backend, res)) {
        ggml_free(ctx);
        return false;
    }

    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    for (const auto & [from, to] : moved) {
        ggml_backend_tensor_set(to, host_copy(from).data(), 0, ggml_nbytes(from));
    }
    ggml_backend_tensor_set(res, op->data, 0, ggml_nbytes(op)); // the poison

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, res);

    const bool ok = ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS;
    ggml_backend_tensor_get(res, op->data, 0, ggml_nbytes(op));

    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);

    if (!ok) {
        fprintf(stderr, "the backend could not compute the graph\n");
        exit(1);
    }
    return true;
}

int main(int argc, char ** argv) {
    int          n_threads = 2;
    uint32_t     percent   = 100;
    const char * only      = nullptr;

    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--percent") == 0 && i + 1 < argc) {
            percent = atoi(argv[++i]);
        } else if (strcmp(argv[i], "--load") == 0 && i + 1 < argc) {
            const char * path = argv[++i];
            if (std::filesystem::is_directory(path)) {
                ggml_backend_load_all_from_path(path);
            } else {
                ggml_backend_load(path);
            }
        } else {
            only = argv[i];
        }
    }

    std::mt19937 rng = attn_seed();

    int n_devices = 0;
    int status    = 0;

    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const char *       name = ggml_backend_dev_name(dev);
        if (only && strcmp(only, name) != 0) {
            continue;
        }
        ++n_devices;

        backend = ggml_backend_dev_init(dev, nullptr);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            ((ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads"))(backend, n_threads);
        }
        if (!only && !compute(attn_problem(attn_case(), rng).op())) {
            printf("%s does not have the operation\n", name); // BLAS, say
        } else {
            auto cases = attn_grid(rng);
            cases.erase(std::remove_if(cases.begin(), cases.end(), [&](const attn_case &) { return rng() % 100 >= percent; }), cases.end());
            status |= attn_run(name, cases, rng, compute);
        }
        ggml_backend_free(backend);
    }

    if (n_devices == 0) {
        fprintf(stderr, "error: there is no device %s\n", only ? only : "at all");
        return 1;
    }
    return status;
}
