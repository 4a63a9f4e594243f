// A tile of thought_decode: its sizes, its shared memory, and the copies into it.
#pragma once

#include "common.cuh"
#include "thought_decode.cuh"

namespace quietstar {

constexpr int OWN_KEYS = 16;  // own rows that a warp's 16 query rows meet at a time

// The place of a warp: batch row, key head, query heads of a key head, its first flat row.
struct Place {
    int b, g, HG, flat;
};

// first, first + 1, .. count of them.
struct Interval {
    int first;
    unsigned count;

    __device__ __forceinline__ int last() const { return first + static_cast<int>(count) - 1; }
    __device__ __forceinline__ bool has(int i) const { return static_cast<unsigned>(i - first) < count; }
    __device__ __forceinline__ bool meets(int from, int others) const {
        return from + others > first && from <= last();
    }
};

// The own rows of the thoughts of a warp's query rows make one sequence: key j is row first + j % count
// of thought `thought` + j / count.
struct OwnRows {
    int thought, thoughts;
    int first;
    unsigned count;

    __device__ __forceinline__ int keys() const { return thoughts * static_cast<int>(count); }
};

// The keys of a block of threads: blocks of own rows, then in a tree those of the nodes above, then blocks of
// text from `start`; none after `end` is read.
struct KeyBlocks {
    int own, above, all;
    int start, end;
};

// A block of keys of a node that others go on from: its rows row .. row + KEYS - 1 of `rows`.
struct Above {
    int node, row, rows;
};

// WARPS warps of 16 query rows each; KEYS keys and their values in each of STAGES stages; a warp takes STEP
// keys at a time; registers for BLOCKS blocks of threads on a processor.
template <class T_, int K_, int WARPS_, int KEYS_, int STAGES_, int STEP_, int BLOCKS_>
struct Tile {
    using T = T_;
    static constexpr int K = K_, WARPS = WARPS_, KEYS = KEYS_, STAGES = STAGES_;
    static constexpr int STEP = STEP_, BLOCKS = BLOCKS_;
    static constexpr int ROWS = 16 * WARPS, THREADS = WARP * WARPS;
    static constexpr bool QUERIES_SHARED = K > 128;          // else they are in registers
    static constexpr int ROW_BYTES = 2 * K, CHUNKS = K / 8;  // a chunk is what one cp_async copies
    static constexpr int VALUES = KEYS * ROW_BYTES;          // where in a stage the values begin
    static constexpr int STAGE_BYTES = 2 * VALUES;
    static constexpr int QUERIES = STAGES * STAGE_BYTES;  // where the queries begin
    static constexpr int NOTES = QUERIES + (QUERIES_SHARED ? ROWS * ROW_BYTES : 0);

    // What threads share.
    struct Notes {
        Interval text[ROWS];             // the positions that each row sees
        Interval own[ROWS];              // the keys that it sees in its warp's sequence of own rows
        Interval above[ROWS];            // the rows that it sees of a node above
        Above ahead[WARPS], now[WARPS];  // the block above that is loaded, and the one that is worked on
        int oldest[ROWS];                // the oldest position id that it sees under a window
        int out_row[ROWS];               // head * C + thought; -1 if there is no such row
        Interval warp_text[WARPS];       // from the first to the last position that a row of a warp sees
        OwnRows warp_own[WARPS];
        Place place[WARPS];
        KeyBlocks blocks;
        float poison[KEYS];  // NaN for a key of the stage whose value has a NaN or infinity, else 0
        int reduced[WARPS][4];
    };
    static constexpr int SHARED_BYTES = NOTES + sizeof(Notes);

    static_assert(KEYS >= ROWS, "each warp has 16 rows of a stage for own keys");
    static_assert(SHARED_BYTES <= (ROWS * K > 8192 ? 163 : 99) * 1024, "what sm_80 has, and sm_120");
    static_assert(KEYS % STEP == 0 && STEP % 16 == 0 && WARP % CHUNKS == 0);
};

// Chunk c of row r lies at r * ROW_BYTES + chunk_bytes(r, c): eight rows of a column are in eight different
// banks.
__device__ __forceinline__ int chunk_bytes(int row, int chunk) { return (chunk ^ (row & 7)) << 4; }

template <class V>
__device__ __forceinline__ const V* at(const void* base, int64_t offset) {
    return static_cast<const V*>(base) + offset;
}

// Writes to `notes` what this warp's rows see: nothing if they are off.
template <class Tile>
__device__ __forceinline__ void note_rows(typename Tile::Notes& notes, const ThoughtDecodeArguments& a,
                                          const Place& place, int now) {
    const int row = threadIdx.x % 16, thoughts = a.C;
    const int thought = (place.flat + row) / place.HG, head = (place.flat + row) % place.HG;
    int first = INT32_MAX, last = -1, path_row = now;
    if (thought < thoughts) {  // both loads start before the step arrives
        const int64_t index = static_cast<int64_t>(place.b) * thoughts + thought;
        const int* branch = at<int>(a.table, index * 3);
        const int anchor = branch[0], length = branch[2];
        if (now < length) last = anchor;
        if (a.tree) path_row += *at<int>(a.tree, index * 4);
        if (last >= 0) first = *at<int>(a.lo, static_cast<int64_t>(place.b) * a.L + last);
    }
    const bool on = last >= 0;
    int warp_first = first, warp_last = last;
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
        warp_first = min(warp_first, shuffle_xor(warp_first, lanes));
        warp_last = max(warp_last, shuffle_xor(warp_last, lanes));
    }
    OwnRows own;
    own.thought = place.flat / place.HG;
    own.thoughts = warp_last < 0 ? 0 : min((place.flat + 15) / place.HG, thoughts - 1) - own.thought + 1;
    own.first = a.window ? max(now + 1 - a.window, 0) : 0;
    own.count = now + 1 - own.first;

