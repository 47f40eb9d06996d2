// runs a GPU kernel's threads on the CPU, so that CUDA and Metal sources can be tested where there is no GPU
//
// Each thread of a block ("lane") is a fiber with its own stack. One runs at a time, until it reaches a barrier or a warp
// exchange; the order in which they go on is drawn at random, so that a missing barrier gives wrong results instead of
// luck. Lanes that wait for each other for ever end the program with a message. Nothing here says how fast a GPU is.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>

namespace lanes {

constexpr int WARP = 32;

struct index3 {
    uint32_t x = 0, y = 0, z = 0;
};

// of the lane that is running
index3 thread_index();
index3 block_index();
index3 block_size();
index3 grid_size();

int  lane();        // in its warp, 0..31
int  warp();        // in its block
char * shared();    // the block's dynamic shared memory, filled with NaN (0xFF) when the block starts

// memory which all lanes of the block share, the same for the same `key` (a static shared variable's address, say)
char * shared_static(const void * key, size_t size);

void block_barrier();
void warp_barrier();

// gives every lane of the warp what `from` passed in; all lanes of the warp must take part
void warp_read(const void * mine, void * theirs, size_t size, int from);

template <typename T> T shuffle(T value, int from) {
    T res;
    warp_read(&value, &res, sizeof(T), from & (WARP - 1));
    return res;
}

// runs `kernel` once per lane of every block, block after block. Block sizes must be multiples of 32
void launch(index3 grid, index3 block, size_t n_shared, std::mt19937 & rng, const std::function<void()> & kernel);

} // namespace lanes
