// What a decoder layer does to each number: norms, rotary embedding, gated activations, and their gradients.
// Rows are read from memory once; later passes over one find it in the L1 cache.
#pragma once
#include "arguments.hpp"
#include "rows.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

struct Row {
    char* data;
    Dtype dtype;
};

inline Row row_of(const Matrix& x, int64_t row) {
    return {x.data + row * x.stride * size_of(x.dtype), x.dtype};
}

inline Row row_of(float* x) { return {(char*)x, Dtype::FLOAT}; }

// What kernels are compiled for: rows of one dtype, or of several.
constexpr int FLOAT = (int)Dtype::FLOAT, BFLOAT16 = (int)Dtype::BFLOAT16, HALF = (int)Dtype::HALF, MIXED = -1;

template <int KIND>
struct Kind {
    static constexpr int value = KIND;
};

template <class F>
QUIETSTAR_INLINE void with_kind(bool same, Dtype dtype, F f) {
    if (!same) return f(Kind<MIXED>());
    if (dtype == Dtype::FLOAT) return f(Kind<FLOAT>());
    if (dtype == Dtype::BFLOAT16) return f(Kind<BFLOAT16>());
    f(Kind<HALF>());
}

// The numbers i..i+LANES; 0 from `end` on.
template <int KIND>
QUIETSTAR_INLINE Vec get(Row x, int64_t i, int64_t end) {
    const Dtype dtype = KIND == MIXED ? x.dtype : (Dtype)KIND;
    if (dtype == Dtype::FLOAT) return numbers<Dtype::FLOAT>(x.data, i, end);
    if (dtype == Dtype::BFLOAT16) return numbers<Dtype::BFLOAT16>(x.data, i, end);
    return numbers<Dtype::HALF>(x.data, i, end);
}

template <int KIND>
QUIETSTAR_INLINE void put(Row to, int64_t i, Vec x, int64_t end) {
    const Dtype dtype = KIND == MIXED ? to.dtype : (Dtype)KIND;
    if (dtype == Dtype::FLOAT) return put_numbers<Dtype::FLOAT>(to.data, i, x, end);
    if (dtype == Dtype::BFLOAT16) return put_numbers<Dtype::BFLOAT16>(to.data, i, x, end);
    put_numbers<Dtype::HALF>(to.data, i, x, end);
}

// f(i, end) for the vectors of a row; `end` is behind a vector that is whole.
template <class F>
QUIETSTAR_INLINE void for_each_vector(int64_t width, F f) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) f(i, i + LANES);
    if (i < width) f(i, width);
}

// The sum of what f returns.
template <class F>
QUIETSTAR_INLINE float sum_of(int64_t width, F f) {
    Vec even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        even += f(i, i + LANES);
        odd += f(i + LANES, i + 2 * LANES);
    }
    for (; i < width; i += LANES) even += f(i, i + LANES < width ? i + LANES : width);
    return sum(even + odd);
}

// The weight plus `offset`, of whole vectors.
inline void read_factors(float* to, const Matrix& weight, float offset, int64_t width) {
    read_row(to, weight.data, weight.dtype, width);
    for_each_vector(width, [&](int64_t i, int64_t) { store(to + i, load(to + i) + offset); });
}

inline float rstd_of(float squares, int64_t width, float eps) {
    return 1 / __builtin_sqrtf(squares / (float)width + eps);
}

template <int KIND>
inline float squares_of(Row x, int64_t width) {
    return sum_of(width, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        const Vec a = get<KIND>(x, i, end);
        return a * a;
    });
}

template <int KIND, int OUT = KIND>
inline void scale(Row x, const float* factors, float rstd, Row out, int64_t width) {
    for_each_vector(width, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        put<OUT>(out, i, get<KIND>(x, i, end) * rstd * load(factors + i), end);
    });
}

template <int KIND>
inline void norm_rows(const Norm& call, int64_t begin, int64_t end, const float* factors) {
    for (int64_t r = begin; r < end; ++r) {
        const Row x = row_of(call.x, r), delta = row_of(call.delta, r), total = row_of(call.total, r);
        if (call.delta.data)
            for_each_vector(call.D, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
                put<KIND>(total, i, get<KIND>(x, i, end) + get<KIND>(delta, i, end), end);
            });
        const Row of = call.delta.data ? total : x;  // the total as it was rounded
        call.rstd[r] = rstd_of(squares_of<KIND>(of, call.D), call.D, call.eps);
        scale<KIND>(of, factors, call.rstd[r], row_of(call.out, r), call.D);
    }
}

