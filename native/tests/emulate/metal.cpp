#include "metal.h"

#include <cstdio>
#include <cstdlib>

namespace msl {
namespace metal {

void threadgroup_barrier(mem_flags) { lanes::block_barrier(); }
void simdgroup_barrier  (mem_flags) { lanes::warp_barrier();  }

// where the lanes of a simdgroup show each other what they have. One lane of one threadgroup runs at a time
static constexpr int N_SG = 32;
static float shown_float[N_SG][64];
static uint  shown_uint [N_SG][32];

float simd_sum(float x) {
    float * shown = shown_float[lanes::warp()];
    shown[lanes::lane()] = x;
    lanes::warp_barrier();
    float res = 0.0f;
    for (int i = 0; i < 32; ++i) {
        res += shown[i];
    }
    lanes::warp_barrier();
    return res;
}

float simd_max(float x) {
    float * shown = shown_float[lanes::warp()];
    shown[lanes::lane()] = x;
    lanes::warp_barrier();
    float res = shown[0];
    for (int i = 1; i < 32; ++i) {
        res = max(res, shown[i]);
    }
    lanes::warp_barrier();
    return res;
}

uint simd_or(uint x) {
    uint * shown = shown_uint[lanes::warp()];
    shown[lanes::lane()] = x;
    lanes::warp_barrier();
    uint res = 0;
    for (int i = 0; i < 32; ++i) {
        res |= shown[i];
    }
    lanes::warp_barrier();
    return res;
}

// lane i owns elements 2*i and 2*i + 1

static const float * whole(simdgroup_float8x8 & m) {
    if (!m.is_whole) {
        float * shown = shown_float[lanes::warp()];
        memcpy(shown + 2*lanes::lane(), m.x + 2*lanes::lane(), 2*sizeof(float));
        lanes::warp_barrier();
        memcpy(m.x, shown, sizeof(m.x));
        lanes::warp_barrier();
        m.is_whole = true;
    }
    return m.x;
}

simdgroup_float8x8 simdgroup_filled(float x) {
    simdgroup_float8x8 res;
    for (auto & e : res.x) {
        e = x;
    }
    res.is_whole = true;
    return res;
}

static void check(int origin) {
    if (origin != 0) {
        fprintf(stderr, "the stand-in for Metal knows matrices at origin 0 only\n");
        abort();
    }
}

void simdgroup_load(simdgroup_float8x8 & m, const float * from, uint64_t n_row, int origin, bool transpose) {
    check(origin);
    for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 8; ++j) {
            m.x[transpose ? 8*j + i : 8*i + j] = from[i*n_row + j];
        }
    }
    m.is_whole = true;
}

void simdgroup_store(const simdgroup_float8x8 & m, float * to, uint64_t n_row, int origin, bool transpose) {
    check(origin);
    for (int e = 2*lanes::lane(); e < 2*lanes::lane() + 2; ++e) {
        to[transpose ? e%8*n_row + e/8 : e/8*n_row + e%8] = m.x[e];
    }
}

void simdgroup_multiply(simdgroup_float8x8 & d, simdgroup_float8x8 & a, simdgroup_float8x8 & b) {
    simdgroup_multiply_accumulate(d, a, b, simdgroup_filled(0.0f));
}

void simdgroup_multiply_accumulate(simdgroup_float8x8 & d, simdgroup_float8x8 & a, simdgroup_float8x8 & b, const simdgroup_float8x8 & c) {
    const int row = lanes::lane()/4;
    const int col = lanes::lane()%4*2;

    const float * pa = whole(a) + 8*row;
    const float * pb = whole(b) + col;

    float x0 = c.x[8*row + col + 0];
    float x1 = c.x[8*row + col + 1];
    for (int k = 0; k < 8; ++k) {
        x0 += pa[k]*pb[8*k + 0];
        x1 += pa[k]*pb[8*k + 1];
    }
    d.x[8*row + col + 0] = x0;
    d.x[8*row + col + 1] = x1;
    d.is_whole = false;
}

} // namespace metal
} // namespace msl
