// the memory pages a cache lies in

#pragma once

#include "ggml-backend.h"

// Asks the system to keep a buffer in huge pages, where it lies in main memory: attention reads every row of the cache for
// every token, and has thousands of pages of 4 KiB to find. Contents stay as they are, which may take a copy; what the system
// cannot or, by its setting, must not do stays undone. Linux only: macOS has no such call, Windows wants a privilege for it.
void lminf_use_huge_pages(ggml_backend_buffer_t buffer);
