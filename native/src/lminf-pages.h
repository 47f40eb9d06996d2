// the memory pages a cache or an archive lies in

#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <memory>

// Asks the system to keep a buffer in huge pages, where it lies in main memory: attention reads every row of the cache for
// every token, and has thousands of pages of 4 KiB to find. Contents stay as they are, which may take a copy; what the system
// cannot or, by its setting, must not do stays undone. Linux only: macOS has no such call, Windows wants a privilege for it.
void lminf_use_huge_pages(ggml_backend_buffer_t buffer);

// Memory of its own pages, in huge ones if it fills one: what goes is the system's again at once, where an allocator would keep it,
// in pieces that fit nothing else. What was never touched takes none. NULL if there is none
std::shared_ptr<char[]> lminf_new_pages(size_t size);

// a part of a file as memory, which the system reads when it is looked at and can take back; what is written to it stays in memory.
// The file must keep its size. NULL if it has not so many bytes, cannot be opened, or the system has no such call
std::shared_ptr<char[]> lminf_map_file(const char * path, size_t offset, size_t size);

constexpr size_t lminf_huge_page = 2*1024*1024;
