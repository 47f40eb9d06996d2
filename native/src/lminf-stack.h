// Where the stack has come to, to bound functions that call themselves. It grows down wherever llama.cpp runs.

#pragma once

#include <cstdint>

#ifdef _MSC_VER
#    include <intrin.h>
#endif

// The address of a frame. That of a variable would not do: sanitizers move those.
inline uintptr_t lminf_stack_here() {
#ifdef _MSC_VER
    return reinterpret_cast<uintptr_t>(_AddressOfReturnAddress());
#else
    return reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
#endif
}
