// Random numbers from counters: the same words as quietstar_kernels/philox.py.
#pragma once

#include "common.cuh"

namespace quietstar {

// Philox4x32-10 (Salmon et al., SC 2011): the first two words of one call.
__device__ __forceinline__ uint2 philox(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * counter.x, b = uint64_t{0xCD9E8D57} * counter.z;
        counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(a)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return {counter.x, counter.y};
}

// (word + 0.5) / 2^32, which rounds to 1 for the largest words.
__device__ __forceinline__ float to_unit(uint32_t word) {
    return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

// -log(1 - v) with v = (word + 0.5) / 2^32, to a few ulps for any word: an Exp(1) variate.
__device__ __forceinline__ float exponential(uint32_t word) {
    constexpr float LN_2 = 0.693147181f;
    if (word >> 31) return -LN_2 * fast_log2(to_unit(~word));  // exactly 1 - v; its log is not near 0
    const float v = to_unit(word);
    // log((1 + z) / (1 - z)) = 2 (z + z^3 / 3 + z^5 / 5 + ...), with z up to 1/3.
    const float z = v * fast_reciprocal(2 - v), square = z * z;
    float sum = 1 / 15.0f;
#pragma unroll
    for (int n = 13; n > 0; n -= 2) sum = sum * square + 1.0f / n;
    return 2 * z * sum;
}

}  // namespace quietstar