    const int warp = threadIdx.x / WARP, noted = 16 * warp + row;
    if (threadIdx.x % WARP < 16) {
        notes.text[noted] = {first, on ? last + 1u - first : 0};
        notes.own[noted] = {(thought - own.thought) * static_cast<int>(own.count), on ? own.count : 0};
        notes.oldest[noted] = on ? last - first + path_row + 2 - a.window : INT32_MAX;
        notes.out_row[noted] = thought < thoughts ? head * thoughts + thought : -1;
    }
    if (threadIdx.x % WARP == 0) {
        notes.warp_text[warp] = {warp_first, warp_last < 0 ? 0 : warp_last + 1u - warp_first};
        notes.warp_own[warp] = own;
    }
    warp_sync();
}

// Loads the warp's query rows in the layout of mma; zeros for rows that are off.
template <class Tile>
__device__ __forceinline__ void read_queries(uint32_t (&q)[Tile::K / 16][4],
                                             const typename Tile::Notes& notes,
                                             const ThoughtDecodeArguments& a, const Place& place) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r;
        const int thought = (place.flat + row) / place.HG, head = (place.flat + row) % place.HG;
        const bool on = notes.text[threadIdx.x / WARP * 16 + row].count > 0;
        const uint16_t* from =
            at<uint16_t>(a.q, place.b * a.q_stride[0] + (place.g * place.HG + head) * a.q_stride[1] +
                                  thought * a.q_stride[2] + lane % 4 * 2);
#pragma unroll
        for (int k = 0; k < Tile::CHUNKS; ++k) {
            q[k / 2][k % 2 * 2 + r] = on ? *reinterpret_cast<const uint32_t*>(from + 8 * k) : 0;
        }
    }
}

// The same to shared memory.
template <class Tile>
__device__ __forceinline__ void load_queries(Shared queries, const typename Tile::Notes& notes,
                                             const ThoughtDecodeArguments& a, const Place& place) {
    const int lane = threadIdx.x % WARP, chunk = lane % Tile::CHUNKS;
    const uint16_t* q =
        at<uint16_t>(a.q, place.b * a.q_stride[0] + place.g * place.HG * a.q_stride[1] + 8 * chunk);
#pragma unroll 1
    for (int row = lane / Tile::CHUNKS; row < 16; row += WARP / Tile::CHUNKS) {
        const int64_t thought = (place.flat + row) / place.HG, head = (place.flat + row) % place.HG;
        cp_async(queries + row * Tile::ROW_BYTES + chunk_bytes(row, chunk),
                 q + head * a.q_stride[1] + thought * a.q_stride[2],
                 notes.text[threadIdx.x / WARP * 16 + row].count > 0);
    }
}

// Copies own keys j0 .. j0 + 15 of this warp to its rows of a stage; zeros for thoughts that are off.
template <class Tile>
__device__ __forceinline__ void load_own(Shared stage, const typename Tile::Notes& notes,
                                         const ThoughtDecodeArguments& a, const Place& place, int j0) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, chunk = lane % Tile::CHUNKS;
    const OwnRows own = notes.warp_own[warp];
    const uint16_t* k =
        at<uint16_t>(a.k_own, place.b * a.k_own_stride[0] + place.g * a.k_own_stride[1] + 8 * chunk);
    const uint16_t* v =
        at<uint16_t>(a.v_own, place.b * a.v_own_stride[0] + place.g * a.v_own_stride[1] + 8 * chunk);