inline void norm(const Norm& call, int64_t begin, int64_t end, char* workspace) {
    float* const factors = (float*)workspace;
    read_factors(factors, call.weight, call.offset, call.D);
    const Dtype dtype = call.x.dtype;
    const bool same = dtype == call.out.dtype && (!call.delta.data || dtype == call.delta.dtype);
    with_kind(same, dtype, [&](auto kind) { norm_rows<decltype(kind)::value>(call, begin, end, factors); });
}

// From the numbers of a norm and the gradient of what it returned, the gradient of the numbers, plus `more`;
// adds the weight's to `sums`.
template <int KIND, int GRAD = KIND>
inline void norm_row_back(Row grad, Row more, Row x, const float* factors, float rstd, float* sums, Row dx,
                          Row ddelta, int64_t width) {
    const float products = sum_of(width, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        const Vec g = get<GRAD>(grad, i, end), unit = get<KIND>(x, i, end) * rstd;
        if (sums) store(sums + i, load(sums + i) + g * unit);
        return g * load(factors + i) * unit;
    });
    const float mean = products / (float)width;
    for_each_vector(width, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        const Vec unit = get<KIND>(x, i, end) * rstd, extra = more.data ? get<KIND>(more, i, end) : Vec{};
        const Vec d = (get<GRAD>(grad, i, end) * load(factors + i) - unit * mean) * rstd + extra;
        put<KIND>(dx, i, d, end);
        if (ddelta.data) put<MIXED>(ddelta, i, d, end);
    });
}

// Of a share of the rows; `sums` are its own.
inline void norm_backward(const NormBackward& call, int64_t begin, int64_t end, float* sums,
                          char* workspace) {
    float* const factors = (float*)workspace;
    const Row none{nullptr, Dtype::FLOAT};
    read_factors(factors, call.weight, call.offset, call.D);
    with_kind(call.grad_out.dtype == call.total.dtype, call.total.dtype, [&](auto kind) {
        for (int64_t r = begin; r < end; ++r)
            norm_row_back<decltype(kind)::value>(
                row_of(call.grad_out, r), call.grad_total.data ? row_of(call.grad_total, r) : none,
                row_of(call.total, r), factors, call.rstd[r], sums, row_of(call.dx, r),
                call.ddelta.data ? row_of(call.ddelta, r) : none, call.D);
    });
}

// Adds shares of sums up in their order.
inline void add_up(float* sums, int64_t shares, int64_t stride, const Matrix& to, int64_t width) {
    for_each_vector(width, [&](int64_t i, int64_t end) {
        Vec total = load(sums + i);
        for (int64_t share = 1; share < shares; ++share) total += load(sums + share * stride + i);
        put<MIXED>(row_of(to, 0), i, total, end);
    });
}

// x * cos + x[other] * sin, where the first `half` of the others are the last of x. The halves of an odd
// width differ by one.
template <int FROM, int TO>
inline void turn(Row to, Row x, const float* cos, const float* sin, int64_t half, int64_t width) {
    for (int64_t i = 0; i < half; i += LANES) {
        const Vec other = get<FROM>(x, width - half + i, width);
        put<TO>(to, i, get<FROM>(x, i, width) * load(cos + i) + other * load(sin + i), half);
    }
    for (int64_t i = half; i < width; i += LANES) {
        const Vec other = get<FROM>(x, i - half, width - half);
        put<TO>(to, i, get<FROM>(x, i, width) * load(cos + i) + other * load(sin + i), width);
    }
}

