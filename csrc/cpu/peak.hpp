// As many multiply-adds as the processor can do: the peak that benchmarks compare the other kernels with.
#pragma once
#include "arguments.hpp"
#include "vector.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

// Independent vectors in registers, enough to hide the latency of a multiply-add.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int CHAINS = 16;
#else
constexpr int CHAINS = 12;
#endif

// x += x * 2^-20, `rounds` times, for PEAK_NUMBERS numbers. The product is exact, so that every instruction
// set gives the same bits.
inline void multiply_adds(float* numbers, int64_t rounds) {
    static_assert(PEAK_NUMBERS % (CHAINS * LANES) == 0, "whole vectors");
    const Vec factor = splat(0x1p-20f);
    for (float* at = numbers; at < numbers + PEAK_NUMBERS; at += CHAINS * LANES) {
        Vec x[CHAINS];
        QUIETSTAR_UNROLL
        for (int c = 0; c < CHAINS; ++c) x[c] = load(at + c * LANES);
        for (int64_t i = 0; i < rounds; ++i) {
            QUIETSTAR_UNROLL
            for (int c = 0; c < CHAINS; ++c) x[c] += x[c] * factor;
        }
        QUIETSTAR_UNROLL
        for (int c = 0; c < CHAINS; ++c) store(at + c * LANES, x[c]);
    }
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