#pragma unroll 1
    for (int row = lane / Tile::CHUNKS; row < OWN_KEYS; row += WARP / Tile::CHUNKS) {
        const unsigned j = j0 + row, index = j / own.count;
        const int64_t thought = own.thought + index, s = own.first + j % own.count;
        const int row_of = max(static_cast<int>(thought) * place.HG - place.flat, 0);  // a row of the thought
        const bool on =
            index < static_cast<unsigned>(own.thoughts) && notes.text[16 * warp + row_of].count > 0;
        const Shared to = stage + (16 * warp + row) * Tile::ROW_BYTES + chunk_bytes(row, chunk);
        cp_async(to, k + thought * a.k_own_stride[2] + s * a.k_own_stride[3], on);
        cp_async(to + Tile::VALUES, v + thought * a.v_own_stride[2] + s * a.v_own_stride[3], on);
    }
}

// Copies rows first .. first + KEYS - 1 of keys and values to a stage; zeros after row `end`.
template <class Tile>
__device__ __forceinline__ void load_rows(Shared stage, const uint16_t* k, const uint16_t* v,
                                          int64_t k_stride, int64_t v_stride, int first, int end) {
    constexpr int PASS = Tile::THREADS / Tile::CHUNKS;
    const int chunk = threadIdx.x % Tile::CHUNKS, row = threadIdx.x / Tile::CHUNKS;
    k += (first + row) * k_stride + 8 * chunk;
    v += (first + row) * v_stride + 8 * chunk;
#pragma unroll
    for (int i = 0; i < Tile::KEYS; i += PASS) {
        const Shared to = stage + (row + i) * Tile::ROW_BYTES + chunk_bytes(row + i, chunk);
        const bool on = first + row + i <= end;
        cp_async(to, k, on);
        cp_async(to + Tile::VALUES, v, on);
        k += PASS * k_stride;
        v += PASS * v_stride;
    }
}

template <class Tile>
__device__ __forceinline__ void load_text(Shared stage, const ThoughtDecodeArguments& a, const Place& place,
                                          int first, int end) {
    const int64_t *k = a.k_text_stride, *v = a.v_text_stride;
    load_rows<Tile>(stage, at<uint16_t>(a.k_text, place.b * k[0] + place.g * k[1]),
                    at<uint16_t>(a.v_text, place.b * v[0] + place.g * v[1]), k[2], v[2], first, end);
}

// The next of the nodes that rows of the tile go on from: those of the tile, from the last to the `first`,
// and then those above that one. It begins after the last; in the end the node is -1.
template <class Tile>
__device__ __forceinline__ void next_block(Above& above, const ThoughtDecodeArguments& a, const Place& place,
                                           int first) {
    const int* table = at<int>(a.table, static_cast<int64_t>(place.b) * a.C * 3);
    const int* tree = at<int>(a.tree, static_cast<int64_t>(place.b) * a.C * 4);
    above.row += Tile::KEYS;
    while (above.row >= above.rows) {
        above.node = above.node > first ? above.node - 1 : tree[above.node * 4 + 3];
        if (above.node < 0) return;
        const int start = table[above.node * 3 + 1], rows = table[above.node * 3 + 2];
        above.row = 0;
        above.rows = tree[above.node * 4 + 1] > start + rows ? rows : 0;
    }
}

template <class Tile>
__device__ __forceinline__ void load_above(Shared stage, const ThoughtDecodeArguments& a, const Place& place,
                                           const Above& above) {
    const int64_t *k = a.k_own_stride, *v = a.v_own_stride;
    load_rows<Tile>(stage, at<uint16_t>(a.k_own, place.b * k[0] + place.g * k[1] + above.node * k[2]),
                    at<uint16_t>(a.v_own, place.b * v[0] + place.g * v[1] + above.node * v[2]), k[3], v[3],
                    above.row, above.rows - 1);
}

// Writes which rows of that node each row of the warp sees to notes.above.
template <class Tile>
__device__ __forceinline__ void note_above(typename Tile::Notes& notes, const ThoughtDecodeArguments& a,
                                           const Place& place, const Above& above) {
    const int row = threadIdx.x % 16, noted = threadIdx.x / WARP * 16 + row;
    const int* table = at<int>(a.table, static_cast<int64_t>(place.b) * a.C * 3);
    const int* tree = at<int>(a.tree, static_cast<int64_t>(place.b) * a.C * 4);
    const int after = table[above.node * 3 + 1] + above.rows;
    const int end = tree[above.node * 4 + 1], depth = tree[above.node * 4];
    int first = 0, stop = 0;
    if (notes.text[noted].count > 0) {
        const int thought = (place.flat + row) / place.HG, start = table[thought * 3 + 1];
        const int path_row = *static_cast<const int*>(a.step) + tree[thought * 4];
        if (a.window) first = max(path_row + 1 - a.window - depth, 0);
        if (start >= after && start < end) stop = above.rows;
    }
    warp_sync();
    if (threadIdx.x % WARP < 16) notes.above[noted] = {first, static_cast<unsigned>(max(stop - first, 0))};
    warp_sync();
}

}  // namespace quietstar