// Rows begin..end of [B,n]: queries and keys normed and turned, or turned back and their gradients; values
// copied. In the workspace are rows of padded(K).
template <int KIND>
inline void rotary_rows(const Rotary& call, int64_t begin, int64_t end, float* sums, float* workspace) {
    const int64_t K = call.K, space = padded(K), half = call.back ? K / 2 : K - K / 2;
    float *const cos = workspace + 2 * space, *const sin = cos + space, *const angles = sin + space;
    const Row buffer = row_of(angles + space), none{nullptr, call.dtype};
    for (int part = 0; part < 2; ++part)
        if (call.weight[part].data) read_factors(workspace + part * space, call.weight[part], call.offset, K);
    for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / call.n, i = r % call.n;
        read_row(cos, row_of(call.cos, call.cos_dtype, b, 0, i), call.cos_dtype, K);
        read_row(angles, row_of(call.sin, call.sin_dtype, b, 0, i), call.sin_dtype, K);
        for (int64_t c = 0; c < half; ++c) sin[c] = call.back ? angles[K - half + c] : -angles[c];
        for (int64_t c = half; c < K; ++c) sin[c] = call.back ? -angles[c - half] : angles[c];
        for (int part = 0; part < 3; ++part) {
            if (!call.to[part].data) continue;
            for (int64_t h = 0; h < (part == 0 ? call.H : call.G); ++h) {
                const Row from{row_of(call.from[part], call.dtype, b, h, i), call.dtype};
                const Row to{row_of(call.to[part], call.dtype, b, h, i, call.step), call.dtype};
                const float* const factors = workspace + part * space;
                if (part == 2) {
                    memcpy(to.data, from.data, K * size_of(call.dtype));
                } else if (!call.weight[part].data) {
                    turn<KIND, KIND>(to, from, cos, sin, half, K);
                } else if (!call.back) {
                    scale<KIND, FLOAT>(from, factors, rstd_of(squares_of<KIND>(from, K), K, call.eps), buffer,
                                       K);
                    turn<FLOAT, KIND>(to, buffer, cos, sin, half, K);
                } else {
                    const Row x{row_of(call.x[part], call.dtype, b, h, i), call.dtype};
                    const float rstd = rstd_of(squares_of<KIND>(x, K), K, call.eps);
                    turn<KIND, FLOAT>(buffer, from, cos, sin, half, K);
                    norm_row_back<KIND, FLOAT>(buffer, none, x, factors, rstd,
                                               sums ? sums + part * space : nullptr, to, none, K);
                }
            }
        }
    }
}

inline void rotary(const Rotary& call, int64_t begin, int64_t end, float* sums, char* workspace) {
    with_kind(true, call.dtype, [&](auto kind) {
        rotary_rows<decltype(kind)::value>(call, begin, end, sums, (float*)workspace);
    });
}

constexpr float LINEAR = 1.5957691216057308f, CUBIC = 0.044715f;  // 2 sqrt(2 / pi), and GELU's

// activation(gate) * up, or its gradients. Both activations are x times a sigmoid, of z: (1 + tanh(z / 2)) /
// 2 is that of z.
template <int KIND, bool GELU>
inline void gated_row(Row gate, Row up, Row grad, Row out, Row dup, int64_t width) {
    for_each_vector(width, [&](int64_t i, int64_t end) __attribute__((always_inline)) {
        const Vec x = get<KIND>(gate, i, end), y = get<KIND>(up, i, end);
        const Vec z = GELU ? (x + x * x * x * CUBIC) * LINEAR : x;
        if (!grad.data) {
            const Vec e = exp2(smaller(splat(128.0f), z * -LOG2_E));  // infinite from 127.5 on
            return put<KIND>(out, i, x / (1.0f + e) * y, end);
        }
        const Vec g = get<KIND>(grad, i, end);
        const Vec e = exp2(bits_to_floats(floats_to_bits(z) | INT32_MIN) * LOG2_E), part = 1.0f / (1.0f + e);
        const Vec sigmoid = select(z < 0.0f, e, splat(1.0f)) * part;
        Vec slope = e * part * part;
        if (GELU) slope *= (1.0f + x * x * (3 * CUBIC)) * LINEAR;
        put<KIND>(out, i, g * y * (sigmoid + x * slope), end);
        put<KIND>(dup, i, g * (x * sigmoid), end);
    });
}

// The activation, or if there is a `grad` the gradients.
inline void gated(const Gated& call, int64_t begin, int64_t end) {
    with_kind(true, call.gate.dtype, [&](auto kind) {
        constexpr int KIND = decltype(kind)::value;
        for (int64_t r = begin; r < end; ++r)
            (call.gelu ? gated_row<KIND, true>
                       : gated_row<KIND, false>)(row_of(call.gate, r), row_of(call.up, r),
                                                 row_of(call.grad, r), row_of(call.out, r),
                                                 row_of(call.dup, r), call.I);
    });
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
