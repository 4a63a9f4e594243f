// Own keys of a decoding step. A few query rows, the heads of one thought, see them: they are used where they
// are, without packing.
#pragma once
#include "rows.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int FEW = 4;  // rows at a time

// to [ROWS,count] = q [ROWS,width] times the keys; false if there is a NaN or an infinity in the keys.
template <Dtype DTYPE, int ROWS>
bool multiply_own(float* to, const float* q, Source k, int count, int64_t width) {
    Vec zeros{};
    for (int key = 0; key < count; key += LANES) {
        Vec products[ROWS][LANES];
        for (int j = 0; j < LANES; ++j) {
            Vec sums[ROWS] = {};
            for (int64_t i = 0; i < width && key + j < count; i += LANES) {
                const Vec x = numbers<DTYPE>(k.first + (key + j) * k.stride, i, width);
                zeros += x * 0.0f;
                QUIETSTAR_UNROLL
                for (int r = 0; r < ROWS; ++r) sums[r] += load(q + r * STRIDE + i) * x;
            }
            QUIETSTAR_UNROLL
            for (int r = 0; r < ROWS; ++r) products[r][j] = sums[r];
        }
        for (int r = 0; r < ROWS; ++r) store(to + r * STRIDE + key, sums_of(products[r]));
    }
    return sum(zeros) == 0;
}

// to [ROWS,width] = factor * to + weights [ROWS,count] times the values. Returns the same.
template <Dtype DTYPE, int ROWS>
bool add_own(float* to, const float* weights, const float* factor, Source v, int count, int64_t width) {
    Vec zeros{};
    for (int64_t column = 0; column < width; column += PANEL) {
        Vec sums[ROWS][2] = {};
        for (int key = 0; key < count; ++key) {
            QUIETSTAR_UNROLL
            for (int n = 0; n < 2; ++n) {
                const Vec x = numbers<DTYPE>(v.first + key * v.stride, column + n * LANES, width);
                zeros += x * 0.0f;
                QUIETSTAR_UNROLL
                for (int r = 0; r < ROWS; ++r) sums[r][n] += weights[r * STRIDE + key] * x;
            }
        }
        QUIETSTAR_UNROLL
        for (int r = 0; r < ROWS; ++r) QUIETSTAR_UNROLL
        for (int n = 0; n < 2; ++n) {
            float* const place = to + r * STRIDE + column + n * LANES;
            if (column + n * LANES < width) store(place, factor[r] * load(place) + sums[r][n]);
        }
    }
    return sum(zeros) == 0;
}

struct OwnProducts {
    bool (*multiply)(float*, const float*, Source, int, int64_t);
    bool (*add)(float*, const float*, const float*, Source, int, int64_t);
};

template <Dtype DTYPE, int ROWS = FEW>
OwnProducts own_products(int rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return own_products<DTYPE, ROWS - 1>(rows);
    return {multiply_own<DTYPE, ROWS>, add_own<DTYPE, ROWS>};
}

inline OwnProducts own_products(Dtype dtype, int rows) {
    if (dtype == Dtype::FLOAT) return own_products<Dtype::FLOAT>(rows);
    if (dtype == Dtype::BFLOAT16) return own_products<Dtype::BFLOAT16>(rows);
    return own_products<Dtype::HALF>(rows);
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
