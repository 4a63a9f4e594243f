// The kernel of sample_token: a block of threads takes a row of the chunk, and each of its warps 512 columns
// at a time.
//
// Eight lanes have one block of 128 ids, and each lane one of its groups of 16, as
// quietstar_kernels/sample_token.py defines the race. When a block wins, which is rare, the kernel finds
// where the draw falls inside it, while its weights are in registers.
#include "random.cuh"
#include "sample_token.cuh"

namespace quietstar {

constexpr int BLOCK = 128, GROUP = 16;  // ids of a block of the race, and of a group inside it
constexpr int STEP = WARP * GROUP;      // columns that a warp takes at a time
constexpr int MOST_THREADS = 512;
constexpr float LOWEST = -1e30f;   // above -inf, so that differences are numbers
constexpr float INFINITE = 1e30f;  // an LSE as large as this counts as infinite
constexpr float TINY = 1e-30f;
constexpr float BELOW_ONE = 1 - 0x1p-24f;  // the fp32 number before 1
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// The result of a part of a row, in bits: the leading id, and the sum of all weights over 2^top.
struct Standing {
    float score = -INFINITY, logit = 0;  // of the leading id
    int token = 0;
    float top = LOWEST, total = 0;

    // The better score leads; of equal ones, that of the lower id.
    __device__ __forceinline__ void join(const Standing& other) {
        if (other.score > score || (other.score == score && other.token < token)) {
            score = other.score;
            logit = other.logit;
            token = other.token;
        }
        add(other.top, other.total);
    }

    // A sum of weights over 2^level.
    __device__ __forceinline__ void add(float level, float sum) {
        const float higher = fmaxf(top, level);
        total = total * fast_exp2(top - higher) + sum * fast_exp2(level - higher);
        top = higher;
    }
};

// From a product to its logit, scaled but not yet capped, and from that to bits.
struct Logits {
    float scale, softcap, unit;

    __device__ __forceinline__ explicit Logits(const SampleTokenArguments& x)
        : scale(x.scale), softcap(x.softcap), unit(LOG2_E / (x.temperature == 0 ? 1 : x.temperature)) {}

    // Columns first .. first + 15; -inf for those that are banned or after the last.
    __device__ __forceinline__ void load(float (&y)[GROUP], const float* row, const float* bias, int first,
                                         int columns) const {
        if (first + GROUP <= columns) {
#pragma unroll
            for (int i = 0; i < GROUP; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(row + first + i);
                y[i] = four.x, y[i + 1] = four.y, y[i + 2] = four.z, y[i + 3] = four.w;
            }
            if (bias != nullptr) {
#pragma unroll
                for (int i = 0; i < GROUP; i += 4) {
                    const float4 four = *reinterpret_cast<const float4*>(bias + first + i);
                    y[i] += four.x, y[i + 1] += four.y, y[i + 2] += four.z, y[i + 3] += four.w;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                const bool there = first + i < columns;
                y[i] = there ? row[first + i] + (bias == nullptr ? 0 : bias[first + i]) : -INFINITY;
            }
        }
        if (scale != 1) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) y[i] *= scale;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ void to_bits(float (&y)[COUNT]) const {
        if (softcap == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) y[i] *= unit;
            return;
        }
        const float inner = 2 * LOG2_E / softcap, outer = softcap * unit;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float capped = outer - 2 * outer * fast_reciprocal(fast_exp2(y[i] * inner) + 1);
            y[i] = capped + TINY * y[i];  // what is infinite stays so
        }
    }
};

// Over the eight lanes of a block of ids.
__device__ __forceinline__ float block_max(float x) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) x = fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

__device__ __forceinline__ float block_sum(float x) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) x += shuffle_xor(x, lanes);
    return x;
}

// The best score of the warp, and the first lane that has it.
__device__ __forceinline__ float warp_best(float score, int& lane) {
    float best = score;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) best = fmaxf(best, shuffle_xor(best, lanes));
    lane = lowest_bit(ballot(score == best) | 1u << (WARP - 1));  // no lane has it if all are NaN
    return best;
}

// The column in block `winner` of the warp at which the running sum of weights passes `fraction` of the
// total: first the group, then the column inside it. All lanes return it and its weight.
__device__ __forceinline__ int draw(const float (&weights)[GROUP], float fraction, int winner,
                                    float& weight) {
    const int lane = threadIdx.x % WARP;
    float group = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) group += weights[i];
    // One group after another, so that a group without weight adds nothing at all.
    float running = group, before = 0;
