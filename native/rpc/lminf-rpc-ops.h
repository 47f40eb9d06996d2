// Whether a remote device has the fused attention. Upstream takes it that every device has every operation and never asks.
// Ours asks, in the message for the size of a tensor, which holds an operation and its operands.
// Included by ggml-rpc.cpp, below the messages and the dispatcher.

#pragma once

// the client's half
static bool lminf_rpc_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    if (op->op != GGML_OP_LMINF_ATTN) {
        return op->op != GGML_OP_CUSTOM; // a function of this process: recall
    }
    const auto * ctx = (const ggml_backend_rpc_device_context *) dev->context;

    // nothing but the kind of operation, so that each kind is asked for once
    const auto describe = [](const ggml_tensor * tensor) {
        rpc_tensor res = serialize_tensor(tensor);
        res.id     = tensor != nullptr;
        res.buffer = res.data = res.view_src = 0;
        res.flags  = 0;
        memset(res.src,  0, sizeof(res.src));
        memset(res.name, 0, sizeof(res.name));
        return res;
    };
    auto request = std::make_shared<rpc_msg_get_alloc_size_req>();
    request->device = ctx->device;
    request->tensor = describe(op);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        request->srcs[i] = describe(op->src[i]);
    }

    const std::string key = ctx->endpoint + '\0' + std::string((const char *) request.get(), sizeof(*request));

    static std::mutex mutex;
    static std::unordered_map<std::string, bool> known;
    {
        std::lock_guard<std::mutex> lock(mutex);
        const auto it = known.find(key);
        if (it != known.end()) {
            return it->second;
        }
    }

    rpc_msg_get_alloc_size_rsp response;
    get_dispatcher(ctx->endpoint)->send(RPC_CMD_GET_ALLOC_SIZE, request, sizeof(*request), &response, sizeof(response));

    std::lock_guard<std::mutex> lock(mutex);
    return known[key] = response.alloc_size != 0;
}

// the server's
static uint64_t lminf_rpc_alloc_size(ggml_backend_t backend, ggml_backend_buffer_type_t buft, ggml_tensor * tensor, const rpc_msg_get_alloc_size_req & request) {
    if (tensor->op != GGML_OP_LMINF_ATTN) {
        return ggml_backend_buft_get_alloc_size(buft, tensor);
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (tensor->src[i]) {
            tensor->src[i]->view_offs = request.srcs[i].view_offs; // some kernels have demands on it
        }
    }
    return ggml_backend_supports_op(backend, tensor);
}
