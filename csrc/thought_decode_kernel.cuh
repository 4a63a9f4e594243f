// The kernel of thought_decode: a block of threads takes ROWS query rows of one key head, and all of their
// text or a part of it.
//
// The H/G query heads of a key head are folded into the rows: flat row f is thought f / HG under head f % HG,
// and a warp has 16 of them. Blocks of keys are loaded through one cp.async pipeline: first own rows, where
// each warp fills 16 rows of a stage for itself, then what all warps share: in a tree rows of the nodes
// above, and text. The layout is read on the device, so that a CUDA graph can capture the launch.
#pragma once

#include <stdexcept>

#include "thought_decode_softmax.cuh"

namespace quietstar {

// Replaces each of up to four values by its minimum over the block of threads.
template <class Tile, int COUNT>
__device__ __forceinline__ void block_min(int (&values)[COUNT], typename Tile::Notes& notes) {
    block_sync();  // the previous results have been read
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) values[i] = min(values[i], shuffle_xor(values[i], lanes));
        if (threadIdx.x % WARP == 0) notes.reduced[threadIdx.x / WARP][i] = values[i];
    }
    block_sync();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int warp = 0; warp < Tile::WARPS; ++warp) values[i] = min(values[i], notes.reduced[warp][i]);
    }
}

// The first text position in start .. end whose position id is at least `oldest`; end + 1 if there is none.
// Ids need not ascend, so all of the text is checked.
template <class Tile>
__device__ __forceinline__ int first_in_window(int start, int end, int oldest, const int* lo,
                                               typename Tile::Notes& notes) {
    int first = end + 1;
    for (int t = start + static_cast<int>(threadIdx.x); t < first; t += Tile::THREADS) {
        if (t - lo[t] >= oldest) first = t;
    }
    int values[] = {first};
    block_min<Tile>(values, notes);
    return values[0];
}

// Replaces NaN and infinity in a row of values by 0, since 0 * NaN would reach rows that don't see the key.
// Returns NaN if there was one, for the rows that see the key, else 0.
template <class Tile>
__device__ __forceinline__ float without_poison(unsigned char* row) {
    uint16_t* values = reinterpret_cast<uint16_t*>(row);
    float poison = 0;
#pragma unroll 1
    for (int i = 0; i < Tile::K; ++i) {
        const float zero = 0 * to_float<typename Tile::T>(values[i]);
        if (zero != 0) values[i] = 0;
        poison += zero;
    }
    return poison;
}

// The first thought of the tile.
template <class Tile>
__device__ __forceinline__ int first_thought(const typename Tile::Notes& notes) {
    return notes.place[0].flat / notes.place[0].HG;
}

// Where `next_block` begins.
template <class Tile>
__device__ __forceinline__ Above after_last(const typename Tile::Notes& notes,
                                            const ThoughtDecodeArguments& a) {
    return {min((notes.place[0].flat + Tile::ROWS - 1) / notes.place[0].HG, a.C - 1) + 1, 0, 0};
}

// Goes to the next block in shared memory, where registers are few, with a copy for each warp.
template <class Tile>
__device__ __forceinline__ const Above& advance(Above& above, const typename Tile::Notes& notes,
                                                const ThoughtDecodeArguments& a, const Place& place) {
    Above next = above;
    next_block<Tile>(next, a, place, first_thought<Tile>(notes));
    warp_sync();
    if (threadIdx.x % WARP == 0) above = next;
    warp_sync();
    return above;
}

