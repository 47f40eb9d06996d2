#include "lminf-pages.h"

#if defined(__linux__)

#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <string>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 // Linux 6.1
#endif

// MADV_COLLAPSE does not ask
static bool is_forbidden() {
    std::string setting;
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::getline(file, setting);
    return setting.find("[never]") != std::string::npos;
}

void lminf_use_huge_pages(ggml_backend_buffer_t buffer) {
    if (!ggml_backend_buffer_is_host(buffer) || is_forbidden()) {
        return;
    }

    // whole huge pages only: what lies before and behind them belongs to others as well
    constexpr uintptr_t size_page = 2*1024*1024;

    const uintptr_t base  = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t begin = (base + size_page - 1)/size_page*size_page;
    const uintptr_t end   = (base + ggml_backend_buffer_get_size(buffer))/size_page*size_page;

    if (begin < end) {
        // the first is a wish that the system fulfils in its own time, the second does it now
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);
        madvise((void *) begin, end - begin, MADV_COLLAPSE);
    }
}

#else

void lminf_use_huge_pages(ggml_backend_buffer_t buffer) {
    GGML_UNUSED(buffer);
}

#endif
