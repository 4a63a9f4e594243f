// What the kernels share, and the only file that depends on the compiler: nvcc, or g++ for the tests, where
// tests/emulation/emulation.hpp defines the same names and runs a fiber for each CUDA thread.
//
// csrc/README.md has the rules for kernels that both compile.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quietstar {

// 16-bit floats are moved as bits; pack makes them and to_float reads them. These two only name the format.
struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

constexpr int WARP = 32;

}  // namespace quietstar

#ifdef QUIETSTAR_EMULATION
#include "emulation.hpp"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace quietstar {

// An address in shared memory. It takes + and -; shared_xor flips bits of it.
using Shared = uint32_t;

__device__ __forceinline__ Shared shared_address(const void* p) {
    return static_cast<Shared>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ Shared shared_xor(Shared address, uint32_t bits) { return address ^ bits; }

// The block's dynamic shared memory. It is aligned to 1024 bytes as long as a kernel has no other shared
// memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

// Starts a copy of 16 bytes to shared memory. If not `on`, it writes 16 zero bytes and doesn't read `from`.
__device__ __forceinline__ void cp_async(Shared to, const void* from, bool on) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(on ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the latest N groups of this thread's copies are still running.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit numbers: lane 8i + j gives the address of row j of matrix i. TRANS transposes
// each.
template <bool TRANS>
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], Shared from) {
    if constexpr (TRANS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(from)
                     : "memory");
    }
}

// d [16,8] += a [16,16] b [16,8], the fragments as in the PTX manual's m16n8k16.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x, log2(x) and 1/x by the special function unit, with a relative error of 2^-22; that of the logarithm is
// absolute.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to T, `low` in the low half of the word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <>
__device__ __forceinline__ uint32_t pack<half>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits);

template <>
__device__ __forceinline__ float to_float<bf16>(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

template <>
__device__ __forceinline__ float to_float<half>(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// All 32 lanes must reach each of these.
template <class V>
__device__ __forceinline__ V shuffle(V value, int lane) {
    return __shfl_sync(~0u, value, lane);
}

template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int lanes) {
    return __shfl_xor_sync(~0u, value, lanes);
}

__device__ __forceinline__ uint32_t ballot(bool on) { return __ballot_sync(~0u, on); }

// The index of the lowest bit that is set; at least one must be.
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Runs `kernel` on a CUDA stream. Throws std::runtime_error with CUDA's message if that fails.
template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, void* stream,
            Arguments arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024) {  // more has to be requested
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        void* pointers[] = {&arguments};
        error = cudaLaunchKernel(kernel, grid, dim3(threads), pointers, shared_bytes,
                                 static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace quietstar

#endif
