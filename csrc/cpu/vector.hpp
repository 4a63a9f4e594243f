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

// Products of bf16 without widening; tests define it for processors that lack the instruction.
#if defined(__AVX512BF16__)
#define QUIETSTAR_PAIRS 1
#endif

#define QUIETSTAR_INLINE inline __attribute__((always_inline))

// Before a loop over a few registers.
#if defined(__clang__)
#define QUIETSTAR_UNROLL _Pragma("unroll")
#else
#define QUIETSTAR_UNROLL _Pragma("GCC unroll 16")
#endif

namespace quietstar {
namespace QUIETSTAR_SET {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// The lanes of (a, b) with the given numbers.
#if defined(__clang__)
#define QUIETSTAR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QUIETSTAR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

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

QUIETSTAR_INLINE Halves load(const uint16_t* from) {
    Halves x;
    memcpy(&x, from, sizeof x);
    return x;
}

QUIETSTAR_INLINE void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }
QUIETSTAR_INLINE void store(uint16_t* to, Halves x) { memcpy(to, &x, sizeof x); }

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

// combine(x[0], x[1], ...), in an order that depends on LANES alone.
template <class Combine>
QUIETSTAR_INLINE float reduce(Vec x, Combine combine) {
#if defined(__AVX512F__)
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
#elif defined(__AVX2__)
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 2, 3, 4, 5, 6, 7, 0, 1));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 1, 2, 3, 4, 5, 6, 7, 0));
#else
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 2, 3, 0, 1));
    x = combine(x, QUIETSTAR_SHUFFLE(x, x, 1, 2, 3, 0));
#endif
    return x[0];
}

QUIETSTAR_INLINE float sum(Vec x) {
    return reduce(x, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}

QUIETSTAR_INLINE float largest(Vec x) {
    return reduce(x, [](Vec a, Vec b) __attribute__((always_inline)) { return larger(a, b); });
}

// 2^x for x <= 126; 0 from -126.5 on; NaN stays NaN. Cephes' polynomial, 1.7e-7 relative.
QUIETSTAR_INLINE Vec exp2(Vec x) {
    x = larger(splat(-127.0f), x);
    // 1.5 * 2^23: adding it rounds to an integer. The exponent's bias is in it, for the shift below.
    const Vec magic = splat(12582912.0f + 127.0f);
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = splat(1.535336188319500e-4f);
    p = p * f + splat(1.339887440266574e-3f);
    p = p * f + splat(9.618437357674640e-3f);
    p = p * f + splat(5.550332471162809e-2f);
    p = p * f + splat(2.402264791363012e-1f);
    p = p * f + splat(6.931472028550421e-1f);
    p = p * f + splat(1.0f);
    return p * bits_to_floats(floats_to_bits(shifted) << 23);
}

constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.693147180559945309417f;

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

QUIETSTAR_INLINE Vec bf16_to_floats(Halves x) {
#if defined(__AVX512F__)  // GCC 12 widens halves of it
    return bits_to_floats((Ints)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);
#else
    return bits_to_floats(__builtin_convertvector(x, Ints) << 16);
#endif
}

// To the nearest, ties to even; NaN stays NaN.
QUIETSTAR_INLINE Halves floats_to_bf16(Vec x) {
    const Ints bits = floats_to_bits(x);
    const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : splat(0x7fc0), Halves);
}

// Pairs: the bits of two bf16 numbers in each lane. The instructions take denormals for 0, so that what a
// call returns is rounded without them.
QUIETSTAR_INLINE Vec low_of(Vec pairs) { return bits_to_floats(floats_to_bits(pairs) << 16); }
QUIETSTAR_INLINE Vec high_of(Vec pairs) {
    return bits_to_floats(floats_to_bits(pairs) & (int32_t)0xffff0000);
}

#if defined(__AVX512BF16__)
QUIETSTAR_INLINE Vec add_pairs(Vec sums, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
QUIETSTAR_INLINE Halves rounded(Vec x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
QUIETSTAR_INLINE Vec add_pairs(Vec sums, Vec a, Vec b) {
    return sums + high_of(a) * high_of(b) + low_of(a) * low_of(b);
}
QUIETSTAR_INLINE Halves rounded(Vec x) { return floats_to_bf16(x); }
#endif

QUIETSTAR_INLINE Vec zip(Halves low, Halves high) {
    return bits_to_floats(__builtin_convertvector(low, Ints) | __builtin_convertvector(high, Ints) << 16);
}

#if defined(__AVX512F__)
QUIETSTAR_INLINE Vec fp16_to_floats(Halves x) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x); }
QUIETSTAR_INLINE Halves floats_to_fp16(Vec x) {
    return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
QUIETSTAR_INLINE Vec fp16_to_floats(Halves x) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
QUIETSTAR_INLINE Halves floats_to_fp16(Vec x) {
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
QUIETSTAR_INLINE Vec fp16_to_floats(Halves x) {
    const Ints wide = __builtin_convertvector(x, Ints), size = (wide & 0x7fff) << 13;
    const Vec y =
        bits_to_floats(size) * 5.192296858534828e33f;  // 2^112: the exponents of the formats differ by that
    const Ints bits = size >= 0x0f800000 ? size | 0x7f800000 : floats_to_bits(y);  // infinity and NaN
    return bits_to_floats(bits | ((wide & 0x8000) << 16));
}

// To the nearest, ties to even; NaN stays NaN.
QUIETSTAR_INLINE Halves floats_to_fp16(Vec x) {
    const Ints bits = floats_to_bits(x), size = bits & INT32_MAX;
    const Ints normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    const Ints subnormal = floats_to_bits(bits_to_floats(size) + 0.5f) - 0x3f000000;  // the addition rounds
    Ints half = size < 0x38800000 ? subnormal : normal;
    half = size >= 0x477ff000 ? splat(0x7c00) : half;  // rounds to infinity
    half = size > 0x7f800000 ? splat(0x7e00) : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
}
#endif

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
