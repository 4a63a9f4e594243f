// Draws one id per row from its logits, by the race that quietstar_kernels/sample_token.py defines. Random
// numbers and the choice are in fp64, as in the reference; weights are in fp32.
#pragma once
#include <math.h>

#include "arguments.hpp"
#include "vector.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int IDS = 128, GROUP = 16;  // ids of a block of the race, and of a group inside it
constexpr float LOWEST = -1e30f;      // above -inf, so that differences are numbers
constexpr double INFINITE = 1e30 * 0.6931471805599453;  // an LSE as large as this counts as infinite

// Philox4x32-10 (Salmon et al., SC 2011): the first two words of one call.
inline void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = UINT64_C(0xD2511F53) * counter[0], b = UINT64_C(0xCD9E8D57) * counter[2];
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)b;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

// glibc has newer versions of exp and log than manylinux_2_28 may ask for, but not of these.
inline double exponential(double x) { return expm1(x) + 1; }  // to 1e-16 absolutely, for x <= 0

inline double logarithm(double x) {
    int exponent;
    double part = frexp(x, &exponent);
    if (part < 0.7071067811865476) {
        part *= 2;
        --exponent;
    }
    return exponent * 0.6931471805599453 + log1p(part - 1);
}

inline double to_unit(uint32_t word) { return (word + 0.5) / 4294967296.0; }

// The logits of ids first..first+IDS of a row, -inf after the last; returns the largest, which is not NaN.
inline float read_logits(const Sample& call, const float* row, int64_t first, float (&logits)[IDS]) {
    const int64_t count = call.V - first < IDS ? call.V - first : IDS;
    memcpy(logits, row + first, 4 * count);
    for (int64_t i = count; i < IDS; ++i) logits[i] = 0;
    if (call.bias)
        for (int64_t i = 0; i < count; ++i) logits[i] += call.bias[first + i];
    const float divisor = call.temperature == 0 ? 1 : call.temperature, cap = call.softcap;
    for (int i = 0; i < IDS; i += LANES) {
        Vec x = load(logits + i) * call.scale;
        if (cap > 0) {
            const Vec size = bits_to_floats(floats_to_bits(x) & INT32_MAX);
            x = select(size == INFINITY, x, tanh(x / cap) * cap);
        }
        store(logits + i, x);
    }
    for (int64_t i = count; i < IDS; ++i) logits[i] = -INFINITY;
    for (int64_t i = 0; i < call.bans; ++i)
        if (call.banned[i] >= first && call.banned[i] < first + count)
            logits[call.banned[i] - first] -= INFINITY;
    Vec top = splat(-INFINITY);
    for (int i = 0; i < IDS; i += LANES) {
        const Vec x = load(logits + i) / divisor;
        store(logits + i, x);
        top = larger(x, top);
    }
    return largest(top);
}

// The place at which the running sum of `count` weights passes `goal`; if rounding leaves none, the last with
// a weight.
inline int first_above(const double* weights, int count, double goal) {
    double running = 0;
    int last = 0;
    for (int i = 0; i < count; ++i) {
        running += weights[i];
        if (weights[i] > 0) {
            if (running > goal) return i;
            last = i;
        }
    }
    return last;
}

// The id inside a block at which the running sum of weights passes `fraction` of their total: first the group
// of 16.
inline int draw(const float (&logits)[IDS], float top, double fraction) {
    double weights[IDS], groups[IDS / GROUP], total = 0, before = 0;
    for (int i = 0; i < IDS; i += LANES) {
        const Vec p = exp2((load(logits + i) - top) * LOG2_E);
        for (int lane = 0; lane < LANES; ++lane) weights[i + lane] = p[lane];
    }
    for (int g = 0; g < IDS / GROUP; ++g) {
        groups[g] = 0;
        for (int i = 0; i < GROUP; ++i) groups[g] += weights[g * GROUP + i];
        total += groups[g];
    }
    const double goal = fraction * total;
    const int group = first_above(groups, IDS / GROUP, goal);
    for (int g = 0; g < group; ++g) before += groups[g];
    return group * GROUP + first_above(weights + group * GROUP, GROUP, goal - before);
}

inline void sample(const Sample& call, int64_t r) {
    const float* const row = call.logits + r * call.logits_stride;
    const int32_t* const counter = call.counters + r * call.counters_stride;
    float logits[IDS];
    double best = -INFINITY, fraction = 0, most = -INFINITY, total = 0;
    int64_t winner = 0;
    for (int64_t first = 0; first < call.V; first += IDS) {
        const float top = read_logits(call, row, first, logits), level = top > LOWEST ? top : LOWEST;
        Vec sums{};
        for (int i = 0; i < IDS; i += LANES) sums += exp2((load(logits + i) - level) * LOG2_E);
        const float weight = sum(sums);
        const double lse = level + logarithm(weight);
        if (lse > most) {
            total = total * exponential(most - lse) + 1;
            most = lse;
        } else if (weight != 0) {
            total += exponential(lse - most);  // NaN stays NaN
        }
        if (call.temperature == 0) {
            if (top > best) {
                best = top;
                winner = first;
            }
            continue;
        }
        uint32_t words[4] = {(uint32_t)counter[0], (uint32_t)counter[1],
                             ((uint32_t)counter[2] << 16) + (uint32_t)counter[3], (uint32_t)(first / IDS)};
        philox(words, (uint32_t)call.seed, (uint32_t)(call.seed >> 32));
        const double score = lse - logarithm(-log1p(-to_unit(words[0])));
        if (score > best) {
            best = score;
            winner = first;
            fraction = to_unit(words[1]);
        }
    }
    const double lse = most + logarithm(total);
    const bool finite = fabs(lse) < INFINITE;
    int place = 0;
    if (finite) {
        const float top = read_logits(call, row, winner, logits);
        if (call.temperature == 0)
            while (logits[place] != top) ++place;
        else
            place = draw(logits, top, fraction);
    }
    call.ids[r] = finite ? winner + place : -1;
    call.logprob[r] = finite ? (float)(logits[place] - lse) : NAN;
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
