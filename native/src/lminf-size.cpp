// what a context's memory takes, whatever kind it is

#include "lminf.h"

#include "llama-ext.h"

uint64_t lminf_memory_bytes(const llama_context * ctx) {
    uint64_t res = 0;

    for (const auto & [_, size] : llama_get_memory_breakdown(ctx)) {
        res += size.context;
    }

    return res;
}
