// the memory pages a cache lies in

#pragma once

#include "ggml-backend.h"

// Asks the system to keep a buffer in huge pages, where it lies in main memory. Attention reads every row of the cache for
// every token: with pages of 4 KiB a good part of its time goes into finding them. Contents stay as they are; where the
// system cannot do it, nothing happens. Linux only: macOS has no such call, Windows wants a privilege for it.
void lminf_use_huge_pages(ggml_backend_buffer_t buffer);
