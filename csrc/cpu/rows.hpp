// Rows of tensors to and from floats.
#pragma once
#include "arguments.hpp"
#include "matmul.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int KEYS = 128;  // keys of a block

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::FLOAT ? 4 : 2; }

// The numbers i..i+LANES of a row in memory.
template <Dtype DTYPE>
QUIETSTAR_INLINE Vec numbers(const char* row, int64_t i) {
    if constexpr (DTYPE == Dtype::FLOAT) return load((const float*)row + i);
    const Halves halves = load((const uint16_t*)row + i);
    return DTYPE == Dtype::BFLOAT16 ? bf16_to_floats(halves) : fp16_to_floats(halves);
}

// The same; 0 from `width` on.
template <Dtype DTYPE>
QUIETSTAR_INLINE Vec numbers(const char* row, int64_t i, int64_t width) {
    if (i + LANES <= width) return numbers<DTYPE>(row, i);
    constexpr int64_t SIZE = DTYPE == Dtype::FLOAT ? 4 : 2;
    char last[4 * LANES] = {};
    if (i < width) memcpy(last, row + i * SIZE, (width - i) * SIZE);
    return numbers<DTYPE>(last, 0);
}

template <Dtype DTYPE>
QUIETSTAR_INLINE void put_numbers(char* row, int64_t i, Vec x) {
    if constexpr (DTYPE == Dtype::FLOAT)
        store((float*)row + i, x);
    else
        store((uint16_t*)row + i, DTYPE == Dtype::BFLOAT16 ? floats_to_bf16(x) : floats_to_fp16(x));
}

// The same; nothing from `width` on.
template <Dtype DTYPE>
QUIETSTAR_INLINE void put_numbers(char* row, int64_t i, Vec x, int64_t width) {
    if (i + LANES <= width) return put_numbers<DTYPE>(row, i, x);
    constexpr int64_t SIZE = DTYPE == Dtype::FLOAT ? 4 : 2;
    char last[4 * LANES];
    put_numbers<DTYPE>(last, 0, x);
    memcpy(row + i * SIZE, last, (width - i) * SIZE);
}

template <Dtype DTYPE>
QUIETSTAR_INLINE Vec read_row_of(float* to, const char* from, int64_t width) {
    Vec zeros{};
    for (int64_t i = 0; i < width; i += LANES) {
        const Vec x = numbers<DTYPE>(from, i, width);
        store(to + i, x);
        zeros += x * 0.0f;
    }
    return zeros;
}

template <Dtype DTYPE>
QUIETSTAR_INLINE void write_row_of(char* to, const float* from, float factor, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) put_numbers<DTYPE>(to, i, load(from + i) * factor, width);
}

// bf16 numbers as they are, in pairs.
inline Vec read_pairs(float* to, const char* from, int64_t width) {
    Vec zeros{};
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        char last[4 * LANES] = {};
        const bool whole = i + 2 * LANES <= width;
        if (!whole) memcpy(last, from + 2 * i, 2 * (width - i));
        const Vec x = load((const float*)(whole ? from + 2 * i : last));
        store(to + i / 2, x);
        zeros += low_of(x) * 0.0f + high_of(x) * 0.0f;
    }
    return zeros;
}

// Copies `width` numbers and adds zeros up to a multiple of LANES words. The sum of what it returns is 0, or
// NaN if there is a NaN or an infinity among them.
template <bool PAIRS = false>
QUIETSTAR_INLINE Vec read_row(float* to, const char* from, Dtype dtype, int64_t width) {
    if constexpr (PAIRS) return read_pairs(to, from, width);
    if (dtype == Dtype::FLOAT) return read_row_of<Dtype::FLOAT>(to, from, width);
    if (dtype == Dtype::BFLOAT16) return read_row_of<Dtype::BFLOAT16>(to, from, width);
    return read_row_of<Dtype::HALF>(to, from, width);
}

// factor * from, rounded to nearest; `from` has a multiple of LANES.
inline void write_row(char* to, const float* from, float factor, Dtype dtype, int64_t width) {
    if (dtype == Dtype::FLOAT) return write_row_of<Dtype::FLOAT>(to, from, factor, width);
    if (dtype == Dtype::BFLOAT16) return write_row_of<Dtype::BFLOAT16>(to, from, factor, width);
    write_row_of<Dtype::HALF>(to, from, factor, width);
}

inline void fill_row(char* to, float value, Dtype dtype, int64_t width) {
    float row[256];
    for (int i = 0; i < round_up(width, LANES); ++i) row[i] = value;
    write_row(to, row, 1, dtype, width);
}

inline char* row_of(const Rows& x, Dtype dtype, int64_t batch, int64_t head, int64_t row, int64_t own = 0) {
    return x.data + (batch * x.batch + head * x.head + row * x.row + own * x.own) * size_of(dtype);
}

// A block of keys or values: rows first, first + 1, ... of a head, or of a thought's own cache.
struct Source {
    const char* first;
    int64_t stride;  // bytes
};

// Copies the rows, and zeros up to a multiple of LANES rows. Marks rows with a NaN or an infinity in `bad`,
// if there are any.
template <bool PAIRS>
inline bool read_block(float* to, Source from, int count, Dtype dtype, int64_t width, bool* bad) {
    Vec zeros{};
    for (int i = 0; i < count; ++i)
        zeros += read_row<PAIRS>(to + i * STRIDE, from.first + i * from.stride, dtype, width);
    for (int i = count; i < round_up(count, LANES); ++i)
        memset(to + i * STRIDE, 0, 4 * round_up(width, LANES));
    if (sum(zeros) == 0) return false;
    for (int i = 0; i < count; ++i)
        if (!(sum(read_row<PAIRS>(to + i * STRIDE, from.first + i * from.stride, dtype, width)) == 0))
            bad[i] = true;
    return true;
}

inline void zero_rows(float* x, const bool* which, int count, int64_t width) {
    for (int i = 0; i < count; ++i)
        if (which[i]) memset(x + i * STRIDE, 0, 4 * round_up(width, LANES));
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
