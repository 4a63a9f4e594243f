// The names of csrc/common.cuh for g++, so that the kernels' own sources run in tests: see block.hpp.
//
// In an operation of a warp, each lane deposits its words, waits at a barrier of the warp, and reads the
// words of the others. Copies happen when they are waited for, not earlier. Only block_sync and warp_sync
// order memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "block.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (quietstar::emulation::thread_index())
#define blockIdx (quietstar::emulation::block_index())
#define blockDim (quietstar::emulation::block_size())
#define gridDim (quietstar::emulation::grid_size())

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace quietstar {

using std::max;
using std::min;

using Shared = unsigned char*;

inline Shared shared_address(const void* p) { return static_cast<Shared>(const_cast<void*>(p)); }

inline Shared shared_xor(Shared address, uint32_t bits) {
    return reinterpret_cast<Shared>(reinterpret_cast<uintptr_t>(address) ^ bits);
}

EMULATION_INTERNAL inline unsigned char* dynamic_shared() { return emulation::block->shared; }

inline void cp_async(Shared to, const void* from, bool on) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (on && reinterpret_cast<uintptr_t>(from) % 16)) {
        emulation::fail("cp_async of an address that is not a multiple of 16");
    }
    emulation::Fiber* me = emulation::me();
    me->copies.push_back({to, from, on, me->groups});
}

inline void cp_async_commit() { ++emulation::me()->groups; }

template <int N>
void cp_async_wait() {
    emulation::Fiber* me = emulation::me();
    auto copy = me->copies.begin();
    for (; copy != me->copies.end() && copy->group < me->groups - N; ++copy) {
        if (copy->on) {
            std::memcpy(copy->to, copy->from, 16);
        } else {
            std::memset(copy->to, 0, 16);
        }
    }
    me->copies.erase(me->copies.begin(), copy);
}

inline void block_sync() { emulation::wait(emulation::block_barrier(), true); }
inline void warp_sync() { emulation::meet(emulation::SYNC); }

inline int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }

template <class V>
V shuffle(V value, int lane) {
    static_assert(sizeof(V) == 4);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    std::memcpy(&value, emulation::meet(emulation::SHUFFLE, &word, 1)[lane % WARP], 4);
    return value;
}

template <class V>
V shuffle_xor(V value, int lanes) {
    return shuffle(value, lane_index() ^ lanes);
}

inline uint32_t ballot(bool on) {
    const uint32_t word = on;
    const auto lanes = emulation::meet(emulation::BALLOT, &word, 1);
    uint32_t all = 0;
    for (int lane = 0; lane < WARP; ++lane) all |= lanes[lane][0] << lane;
    return all;
}

inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

template <bool TRANS>
void ldmatrix4(uint32_t (&r)[4], Shared from) {
    if (reinterpret_cast<uintptr_t>(from) % 16)
        emulation::fail("ldmatrix4 of an address that is not a multiple of 16");
    uint32_t address[2];
    std::memcpy(address, &from, 8);
    const auto lanes = emulation::meet(emulation::LDMATRIX, address, 2);
    const int lane = lane_index();
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const int row = TRANS ? 2 * (lane % 4) + j : lane / 4,
                      column = TRANS ? lane / 4 : 2 * (lane % 4) + j;
            const unsigned char* start;
            std::memcpy(&start, lanes[8 * i + row], 8);
            std::memcpy(&pair[j], start + 2 * column, 2);
        }
        std::memcpy(&r[i], pair, 4);
    }
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

inline float bits_to_float(uint32_t word) {
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

template <class T>
float to_float(uint16_t bits);

template <>
inline float to_float<bf16>(uint16_t bits) {
    return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float to_float<half>(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
}

template <class T>
uint16_t from_float(float x);

template <>
inline uint16_t from_float<bf16>(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);  // to nearest, ties to even
}

template <>
inline uint16_t from_float<half>(float x) {
    const _Float16 rounded = x;
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}

template <class T>
uint32_t pack(float low, float high) {
    return from_float<T>(low) | static_cast<uint32_t>(from_float<T>(high)) << 16;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t words[12];
    for (int i = 0; i < 12; ++i) {
        const uint32_t pair = i < 8 ? a[i / 2] : b[i / 2 - 4];
        const float number = to_float<T>(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair));
        std::memcpy(&words[i], &number, 4);
    }
    const auto lanes = emulation::meet(emulation::MMA, words, 12);
    const int row = lane_index() / 4, column = 2 * (lane_index() % 4);
    for (int k = 0; k < 16; ++k) {
        const int lane = k % 8 / 2, word = k / 8 * 4 + k % 2;
        for (int j = 0; j < 2; ++j) {
            const float right = bits_to_float(lanes[(column + j) * 4 + lane][8 + k / 8 * 2 + k % 2]);
            for (int i = 0; i < 2; ++i)
                d[2 * i + j] += bits_to_float(lanes[row * 4 + lane][word + 2 * i]) * right;
        }
    }
}

// Throws std::runtime_error if the kernel breaks a rule.
template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, void* /*stream*/,
            Arguments arguments) {
    emulation::run_grid(grid, threads, shared_bytes, [=] { kernel(arguments); });
}

}  // namespace quietstar
