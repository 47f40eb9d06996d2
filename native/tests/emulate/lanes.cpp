#include "lanes.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace lanes {

enum lane_state { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

static constexpr size_t N_STACK = 256*1024;
static constexpr size_t N_SLOT  = 64; // bytes a lane can show its warp at once

struct lane_fiber {
    index3     index;
    int        id = 0;
    lane_state state = READY;

    bool       started = false;
    jmp_buf    resume;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[N_STACK]};

    alignas(16) char slot[N_SLOT];
};

static struct {
    index3 grid, block, block_index;

    std::vector<std::unique_ptr<lane_fiber>> fibers; // kept from launch to launch
    size_t n_lanes = 0;

    lane_fiber * current = nullptr;
    jmp_buf      scheduler;
    ucontext_t   scheduler_context;

    std::vector<char> shared;
    std::map<const void *, std::vector<char>> shared_static;

    const std::function<void()> * kernel = nullptr;
} run;

index3 thread_index() { return run.current->index; }
index3 block_index()  { return run.block_index; }
index3 block_size()   { return run.block; }
index3 grid_size()    { return run.grid; }

int    lane()         { return run.current->id % WARP; }
int    warp()         { return run.current->id / WARP; }
char * shared()       { return run.shared.data(); }

char * shared_static(const void * key, size_t size) {
    auto & memory = run.shared_static[key];
    if (memory.size() < size) {
        memory.assign(size, (char) 0xFF);
    }
    return memory.data();
}

// makecontext passes no pointers portably, hence no parameter
static void fiber_main() {
    (*run.kernel)();
    run.current->state = DONE;
    _longjmp(run.scheduler, 1);
}

static void wait(lane_state state) {
    lane_fiber * me = run.current;
    me->state = state;
    if (_setjmp(me->resume) == 0) {
        _longjmp(run.scheduler, 1);
    }
}

void block_barrier() { wait(AT_BLOCK_BARRIER); }
void warp_barrier()  { wait(AT_WARP_BARRIER); }

void warp_read(const void * mine, void * theirs, size_t size, int from) {
    if (size > N_SLOT) {
        fprintf(stderr, "a lane shows its warp %zu bytes, more than %zu\n", size, N_SLOT);
        abort();
    }
    memcpy(run.current->slot, mine, size);
    warp_barrier();
    const size_t id = run.current->id/WARP*WARP + from;
    memcpy(theirs, run.fibers[id]->slot, size);
    warp_barrier();
}

// runs one lane until it waits or is done
static void resume(lane_fiber & fiber) {
    run.current = &fiber;
    if (_setjmp(run.scheduler) == 0) {
        if (fiber.started) {
            _longjmp(fiber.resume, 1);
        }
        fiber.started = true;
        // setcontext and not swapcontext: the way back is a longjmp, which saves no signal mask and so makes no system call
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp   = fiber.stack.get();
        fiber.context.uc_stack.ss_size = N_STACK;
        fiber.context.uc_link          = &run.scheduler_context;
        makecontext(&fiber.context, fiber_main, 0);
        setcontext(&fiber.context);
    }
}

// lanes [begin, end) go on if all of them that are not done wait at the barrier; true if any did
static bool release(size_t begin, size_t end, lane_state barrier) {
    size_t n_waiting = 0;
    for (size_t i = begin; i < end; ++i) {
        const lane_state state = run.fibers[i]->state;
        if (state != barrier && state != DONE) {
            return false;
        }
        n_waiting += state == barrier;
    }
    for (size_t i = begin; i < end; ++i) {
        if (run.fibers[i]->state == barrier) {
            run.fibers[i]->state = READY;
        }
    }
    return n_waiting > 0;
}

static void run_block(std::mt19937 & rng) {
    std::fill(run.shared.begin(), run.shared.end(), (char) 0xFF);
    run.shared_static.clear();

    const size_t n_warps = run.n_lanes/WARP;

    // a warp's lanes run side by side, the warps in any order, each up to one of its barriers
    std::vector<size_t> warps(n_warps);
    for (size_t i = 0; i < n_warps; ++i) {
        warps[i] = i;
    }

    for (size_t i = 0; i < run.n_lanes; ++i) {
        auto & fiber = *run.fibers[i];
        fiber.id      = (int) i;
        fiber.index   = { (uint32_t) i % run.block.x, (uint32_t) i / run.block.x % run.block.y, (uint32_t) i / run.block.x / run.block.y };
        fiber.state   = READY;
        fiber.started = false;
    }

    while (true) {
        bool progress = false;
        std::shuffle(warps.begin(), warps.end(), rng);
        for (size_t w : warps) {
            do {
                const size_t first = rng() % WARP;
                for (size_t i = 0; i < WARP; ++i) {
                    auto & fiber = *run.fibers[w*WARP + (first + i) % WARP];
                    if (fiber.state == READY) {
                        resume(fiber);
                        progress = true;
                    }
                }
            } while (release(w*WARP, (w + 1)*WARP, AT_WARP_BARRIER) && rng() % 4 != 0);
        }
        if (release(0, run.n_lanes, AT_BLOCK_BARRIER)) {
            continue;
        }
        if (!progress) {
            break;
        }
    }

    for (size_t i = 0; i < run.n_lanes; ++i) {
        if (run.fibers[i]->state != DONE) {
            fprintf(stderr, "lanes wait for each other for ever: lane %zu is at a %s barrier which others never reach\n",
                    i, run.fibers[i]->state == AT_WARP_BARRIER ? "warp" : "block");
            abort();
        }
    }
}

void launch(index3 grid, index3 block, size_t n_shared, std::mt19937 & rng, const std::function<void()> & kernel) {
    run.grid    = grid;
    run.block   = block;
    run.kernel  = &kernel;
    run.n_lanes = (size_t) block.x*block.y*block.z;
    run.shared.resize(n_shared);

    if (run.n_lanes == 0 || run.n_lanes % WARP != 0) {
        fprintf(stderr, "a block of %zu threads is not made of whole warps\n", run.n_lanes);
        abort();
    }
    while (run.fibers.size() < run.n_lanes) {
        run.fibers.push_back(std::make_unique<lane_fiber>());
    }

    for (uint32_t z = 0; z < grid.z; ++z) {
        for (uint32_t y = 0; y < grid.y; ++y) {
            for (uint32_t x = 0; x < grid.x; ++x) {
                run.block_index = { x, y, z };
                run_block(rng);
            }
        }
    }
}

} // namespace lanes
