// what patches/ adds to ggml's RPC backend: only equal builds talk to each other, and a machine that is gone is noticed

#pragma once

#include "ggml-rpc.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One of the three bytes that a server names in its hello. They stand for the build (CMakeLists.txt says of what), since
// operations and types travel by their numbers. The first is above 127, unlike upstream's, so that a stock llama.cpp and
// ours refuse each other as well.
GGML_BACKEND_API uint8_t lminf_rpc_version(int32_t i);

// Lets a connection fail once the other machine has not answered for half a minute: without power or a cable it never
// says goodbye, and upstream would wait for ever. Its kernel answers, however long it computes. Always true.
bool lminf_rpc_keep_alive(intptr_t sockfd);

#ifdef __cplusplus
}
#endif

#undef  RPC_PROTO_MAJOR_VERSION
#undef  RPC_PROTO_MINOR_VERSION
#undef  RPC_PROTO_PATCH_VERSION
#define RPC_PROTO_MAJOR_VERSION lminf_rpc_version(0)
#define RPC_PROTO_MINOR_VERSION lminf_rpc_version(1)
#define RPC_PROTO_PATCH_VERSION lminf_rpc_version(2)