#pragma unroll
    for (int i = 1; i < BLOCK / GROUP; ++i) {
        const float left = shuffle(running, (lane + WARP - 1) % WARP);
        if (lane % 8 == i) {
            before = left;
            running = left + group;
        }
    }
    const float goal = fminf(fraction, BELOW_ONE) * shuffle(running, lane | 7);
    const int there = lowest_bit(ballot(running > goal) >> (8 * winner) | 0x80);

    // Rounding may move the goal past the end of the group. Then the draw falls on the last column that
    // has a weight.
    int column = 0;
    float sum = 0, drawn = 0;
    bool passed = false;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        sum += weights[i];
        if (!passed && weights[i] > 0) {
            column = i;
            drawn = weights[i];
            passed = sum > goal - before;
        }
    }
    const int owner = 8 * winner + there;
    weight = shuffle(drawn, owner);
    return there * GROUP + shuffle(column, owner);
}

template <bool GREEDY>
__global__ void __launch_bounds__(MOST_THREADS) race(SampleTokenArguments x) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int64_t r = blockIdx.x;
    const float* row = static_cast<const float*>(x.logits) + r * x.logits_stride;
    const float* bias = static_cast<const float*>(x.bias);
    const int32_t* counter = static_cast<const int32_t*>(x.counters) + r * x.counters_stride[0];
    const auto word = [&](int i) { return static_cast<uint32_t>(counter[i * x.counters_stride[1]]); };
    const uint32_t sequence = word(0), position = word(1), thought = (word(2) << 16) + word(3);
    const Logits logits(x);

    Standing mine;
    for (int start = warp * STEP; start < x.columns; start += warps * STEP) {
        const int first = start + lane * GROUP;
        float y[GROUP];
        logits.load(y, row, bias, first, x.columns);
        float largest = y[0];
#pragma unroll
        for (int i = 1; i < GROUP; ++i) largest = fmaxf(largest, y[i]);
        float peak[] = {block_max(largest)};
        logits.to_bits(peak);
        const float level = fmaxf(peak[0], LOWEST);

        float weights[GROUP], sum = 0;
#pragma unroll
        for (int i = 0; i < GROUP; ++i) weights[i] = y[i];
        logits.to_bits(weights);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            weights[i] = fast_exp2(weights[i] - level);
            sum += weights[i];
        }
        sum = block_sum(sum);
        mine.add(level, sum);

        int leader;
        if constexpr (GREEDY) {
            const float best = warp_best(largest, leader);
            if (best > mine.score) {
                int column = GROUP - 1;
#pragma unroll
                for (int i = GROUP - 2; i >= 0; --i) column = y[i] == best ? i : column;
                mine.score = best;
                mine.logit = shuffle(level, leader);
                mine.token = x.first + start + leader * GROUP + shuffle(column, leader);
            }
        } else {
            const uint32_t block = static_cast<uint32_t>(x.first + first) / BLOCK;
            // Volatile: read each time, here, where sm_80 has registers for it.
            const uint64_t seed = *static_cast<const volatile uint64_t*>(x.seed);
            const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
            const uint2 words = philox({sequence, position, thought, block}, key0, key1);
            const float score =
                sum > 0 ? level + fast_log2(sum * fast_reciprocal(exponential(words.x))) : -INFINITY;
            const float best = warp_best(score, leader);
            if (best > mine.score) {
                float weight;
                const int column = draw(weights, to_unit(words.y), leader / 8, weight);
                mine.score = best;
                mine.logit = shuffle(level, leader) + fast_log2(weight);
                mine.token = x.first + start + leader / 8 * BLOCK + column;
            }
        }
    }

    // The blocks of a warp, then the warps, then this chunk with the earlier ones: always in this order.
#pragma unroll
    for (int lanes = 8; lanes < WARP; lanes *= 2)
        mine.add(shuffle_xor(mine.top, lanes), shuffle_xor(mine.total, lanes));
    Standing* all = reinterpret_cast<Standing*>(dynamic_shared());
    if (lane == 0) all[warp] = mine;
    block_sync();
    if (threadIdx.x != 0) return;
    Standing result;
    float4* state = static_cast<float4*>(x.state) + r;
    int64_t* id = static_cast<int64_t*>(x.ids) + r;
    if (x.first > 0) {
        result.score = state->x, result.logit = state->y, result.top = state->z, result.total = state->w;
        result.token = static_cast<int>(*id);
    }
    for (int i = 0; i < warps; ++i) result.join(all[i]);
    *state = {result.score, result.logit, result.top, result.total};
    const float lse = result.top + fast_log2(result.total);
    const bool finite = fabsf(lse) < INFINITE;  // not if it is NaN
    *id = finite ? result.token : -1;
    static_cast<float*>(x.logprob)[r] = finite ? (result.logit - lse) * LN_2 : NAN;
}

void sample_token(const SampleTokenArguments& x, void* stream) {
    const int threads = min((x.columns + STEP - 1) / STEP * WARP, MOST_THREADS);
    launch(x.temperature == 0 ? race<true> : race<false>, dim3(x.R), threads,
           threads / WARP * sizeof(Standing), stream, x);
}

}  // namespace quietstar