// Writes the blocks of keys to `notes`.
template <class Tile>
__device__ __forceinline__ void note_blocks(typename Tile::Notes& notes, const ThoughtDecodeArguments& a,
                                            const Place& place, int split) {
    const int warp = threadIdx.x / WARP;
    const Interval text_seen = notes.warp_text[warp];
    int least[] = {text_seen.first, text_seen.count > 0 ? -text_seen.last() : 1,
                   notes.oldest[16 * warp + threadIdx.x % 16], -notes.warp_own[warp].keys()};
    block_min<Tile>(least, notes);
    KeyBlocks blocks;
    blocks.start = least[0];
    blocks.end = -least[1];
    if (a.window && blocks.end >= 0) {
        const int* lo = at<int>(a.lo, static_cast<int64_t>(place.b) * a.L);
        blocks.start = first_in_window<Tile>(blocks.start, blocks.end, least[2], lo, notes);
    }
    const int text = max(blocks.end + Tile::KEYS - blocks.start, 0) / Tile::KEYS;
    const int part = (text + a.splits - 1) / a.splits;
    blocks.own = split > 0 ? 0 : (OWN_KEYS - 1 - least[3]) / OWN_KEYS;
    blocks.all = blocks.own + max(min(part, text - split * part), 0);
    blocks.start += split * part * Tile::KEYS;
    if (threadIdx.x == 0) {
        blocks.above = 0;
        if (a.tree && blocks.own > 0) {
            const int first = first_thought<Tile>(notes);
            for (Above above = after_last<Tile>(notes, a);; ++blocks.above) {
                next_block<Tile>(above, a, place, first);
                if (above.node < 0) break;
            }
            blocks.all += blocks.above;
        }
        notes.blocks = blocks;
    }
    block_sync();
}

// A tree takes registers, which other layouts should not pay for.
template <class Tile, bool TREE>
__global__ void __launch_bounds__(Tile::THREADS, TREE ? 1 : Tile::BLOCKS) decode(ThoughtDecodeArguments a) {
    unsigned char* memory = dynamic_shared();
    auto& notes = *reinterpret_cast<typename Tile::Notes*>(memory + Tile::NOTES);
    const int warp = threadIdx.x / WARP;
    const int pair = blockIdx.x % (a.B * a.G), split = blockIdx.y;
    const int tile = (gridDim.x - 1 - blockIdx.x) / (a.B * a.G);  // those that see the most text come first

    const int now = *static_cast<const int*>(a.step);
    const Place& place = notes.place[warp];
    if (threadIdx.x % WARP == 0) {
        notes.place[warp] = {pair / a.G, pair % a.G, a.H / a.G, tile * Tile::ROWS + 16 * warp};
    }
    warp_sync();
    note_rows<Tile>(notes, a, place, now);

    const Shared queries = shared_address(memory + Tile::QUERIES) + 16 * warp * Tile::ROW_BYTES;
    uint32_t q[Tile::K / 16][4];
    if constexpr (Tile::QUERIES_SHARED) {
        load_queries<Tile>(queries, notes, a, place);
    } else {
        read_queries<Tile>(q, notes, a, place);
    }

    note_blocks<Tile>(notes, a, place, split);
    const KeyBlocks& blocks = notes.blocks;
    const auto load = [&](int block) {
        const Shared stage = shared_address(memory + block % Tile::STAGES * Tile::STAGE_BYTES);
        const int text = block - blocks.own - (TREE ? blocks.above : 0);
        if (block < blocks.own) {
            load_own<Tile>(stage, notes, a, place, block * OWN_KEYS);
        } else if (TREE && text < 0) {
            load_above<Tile>(stage, a, place, advance<Tile>(notes.ahead[warp], notes, a, place));
        } else if (block < blocks.all) {
            load_text<Tile>(stage, a, place, blocks.start + text * Tile::KEYS, blocks.end);
        }
        cp_async_commit();
    };

    // If a result isn't finite, start over with checks, so that 0 * NaN doesn't reach rows that don't see the
    // NaN.
    Softmax<Tile::K> softmax;
    for (bool again = false;; again = true) {
        softmax.begin(a.sinks == nullptr || split > 0 ? nullptr : at<float>(a.sinks, place.g * place.HG),
                      place);
        if (TREE && threadIdx.x % WARP == 0) notes.ahead[warp] = notes.now[warp] = after_last<Tile>(notes, a);
        warp_sync();
        for (int block = 0; block < Tile::STAGES - 1; ++block) load(block);
        for (int block = 0; block < blocks.all; ++block) {
            cp_async_wait<Tile::STAGES - 2>();
            block_sync();
            load(block + Tile::STAGES - 1);
            const int where = block % Tile::STAGES * Tile::STAGE_BYTES;
            if (again) {
                for (int key = threadIdx.x; key < Tile::KEYS; key += Tile::THREADS) {
                    notes.poison[key] =
                        without_poison<Tile>(memory + where + Tile::VALUES + key * Tile::ROW_BYTES);
                }
                block_sync();
            }
            const Shared stage = shared_address(memory + where);
            if (block < blocks.own) {
                if (block * OWN_KEYS >= notes.warp_own[warp].keys()) continue;
                softmax_step<Tile, OWN_KEYS>(softmax, q, queries, stage, 16 * warp, block * OWN_KEYS,
                                             notes.own, notes, a, nullptr, again);
                continue;
            }
            const int text = block - blocks.own - (TREE ? blocks.above : 0);
            if (TREE && text < 0) {
                const Above& above = advance<Tile>(notes.now[warp], notes, a, place);
                note_above<Tile>(notes, a, place, above);
#pragma unroll 1
                for (int key = 0; key < Tile::KEYS && above.row + key < above.rows; key += Tile::STEP) {
                    softmax_step<Tile, Tile::STEP>(softmax, q, queries, stage, key, above.row + key,
                                                   notes.above, notes, a, nullptr, again);
                }
                continue;
            }
            const int first = blocks.start + text * Tile::KEYS;
            const int* lo = a.window ? at<int>(a.lo, static_cast<int64_t>(place.b) * a.L) : nullptr;
            const Interval seen = notes.warp_text[warp];
#pragma unroll 1
            for (int key = 0; key < Tile::KEYS; key += Tile::STEP) {
                if (!seen.meets(first + key, Tile::STEP)) continue;
                softmax_step<Tile, Tile::STEP>(softmax, q, queries, stage, key, first + key, notes.text,
                                               notes, a, lo, again);
            }
        }
        int finite[] = {softmax.finite()};
        block_min<Tile>(finite, notes);
        if (again || finite[0]) break;
    }
    cp_async_wait<0>();
    store<Tile>(softmax, a, notes, (place.b * a.G + place.g) * place.HG, split);
}

