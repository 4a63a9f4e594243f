// Rows of tensors to and from floats.
#pragma once
#include "arguments.hpp"
#include "matmul.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int KEYS = 128;  // keys of a block

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::FLOAT ? 4 : 2; }

// Copies `width` numbers and adds zeros up to a multiple of LANES. False if there is a NaN or an infinity
// among them.
inline bool read_row(float* to, const char* from, Dtype dtype, int64_t width) {
    const int wide = round_up(width, LANES);
    if (dtype == Dtype::FLOAT) {
        memcpy(to, from, 4 * width);
    } else {
        const uint16_t* const halves = (const uint16_t*)from;
        if (dtype == Dtype::BFLOAT16)
            for (int64_t i = 0; i < width; ++i) to[i] = bf16_to_float(halves[i]);
        else
            for (int64_t i = 0; i < width; ++i) to[i] = fp16_to_float(halves[i]);
    }
    for (int i = (int)width; i < wide; ++i) to[i] = 0;
    Vec zeros{};
    for (int i = 0; i < wide; i += LANES) zeros += load(to + i) * 0.0f;
    return sum(zeros) == 0;
}

// factor * from, rounded to nearest.
inline void write_row(char* to, const float* from, float factor, Dtype dtype, int64_t width) {
    if (dtype == Dtype::FLOAT) {
        float* const floats = (float*)to;
        for (int64_t i = 0; i < width; ++i) floats[i] = factor * from[i];
        return;
    }
    uint16_t* const halves = (uint16_t*)to;
    if (dtype == Dtype::BFLOAT16)
        for (int64_t i = 0; i < width; ++i) halves[i] = float_to_bf16(factor * from[i]);
    else
        for (int64_t i = 0; i < width; ++i) halves[i] = float_to_fp16(factor * from[i]);
}

inline void fill_row(char* to, float value, Dtype dtype, int64_t width) {
    float row[256];
    for (int64_t i = 0; i < width; ++i) row[i] = value;
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

// Copies the rows, and zeros up to a multiple of LANES rows. A row with a NaN or an infinity becomes 0, and
// is marked in `bad`.
inline bool read_block(float* to, Source from, int count, Dtype dtype, int64_t width, bool* bad) {
    bool any = false;
    for (int i = 0; i < count; ++i) {
        float* const row = to + i * STRIDE;
        if (!read_row(row, from.first + i * from.stride, dtype, width)) bad[i] = any = true;
    }
    for (int i = count; i < round_up(count, LANES); ++i)
        memset(to + i * STRIDE, 0, 4 * round_up(width, LANES));
    return any;
}

inline void zero_rows(float* x, const bool* which, int count, int64_t width) {
    for (int i = 0; i < count; ++i)
        if (which[i]) memset(x + i * STRIDE, 0, 4 * round_up(width, LANES));
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
