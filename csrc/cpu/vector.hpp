// Vectors of floats in the extension that GCC and Clang share: 16 lanes with AVX-512, 8 with AVX2, else 4.
//
// Each instruction set compiles these headers in a namespace of its own, so that the linker can't mix them
// up. For the same reason no function of the standard library that is inline may be called here.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define QUIETSTAR_INLINE inline __attribute__((always_inline))

namespace quietstar {
namespace QUIETSTAR_SET {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

QUIETSTAR_INLINE Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

QUIETSTAR_INLINE Ints load(const int32_t* from) {
    Ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

QUIETSTAR_INLINE void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

QUIETSTAR_INLINE Vec splat(float x) { return x - Vec{}; }
QUIETSTAR_INLINE Ints splat(int32_t x) { return x - Ints{}; }

QUIETSTAR_INLINE Vec bits_to_floats(Ints x) { return (Vec)x; }
QUIETSTAR_INLINE Ints floats_to_bits(Vec x) { return (Ints)x; }

// 0, 1, 2, ...
QUIETSTAR_INLINE Ints iota() {
    Ints x;
    for (int i = 0; i < LANES; ++i) x[i] = i;
    return x;
}

// a where a lane of `mask` is true, else b.
QUIETSTAR_INLINE Vec select(Ints mask, Vec a, Vec b) { return mask ? a : b; }

// Both give b if a lane of a is NaN.
QUIETSTAR_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
QUIETSTAR_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

QUIETSTAR_INLINE float sum(Vec x) {
    float lane[LANES];
    store(lane, x);
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
    return lane[0];
}

QUIETSTAR_INLINE float largest(Vec x) {
    float lane[LANES];
    store(lane, x);
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) lane[i] = lane[i + step] > lane[i] ? lane[i + step] : lane[i];
    return lane[0];
}

// 2^x for x <= 126; 0 from -126.5 on; NaN stays NaN. Cephes' polynomial, 1.7e-7 relative.
QUIETSTAR_INLINE Vec exp2(Vec x) {
    x = larger(splat(-127.0f), x);
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = splat(1.535336188319500e-4f);
    p = p * f + splat(1.339887440266574e-3f);
    p = p * f + splat(9.618437357674640e-3f);
    p = p * f + splat(5.550332471162809e-2f);
    p = p * f + splat(2.402264791363012e-1f);
    p = p * f + splat(6.931472028550421e-1f);
    p = p * f + splat(1.0f);
    return p * bits_to_floats((floats_to_bits(shifted) - floats_to_bits(magic) + 127) << 23);
}

constexpr float LOG2_E = 1.44269504088896340736f;

// Cephes' tanhf. NaN stays NaN.
QUIETSTAR_INLINE Vec tanh(Vec x) {
    const Ints sign = floats_to_bits(x) & INT32_MIN;
    const Vec size = bits_to_floats(floats_to_bits(x) & INT32_MAX);
    const Vec z = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * z + splat(2.06390887954e-2f);
    p = p * z - splat(5.37397155531e-2f);
    p = p * z + splat(1.33314422036e-1f);
    p = p * z - splat(3.33332819422e-1f);
    const Vec small = p * z * x + x;
    const Vec bounded = smaller(splat(40.0f), size);  // NaN: size
    const Vec large = 1.0f - 2.0f / (exp2(bounded * (2 * LOG2_E)) + 1.0f);
    return select(size < 0.625f, small, bits_to_floats(floats_to_bits(large) | sign));
}

QUIETSTAR_INLINE float bf16_to_float(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// To the nearest, ties to even; NaN stays NaN.
QUIETSTAR_INLINE uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if defined(__F16C__)
QUIETSTAR_INLINE float fp16_to_float(uint16_t x) { return _cvtsh_ss(x); }
QUIETSTAR_INLINE uint16_t float_to_fp16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
QUIETSTAR_INLINE float fp16_to_float(uint16_t x) {
    __fp16 y;
    memcpy(&y, &x, 2);
    return y;
}
QUIETSTAR_INLINE uint16_t float_to_fp16(float x) {
    const __fp16 y = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#else
QUIETSTAR_INLINE float fp16_to_float(uint16_t x) {
    const uint32_t size = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    float y;
    memcpy(&y, &size, 4);
    y *= 5.192296858534828e33f;  // 2^112: the exponents of the two formats differ by that
    uint32_t bits;
    memcpy(&bits, &y, 4);
    if (size >= 0x0f800000) bits = size | 0x7f800000;  // infinity and NaN
    bits |= sign;
    memcpy(&y, &bits, 4);
    return y;
}

// To the nearest, ties to even; NaN stays NaN.
QUIETSTAR_INLINE uint16_t float_to_fp16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
    if (size < 0x38800000) {                                   // subnormal: an addition rounds
        float y;
        memcpy(&y, &size, 4);
        y += 0.5f;
        uint32_t shifted;
        memcpy(&shifted, &y, 4);
        return (uint16_t)(sign | (shifted - 0x3f000000));
    }
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}
#endif

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