template <class Tile>
void launch_tile(const ThoughtDecodeArguments& a, void* stream) {
    const int rows = a.C * (a.H / a.G);
    const dim3 grid((rows + Tile::ROWS - 1) / Tile::ROWS * a.B * a.G, a.splits);
    launch(a.tree ? decode<Tile, true> : decode<Tile, false>, grid, Tile::THREADS, Tile::SHARED_BYTES, stream,
           a);
}

// All tiles. 128 rows of K 128 and 64 of K 256 take more shared memory than the 99 KB of sm_120.
template <class T, int K>
void launch_decode(const ThoughtDecodeArguments& a, void* stream) {
    if constexpr (K == 256) {
        if (a.tile_rows == 64) return launch_tile<Tile<T, K, 4, 64, 2, 16, 1>>(a, stream);
        if (a.tile_rows == 32) return launch_tile<Tile<T, K, 2, 32, 2, 16, 2>>(a, stream);
    } else {
        constexpr int WIDE = K / 64;  // twice the registers and the memory: half the blocks
        if (a.tile_rows == 128) return launch_tile<Tile<T, K, 8, 128, 2, 32, 2 / WIDE>>(a, stream);
        if (a.tile_rows == 64) return launch_tile<Tile<T, K, 4, 64, 3, 32, 4 / WIDE>>(a, stream);
        if (a.tile_rows == 32) return launch_tile<Tile<T, K, 2, 64, 3, 32, 4 / WIDE>>(a, stream);
    }
    throw std::runtime_error("thought_decode: no tile of that many rows");
}

}  // namespace quietstar
