// The softmax of a warp's 16 rows in the layout of mma: a thread has rows lane / 4 and lane / 4 + 8, and two
// of every 8 columns.
#pragma once

#include <cmath>

#include "thought_decode_tile.cuh"

namespace quietstar {

constexpr float LOG2_E = 1.44269504f;
// A row's top before its first key: finite, so that nothing is inf - inf.
constexpr float LOWEST = -1e30f;
// At least this is subtracted from scores, so that a score of -inf under a top of LOWEST gives 0.
constexpr float LOWEST_SUBTRACTED = -1e29f;

// The sum of a row's weights so far is 2^top times the sum of `total` over its four lanes, and its sum of
// values is 2^top times `acc`.
template <int K>
struct Softmax {
    float top[2], total[2];
    float acc[K / 8][4];

    // No key seen yet, only a sink if there is one: `sinks` (else null) are those of the key head.
    __device__ __forceinline__ void begin(const float* sinks, const Place& place) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sink =
                sinks == nullptr ? -INFINITY : sinks[(place.flat + lane / 4 + 8 * r) % place.HG] * LOG2_E;
            top[r] = fmaxf(sink, LOWEST);
            total[r] = lane % 4 == 0 ? fast_exp2(sink - fmaxf(sink, LOWEST_SUBTRACTED)) : 0;
        }
#pragma unroll
        for (int n = 0; n < K / 8; ++n) {
            for (int i = 0; i < 4; ++i) acc[n][i] = 0;
        }
    }

    __device__ __forceinline__ bool finite() const {
        float zero = 0;
#pragma unroll
        for (int n = 0; n < K / 8; ++n) {
            for (int i = 0; i < 4; ++i) zero += 0 * acc[n][i];
        }
        return zero == 0;
    }
};

template <class T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
    const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
    mma<T>(left, a, b_left);
    mma<T>(right, a, b_right);
}

// Bytes from a tile's first row to the address of this lane for ldmatrix4, where lane 8i + j has row j of
// matrix i. For chunks 2k and 2k + 1 instead of 0 and 1, shared_xor the address with 32k.
//
// For queries and, transposed, values: matrices 0 and 1 are rows 0-7 and 8-15 of chunk 0, 2 and 3 those of
// chunk 1.
template <class Tile>
__device__ __forceinline__ int rows_first() {
    const int lane = threadIdx.x % WARP;
    return lane % 16 * Tile::ROW_BYTES + chunk_bytes(lane, lane / 16);
}

// For keys: matrices 0 and 1 are the two chunks of rows 0-7, 2 and 3 those of rows 8-15.
template <class Tile>
__device__ __forceinline__ int chunks_first() {
    const int lane = threadIdx.x % WARP;
    return (lane / 16 * 8 + lane % 8) * Tile::ROW_BYTES + chunk_bytes(lane, lane / 8 % 2);
}

// The products of the warp's rows, in registers or shared memory, with COUNT keys.
template <class Tile, int COUNT>
__device__ __forceinline__ void scores(float (&s)[COUNT / 8][4], const uint32_t (&q)[Tile::K / 16][4],
                                       Shared queries, Shared keys) {
    queries += rows_first<Tile>();
    keys += chunks_first<Tile>();
#pragma unroll
    for (int k = 0; k < Tile::K / 16; ++k) {
        uint32_t rows[4];
        if constexpr (Tile::QUERIES_SHARED) {
            ldmatrix4<false>(rows, shared_xor(queries, k << 5));
        } else {
            for (int i = 0; i < 4; ++i) rows[i] = q[k][i];
        }
#pragma unroll
        for (int n = 0; n < COUNT / 16; ++n) {
            uint32_t b[4];
            ldmatrix4<false>(b, shared_xor(keys, k << 5) + n * 16 * Tile::ROW_BYTES);
            mma_pair<typename Tile::T>(s[2 * n], s[2 * n + 1], rows, b);
        }
    }
}

// Sets -inf for columns that a row doesn't see, and NaN for those that it sees and whose `poison` (null:
// none) is NaN. `column` is this thread's first, `lo` (null: no window) that of the batch row; `seen` and
// `oldest` are of this thread's rows, which are 8 apart.
template <int COUNT>
__device__ __forceinline__ void hide(float (&s)[COUNT / 8][4], int column, const Interval* seen,
                                     const float* poison, const int* lo, const int* oldest) {
    if (poison != nullptr) {
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n) {
            for (int i = 0; i < 4; ++i) s[n][i] += poison[8 * n + i % 2];
        }
    }
    const Interval seen_by[2] = {seen[0], seen[8]};
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!seen_by[i / 2].has(column + 8 * n + i % 2)) s[n][i] = -INFINITY;
        }
    }
    if (lo != nullptr) {
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int t = column + 8 * n + i % 2;
                if (s[n][i] != -INFINITY && t - lo[t] < oldest[i / 2 * 8]) s[n][i] = -INFINITY;
            }
        }
    }
}

