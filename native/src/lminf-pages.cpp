#include "lminf-pages.h"

#include <cstdint>
#include <new>

#if defined(__linux__)

#include <sys/mman.h>

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

// whole huge pages only: what lies before and behind them belongs to others as well
static void advise(void * data, size_t size, int advice) {
    const uintptr_t begin = ((uintptr_t) data + lminf_huge_page - 1)/lminf_huge_page*lminf_huge_page;
    const uintptr_t end   = ((uintptr_t) data + size)/lminf_huge_page*lminf_huge_page;

    if (begin < end) {
        madvise((void *) begin, end - begin, advice);
    }
}

static void wish_for_huge_pages(void * data, size_t size) {
    if (!is_forbidden()) {
        advise(data, size, MADV_HUGEPAGE); // a wish that the system fulfils in its own time, or at the first touch
    }
}

void lminf_use_huge_pages(ggml_backend_buffer_t buffer) {
    if (!ggml_backend_buffer_is_host(buffer) || is_forbidden()) {
        return;
    }
    void       * data = ggml_backend_buffer_get_base(buffer);
    const size_t size = ggml_backend_buffer_get_size(buffer);

    wish_for_huge_pages(data, size);
    advise(data, size, MADV_COLLAPSE); // now
}

#else

void lminf_use_huge_pages(ggml_backend_buffer_t buffer) {
    GGML_UNUSED(buffer);
}

#if !defined(_WIN32)
static void wish_for_huge_pages(void * data, size_t size) {
    GGML_UNUSED(data);
    GGML_UNUSED(size);
}
#endif

#endif

#if defined(_WIN32)

std::shared_ptr<char[]> lminf_new_pages(size_t size) {
    return std::shared_ptr<char[]>(new (std::nothrow) char[size]);
}

std::shared_ptr<char[]> lminf_map_file(const char * path, size_t offset, size_t size) {
    GGML_UNUSED(path);
    GGML_UNUSED(offset);
    GGML_UNUSED(size);
    return nullptr;
}

#else

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

std::shared_ptr<char[]> lminf_new_pages(size_t size) {
    const size_t n_all = size < lminf_huge_page ? size : size + lminf_huge_page; // huge ones begin at multiples of their size

    void * all = mmap(nullptr, n_all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
        return nullptr;
    }
    char * data = (char *) all;
    if (n_all > size) {
        data = (char *) (((uintptr_t) all + lminf_huge_page - 1)/lminf_huge_page*lminf_huge_page);
    }
    wish_for_huge_pages(data, size);

    return std::shared_ptr<char[]>(data, [all, n_all](char *) { munmap(all, n_all); });
}

std::shared_ptr<char[]> lminf_map_file(const char * path, size_t offset, size_t size) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return nullptr;
    }
    struct stat status;
    void * data = MAP_FAILED;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && (size_t) status.st_size >= offset + size) {
        data = mmap(nullptr, offset + size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0); // from its start: offset need be no page's
    }
    close(fd);
    if (data == MAP_FAILED) {
        return nullptr;
    }
    return std::shared_ptr<char[]>((char *) data + offset, [offset, size](char * p) { munmap(p - offset, offset + size); });
}

#endif
