// Products of small matrices whose rows are STRIDE floats apart: blocks of BLOCK rows by PANEL columns, which
// stay in registers.
#pragma once
#include "vector.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int STRIDE = 272;  // 256 and a cache line: rows of one column lie in different sets of a cache
constexpr int PANEL = 2 * LANES;

// The block, the two vectors of a panel and a broadcast number fit the registers.
#if defined(__AVX512F__)
constexpr int BLOCK = 14;  // of 32
#elif defined(__aarch64__)
constexpr int BLOCK = 12;  // of 32
#else
constexpr int BLOCK = 6;  // of 16
#endif

constexpr int round_up(int64_t x, int to) { return (int)((x + to - 1) / to * to); }

// Numbers as words: fp32, or two of bf16 that follow one another in the dimension a product sums over.
template <bool PAIRS>
constexpr int words(int64_t numbers) {
    return (int)(PAIRS ? (numbers + 1) / 2 : numbers);
}

template <bool PAIRS>
QUIETSTAR_INLINE Vec splat_word(const float* from) {
    if constexpr (!PAIRS) return splat(*from);
    int32_t bits;
    memcpy(&bits, from, sizeof bits);
    return bits_to_floats(splat(bits));
}

// c [ROWS,NV*LANES] = a b, where a is [ROWS,depth], or [depth,ROWS] if TRANSPOSED, both in words. To `add`
// keeps c, times factor[row] if given.
template <bool PAIRS, int ROWS, int NV, bool TRANSPOSED>
void multiply_block(const float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                    int64_t depth, const float* factor, bool add) {
    Vec sums[ROWS][NV];
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < NV; ++n) sums[r][n] = Vec{};
    for (int64_t d = 0; d < depth; ++d) {
        Vec x[NV];
        QUIETSTAR_UNROLL
        for (int n = 0; n < NV; ++n) x[n] = load(b + n * LANES);
        QUIETSTAR_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const Vec y = splat_word<PAIRS>(TRANSPOSED ? a + r : a + r * STRIDE);
            QUIETSTAR_UNROLL
            for (int n = 0; n < NV; ++n)
                sums[r][n] = PAIRS ? add_pairs(sums[r][n], y, x[n]) : sums[r][n] + y * x[n];
        }
        a += TRANSPOSED ? STRIDE : 1;
        b += b_stride;
    }
    QUIETSTAR_UNROLL
    for (int r = 0; r < ROWS; ++r) QUIETSTAR_UNROLL
    for (int n = 0; n < NV; ++n) {
        float* const to = c + r * c_stride + n * LANES;
        // A product beside its sum, which compilers contract whatever ROWS is: else bits would depend on it.
        if (add) sums[r][n] += splat(factor ? factor[r] : 1.0f) * load(to);
        store(to, sums[r][n]);
    }
}

using MultiplyBlock = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, const float*,
                               bool);

template <bool PAIRS, int NV, bool TRANSPOSED, int ROWS = BLOCK>
MultiplyBlock block_of(int rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return block_of<PAIRS, NV, TRANSPOSED, ROWS - 1>(rows);
    return multiply_block<PAIRS, ROWS, NV, TRANSPOSED>;
}

// For a block of `rows`; one vector wide or a panel.
template <bool PAIRS, bool TRANSPOSED>
MultiplyBlock block_of(int rows, bool panel) {
    return panel ? block_of<PAIRS, 2, TRANSPOSED>(rows) : block_of<PAIRS, 1, TRANSPOSED>(rows);
}

// Cuts rows into blocks of about the same size.
struct Blocks {
    int begin, end, size;
    Blocks(int begin_, int end_) : begin(begin_), end(end_) {
        const int count = (end - begin + BLOCK - 1) / BLOCK;
        size = count ? (end - begin + count - 1) / count : 1;
    }
    int rows(int from) const { return end - from < size ? end - from : size; }
};

// a0 b0 a1 b1 ..., the first half and the second one.
QUIETSTAR_INLINE void zip(Vec a, Vec b, Vec& first, Vec& second) {
#if defined(__AVX512F__)
    first = QUIETSTAR_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = QUIETSTAR_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    first = QUIETSTAR_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    second = QUIETSTAR_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    first = QUIETSTAR_SHUFFLE(a, b, 0, 4, 1, 5);
    second = QUIETSTAR_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// A square of LANES rows, transposed: as many rounds of zips as LANES has bits.
QUIETSTAR_INLINE void transpose(Vec (&x)[LANES]) {
    QUIETSTAR_UNROLL
    for (int done = 1; done < LANES; done *= 2) {
        Vec y[LANES];
        QUIETSTAR_UNROLL
        for (int i = 0; i < LANES / 2; ++i) zip(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
        QUIETSTAR_UNROLL
        for (int i = 0; i < LANES; ++i) x[i] = y[i];
    }
}

// Lane i combines the lanes of x[i]. Destroys x.
template <class Combine>
QUIETSTAR_INLINE Vec reduce_each(Vec (&x)[LANES], Combine combine) {
    QUIETSTAR_UNROLL
    for (int half = LANES / 2; half > 0; half /= 2) QUIETSTAR_UNROLL
    for (int i = 0; i < half; ++i) {
        Vec first, second;
        zip(x[i], x[i + half], first, second);
        x[i] = combine(first, second);
    }
    return x[0];
}

QUIETSTAR_INLINE Vec sums_of(Vec (&x)[LANES]) {
    return reduce_each(x, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}

QUIETSTAR_INLINE Vec largest_of(Vec (&x)[LANES]) {
    return reduce_each(x, [](Vec a, Vec b) __attribute__((always_inline)) { return larger(a, b); });
}

// Rows of bf16, two at a time, to rows of pairs: row j has the numbers of rows 2j and 2j + 1. The last
// columns come first, so that `to` may be `from`.
inline void to_pairs(float* to, const float* from, int count, int64_t width) {
    for (int row = 0; row < count; row += 2) {
        const uint16_t* const low = (const uint16_t*)(from + row * STRIDE);
        const uint16_t* const high = (const uint16_t*)(from + (row + 1) * STRIDE);
        for (int column = round_up(width, LANES) - LANES; column >= 0; column -= LANES)
            store(to + row / 2 * STRIDE + column,
                  zip(load(low + column), row + 1 < count ? load(high + column) : Halves{}));
    }
}

// Rows x [count,width], to panels [count/PANEL][width][PANEL]; x has zeros up to multiples of LANES both
// ways.
inline void to_panels(float* panels, const float* x, int count, int width) {
    const int wide = round_up(width, LANES);
    for (int row = 0; row < count; row += LANES) {
        float* const to = panels + row / PANEL * PANEL * wide + row % PANEL;
        for (int column = 0; column < wide; column += LANES) {
            Vec square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = load(x + (row + i) * STRIDE + column);
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(to + (column + i) * PANEL, square[i]);
        }
    }
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