// Turns scores, which times `factor` are in units of log 2, into weights, and updates top, total and acc.
template <int K, int COUNT>
__device__ __forceinline__ void weigh(Softmax<K>& softmax, float (&s)[COUNT][4], float factor) {
    float fade[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float largest = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < COUNT; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        const float top = fmaxf(softmax.top[r], largest * factor);
        fade[r] = fast_exp2(softmax.top[r] - top);
        softmax.top[r] = top;
        const float subtracted = fmaxf(top, LOWEST_SUBTRACTED);
        float total = 0;
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                s[n][i] = fast_exp2(s[n][i] * factor - subtracted);
                total += s[n][i];
            }
        }
        softmax.total[r] = softmax.total[r] * fade[r] + total;
    }
    if (ballot(fade[0] != 1 || fade[1] != 1)) {  // rare after the first keys
#pragma unroll
        for (int n = 0; n < K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) softmax.acc[n][i] *= fade[i / 2];
        }
    }
}

// acc += weights times COUNT values.
template <class Tile, int COUNT>
__device__ __forceinline__ void add_values(Softmax<Tile::K>& softmax, const float (&weights)[COUNT / 8][4],
                                           Shared values) {
    values += rows_first<Tile>();
    uint32_t p[COUNT / 16][4];
#pragma unroll
    for (int n = 0; n < COUNT / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float (&pair)[4] = weights[2 * n + i / 2];
            p[n][i] = pack<typename Tile::T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int k = 0; k < Tile::K / 16; ++k) {
#pragma unroll
        for (int n = 0; n < COUNT / 16; ++n) {
            uint32_t b[4];
            ldmatrix4<true>(b, shared_xor(values, k << 5) + n * 16 * Tile::ROW_BYTES);
            mma_pair<typename Tile::T>(softmax.acc[2 * k], softmax.acc[2 * k + 1], p[n], b);
        }
    }
}

// Adds COUNT keys, from row `key` of a stage, to the softmax of this warp's rows. The first is column
// `column` of what the rows see, notes.own or notes.text; `lo` as in `hide`; `poisoned` if notes.poison is
// that of this stage.
template <class Tile, int COUNT>
__device__ __forceinline__ void softmax_step(Softmax<Tile::K>& softmax, const uint32_t (&q)[Tile::K / 16][4],
                                             Shared queries, Shared stage, int key, int column,
                                             const Interval* seen, const typename Tile::Notes& notes,
                                             const ThoughtDecodeArguments& a, const int* lo, bool poisoned) {
    const int lane = threadIdx.x % WARP, pair = lane % 4 * 2, row = threadIdx.x / WARP * 16 + lane / 4;
    const Shared keys = stage + key * Tile::ROW_BYTES;
    float s[COUNT / 8][4] = {};
    scores<Tile, COUNT>(s, q, queries, keys);
    if (a.softcap != 0) {
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n) {
            for (int i = 0; i < 4; ++i) s[n][i] = a.softcap * tanhf(s[n][i] * (a.scale / a.softcap));
        }
    }
    hide<COUNT>(s, column + pair, seen + row, poisoned ? notes.poison + key + pair : nullptr, lo,
                notes.oldest + row);
    weigh(softmax, s, (a.softcap != 0 ? 1 : a.scale) * LOG2_E);
    add_values<Tile, COUNT>(softmax, s, keys + Tile::VALUES);
}

// Stores the rows of this warp to `out`, or to `parts`: there each part is a separate softmax, with the log2
// of its sum of weights. `head` is the first query head of the group, counted over the batch.
template <class Tile>
__device__ __forceinline__ void store(const Softmax<Tile::K>& softmax, const ThoughtDecodeArguments& a,
                                      const typename Tile::Notes& notes, int head, int split) {
    constexpr int K = Tile::K;
    const int lane = threadIdx.x % WARP;
    const int64_t thoughts = a.C, rows = a.B * a.H * thoughts;
    float totals[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        totals[r] = softmax.total[r] + shuffle_xor(softmax.total[r], 1);
        totals[r] += shuffle_xor(totals[r], 2);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float total = totals[r];
        const int out_row = notes.out_row[threadIdx.x / WARP * 16 + lane / 4 + 8 * r];
        if (out_row < 0) continue;
        const int64_t row = head * thoughts + out_row;
        const float scale = total == 0 ? 0 : 1 / total;
        if (a.splits == 1) {
            uint32_t* to = static_cast<uint32_t*>(a.out) + (row * K + lane % 4 * 2) / 2;
#pragma unroll
            for (int n = 0; n < K / 8; ++n) {
                to[4 * n] =
                    pack<typename Tile::T>(softmax.acc[n][2 * r] * scale, softmax.acc[n][2 * r + 1] * scale);
            }
        } else {
            float* to = static_cast<float*>(a.parts) + (split * rows + row) * K + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < K / 8; ++n) {
                *reinterpret_cast<float2*>(to + 8 * n) = {softmax.acc[n][2 * r] * scale,
                                                          softmax.acc[n][2 * r + 1] * scale};
            }
            float* log_total = static_cast<float*>(a.parts) + a.splits * rows * K + split * rows;
            if (lane % 4 == 0) log_total[row] = total == 0 ? LOWEST : softmax.top[r] + fast_log2(total);
        }
    }
}

}  // namespace quietstar
