// Attention of a tile's rows with one online softmax: the text first, a block of keys at a time, then the own
// keys of each branch.
#pragma once
#include <math.h>

#include "decode.hpp"
#include "tile.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

// Whether products are of pairs.
inline bool in_pairs(Dtype dtype) {
#if defined(QUIETSTAR_PAIRS)
    return dtype == Dtype::BFLOAT16;
#else
    (void)dtype;
    return false;
#endif
}

// What forward and backward keep of a block of keys.
struct KeyBlock {
    alignas(64) float k[KEYS * STRIDE];
    float v[KEYS * STRIDE];
    float k_panels[KEYS * 256];
    int32_t position[KEYS + LANES];
    bool bad[KEYS];  // has a NaN or an infinity, and is 0 here
    bool any_bad;
};

// Rows that will be read soon. The text keeps the processor busy and the memory idle, own caches are the
// other way round: so each product of a block asks for some of them.
struct Ahead {
    static constexpr int MOST = 1024, AT_A_TIME = 8;
    const char* rows[MOST];
    int64_t bytes;
    int count, next;

    void add(const char* row) {
        if (count < MOST) rows[count++] = row;
    }
    void some() {
        const int end = next + AT_A_TIME < count ? next + AT_A_TIME : count;
        for (; next < end; ++next)
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows[next] + i, 0, 2);
    }
};

struct ForwardSpace {
    KeyBlock keys;
    Ahead ahead;
    alignas(64) float q[TILE * STRIDE];
    float out[TILE * STRIDE];
    float scores[TILE * STRIDE];
    float top[TILE + LANES];    // the largest score so far, times log2(e)
    float total[TILE + LANES];  // the sum of 2^(score - top)
    float factor[TILE + LANES];
    Tile tile;
};

template <bool PAIRS>
void read_keys(KeyBlock& keys, Source k, Source v, int count, int64_t K, int64_t E, Dtype dtype) {
    memset(keys.bad, 0, sizeof keys.bad);
    const bool bad_k = read_block<PAIRS>(keys.k, k, count, dtype, K, keys.bad);
    const bool bad_v = read_block<PAIRS>(keys.v, v, count, dtype, E, keys.bad);
    keys.any_bad = bad_k || bad_v;
    if (keys.any_bad) {
        zero_rows(keys.k, keys.bad, count, K);
        zero_rows(keys.v, keys.bad, count, E);
    }
    to_panels(keys.k_panels, keys.k, count, words<PAIRS>(K));
}

// The position ids of text keys, where a window needs them.
inline const int32_t* read_positions(KeyBlock& keys, const Layout& layout, int64_t batch, int64_t window,
                                     int begin, int count) {
    if (!window) return nullptr;
    const int32_t* const lo = layout.lo + batch * layout.L + begin;
    for (int i = 0; i < count; ++i) keys.position[i] = begin + i - lo[i];
    for (int i = count; i < round_up(count, LANES); ++i) keys.position[i] = 0;
    return keys.position;
}

// to [rows r0..r1, keys] = x [rows,width] times panels, as far as a row of each block sees.
template <bool PAIRS>
void multiply_keys(float* to, const float* x, const float* panels, const Tile& tile, int r0, int r1,
                   int64_t width, Ahead* ahead = nullptr) {
    const int depth = words<PAIRS>(width), wide = round_up(depth, LANES), end = end_of(tile, r0, r1);
    for (int key = 0; key < end; key += PANEL) {
        const Blocks blocks(r0, r1);
        for (int r = r0; r < r1; r += blocks.size) {
            const int rows = blocks.rows(r), left = end_of(tile, r, r + rows) - key;
            if (left <= 0) continue;
            if (ahead) ahead->some();
            float* const block = to + r * STRIDE + key;
            block_of<PAIRS, false>(rows, left > LANES)(x + r * STRIDE, panels + key * wide, PANEL, block,
                                                       STRIDE, depth, nullptr, false);
        }
    }
}

// to [rows r0..r1,width] = factor * to + weights [rows,keys] times values [keys,width].
template <bool PAIRS>
void add_values(float* to, const float* weights, const float* values, const Tile& tile, int r0, int r1,
                int64_t width, const float* factor, Ahead* ahead = nullptr) {
    const int wide = round_up(width, LANES);
    const Blocks blocks(r0, r1);
    for (int column = 0; column < wide; column += PANEL)
        for (int r = r0; r < r1; r += blocks.size) {
            const int rows = blocks.rows(r), depth = words<PAIRS>(end_of(tile, r, r + rows));
            if (depth == 0) continue;
            if (ahead) ahead->some();
            block_of<PAIRS, false>(rows, wide - column > LANES)(weights + r * STRIDE, values + column, STRIDE,
                                                                to + r * STRIDE + column, STRIDE, depth,
                                                                factor ? factor + r : nullptr, true);
        }
}

// Scores, as the products are, times this are in units of log 2.
inline float unit_of(const Options& options) {
    return (options.softcap > 0 ? options.softcap : options.scale) * LOG2_E;
}

// Caps the scores of row r and makes those that it doesn't see -inf. Lanes of the result: the largest ones.
inline Vec mask_row(ForwardSpace& space, int r, int end, const int32_t* position, const Options& options) {
    float* const scores = space.scores + r * STRIDE;
    const float cap = options.softcap;
    Vec tops = splat(-INFINITY);
    for (int column = 0; column < end; column += LANES) {
        Vec x = load(scores + column);
        const bool seen = sees_all(space.tile, r, column, position);
        if (cap > 0) x = tanh(x * (options.scale / cap));
        if (!seen) x = select(visible(space.tile, r, column, position), x, splat(-INFINITY));
        if (!seen || cap > 0) store(scores + column, x);
        tops = larger(tops, x);
    }
    return tops;
}

// Scores of `rows` rows from r on, LANES at most, become weights, up to `end` keys. What is kept of the rows
// after them stays as it is.
template <bool PAIRS>
void softmax_rows(ForwardSpace& space, int r, int rows, int end, const int32_t* position,
                  const Options& options) {
    const float unit = unit_of(options);
    Vec lanes[LANES];
    for (int i = 0; i < LANES; ++i)
        lanes[i] = i < rows ? mask_row(space, r + i, end, position, options) : splat(-INFINITY);
    const Vec before = load(space.top + r), top = larger(largest_of(lanes) * unit, before);
    const Vec least = select(top == splat(-INFINITY), Vec{}, top);  // a row that has seen nothing yet
    for (int i = 0; i < LANES; ++i) {
        float* const scores = space.scores + (r + i) * STRIDE;
        Vec total{};
        for (int column = 0; i < rows && column < end; column += LANES) {
            const Vec p = exp2(load(scores + column) * unit - least[i]);
            if constexpr (PAIRS)
                store((uint16_t*)scores + column, rounded(p));
            else
                store(scores + column, p);
            total += p;
        }
        lanes[i] = total;
    }
    const Vec factor = exp2(before - least);
    store(space.factor + r, factor);
    store(space.total + r, load(space.total + r) * factor + sums_of(lanes));
    store(space.top + r, top);
}

// Rows r0..r1 attend to the block of keys, within the tile's bounds.
template <bool PAIRS>
void attend(ForwardSpace& space, int r0, int r1, int64_t K, int64_t E, const int32_t* position,
            const Options& options) {
    Tile& tile = space.tile;
    KeyBlock& keys = space.keys;
    multiply_keys<PAIRS>(space.scores, space.q, keys.k_panels, tile, r0, r1, K, &space.ahead);
    const Blocks blocks(r0, r1);
    for (int r = r0; r < r1; r += blocks.size) {
        const int rows = blocks.rows(r), end = end_of(tile, r, r + rows);
        if (end == 0) continue;
        for (int i = 0; i < rows; i += LANES)
            softmax_rows<PAIRS>(space, r + i, rows - i < LANES ? rows - i : LANES, end, position, options);
    }
    if (PAIRS) to_pairs(keys.v, keys.v, end_of(tile, r0, r1), E);
    add_values<PAIRS>(space.out, space.scores, keys.v, tile, r0, r1, E, space.factor, &space.ahead);
    if (keys.any_bad)
        for (int r = r0; r < r1; ++r)
            for (int j = tile.from[r]; j < tile.to[r]; ++j)
                if (keys.bad[j] && (!position || position[j] > tile.oldest[r])) tile.poisoned[r] = true;
}

// Notes where a row is and what it sees; false if it is off.
inline bool add_row(Tile& tile, int64_t heads, const Layout& layout, int64_t text_rows, int64_t window,
                    int64_t step, bool text, int64_t i, int32_t& head, int64_t& row) {
    head = (int32_t)(tile.group * heads + i % heads);
    const int64_t place = i / heads;
    int64_t t = place, branch = -1, s = -1, own_end = 0;
    row = text ? place : text_rows + place;
    if (!text) {
        branch = step >= 0 ? place : layout.of_row[tile.batch * layout.R + place];
        if (branch < 0) return false;
        const Branch& of = branch_of(layout, tile.batch, branch);
        const Node node = node_of(layout, tile.batch, branch);
        s = step >= 0 ? step : place - of.start;
        if (s >= of.length) return false;
        t = of.anchor;
        own_end = node.depth + (layout.full && node.leaf ? of.length : s + 1);
        s += node.depth;
    }
    const int r = tile.rows++;
    const int32_t lo = layout.lo[tile.batch * layout.L + t];
    tile.query_head[r] = head;
    tile.query_row[r] = row;
    tile.branch[r] = (int32_t)branch;
    tile.place[r] = (int32_t)place;
    tile.own[r] = (int32_t)s;
    tile.own_end[r] = (int32_t)own_end;
    tile.first[r] = lo;
    tile.end[r] = (int32_t)t + 1;
    const int64_t oldest = t - lo + 1 + s - window;
    tile.oldest[r] = (int32_t)(oldest < INT32_MIN ? INT32_MIN : oldest);
    tile.poisoned[r] = false;
    return true;
}

// The end of the rows that belong to the branch of row r.
inline int end_of_branch(const Tile& tile, int r) {
    int end = r + 1;
    while (end < tile.rows && tile.branch[end] == tile.branch[r]) ++end;
    return end;
}

inline float* lse_of(const Forward& call, int64_t batch, int64_t head, int64_t row) {
    const int64_t rows = call.text_rows + call.layout.R;
    return call.lse + (batch * call.H + head) * rows + row;
}

inline void finish_row(const Forward& call, ForwardSpace& space, int r) {
    const Tile& tile = space.tile;
    float lse = space.top[r] * LN_2 + logf(space.total[r]), factor = 1 / space.total[r];
    if (call.options.sinks) {
        const float sink = call.options.sinks[tile.query_head[r]], alone = lse;
        const float most = sink > lse ? sink : lse;
        lse = most + log1pf(expf(-fabsf(sink - lse)));
        factor *= expf(alone - lse);
    }
    if (tile.poisoned[r]) lse = factor = NAN;
    char* const to = row_of(call.out, call.dtype, tile.batch, tile.query_head[r], tile.query_row[r]);
    write_row(to, space.out + r * STRIDE, factor, call.dtype, call.E);
    if (call.lse) *lse_of(call, tile.batch, tile.query_head[r], tile.query_row[r]) = lse;
}

// Own key s of a branch.
inline Source own_keys(const Forward& call, const Tile& tile, const Rows& packed, const Rows& cache,
                       int64_t branch, int64_t s) {
    const Layout& layout = call.layout;
    const int64_t size = size_of(call.dtype);
    if (call.step >= 0)
        return {row_of(cache, call.dtype, tile.batch, tile.group, branch, s), cache.own * size};
    const int64_t row = layout.L + branch_of(layout, tile.batch, branch).start + s;
    return {row_of(packed, call.dtype, tile.batch, tile.group, row), packed.row * size};
}

// Reads the tile's queries. Rows that are off get their result here.
template <bool PAIRS>
void read_queries(const Forward& call, ForwardSpace& space, const Piece& piece) {
    Tile& tile = space.tile;
    const int64_t heads = call.H / call.G;
    tile.rows = 0;
    for (int64_t i = piece.begin; i < piece.end; ++i) {
        int32_t head;
        int64_t row;
        const int r = tile.rows;
        if (add_row(tile, heads, call.layout, call.text_rows, call.options.window, call.step, piece.text, i,
                    head, row)) {
            const char* const q = row_of(call.q, call.dtype, tile.batch, head, row);
            // Rows of a tile alternate between heads, so that processors don't foresee them.
            const char* const later = q + 4 * call.q.row * size_of(call.dtype);
            for (int64_t b = 0; b < call.K * size_of(call.dtype); b += 64)
                __builtin_prefetch(later + b, 0, 2);
            read_row<PAIRS>(space.q + r * STRIDE, q, call.dtype, call.K);
            memset(space.out + r * STRIDE, 0, 4 * round_up(call.E, LANES));
            space.top[r] = -INFINITY;
            space.total[r] = 0;
        } else {
            fill_row(row_of(call.out, call.dtype, tile.batch, head, row), 0, call.dtype, call.E);
            if (call.lse) *lse_of(call, tile.batch, head, row) = -INFINITY;
        }
    }
}

template <bool PAIRS>
void attend_to_text(const Forward& call, ForwardSpace& space) {
    Tile& tile = space.tile;
    const Layout& layout = call.layout;
    const Seen seen = text_of(tile, layout, call.options.window);
    for (int begin = seen.first, count; begin < seen.end; begin += count) {
        count = block_end(layout, tile.batch, begin, seen.end) - begin;
        const Source k = {row_of(call.k, call.dtype, tile.batch, tile.group, begin),
                          call.k.row * size_of(call.dtype)};
        const Source v = {row_of(call.v, call.dtype, tile.batch, tile.group, begin),
                          call.v.row * size_of(call.dtype)};
        read_keys<PAIRS>(space.keys, k, v, count, call.K, call.E, call.dtype);
        const int32_t* const position =
            read_positions(space.keys, layout, tile.batch, call.options.window, begin, count);
        bound_by_text(tile, begin, count);
        attend<PAIRS>(space, 0, tile.rows, call.K, call.E, position, call.options);
    }
}

template <bool PAIRS>
void attend_to_own(const Forward& call, ForwardSpace& space) {
    Tile& tile = space.tile;
    if (tile.rows == 0) return;
    const Layout& layout = call.layout;
    int r0 = 0, r1;
    for (int64_t c = root_of(layout, tile.batch, tile.branch[0]); c <= tile.branch[tile.rows - 1]; ++c) {
        const Branch& branch = branch_of(layout, tile.batch, c);
        const Node node = node_of(layout, tile.batch, c);
        find_rows(tile, branch, node, r0, r1);
        if (r0 == r1) continue;
        const int end = own_keys_end(tile, branch, node, r1);
        for (int begin = 0; begin < end; begin += KEYS) {
            const int count = end - begin < KEYS ? end - begin : KEYS;
            bound_by_own(tile, r0, r1, node.depth + begin, count, call.options.window);
            if (end_of(tile, r0, r1) == 0) continue;
            const Source k = own_keys(call, tile, call.k, call.k_own, c, begin);
            const Source v = own_keys(call, tile, call.v, call.v_own, c, begin);
            read_keys<PAIRS>(space.keys, k, v, count, call.K, call.E, call.dtype);
            attend<PAIRS>(space, r0, r1, call.K, call.E, nullptr, call.options);
        }
    }
}

// The same in a decoding step, where rows r0..r1, of one branch, see the first `end` own keys of branch c.
inline void attend_to_own_in_place(const Forward& call, ForwardSpace& space, int r0, int r1, int64_t c,
                                   int64_t end) {
    Tile& tile = space.tile;
    const int64_t window = call.options.window, depth = node_of(call.layout, tile.batch, c).depth;
    const int64_t oldest = window ? tile.own[r0] + 1 - window - depth : 0;
    for (int64_t begin = oldest > 0 ? oldest : 0; begin < end; begin += KEYS) {
        const int count = end - begin < KEYS ? (int)(end - begin) : KEYS;
        const Source k = own_keys(call, tile, call.k, call.k_own, c, begin);
        const Source v = own_keys(call, tile, call.v, call.v_own, c, begin);
        for (int r = r0; r < r1; r += FEW) {
            const int rows = r1 - r < FEW ? r1 - r : FEW;
            const OwnProducts products = own_products(call.dtype, rows);
            float *const q = space.q + r * STRIDE, *const scores = space.scores + r * STRIDE;
            float* const out = space.out + r * STRIDE;
            bound_by_own(tile, r, r + rows, (int32_t)(depth + begin), count, window);
            space.ahead.some();
            const bool good_k = products.multiply(scores, q, k, count, call.K);
            softmax_rows<false>(space, r, rows, count, nullptr, call.options);
            const bool good_v = products.add(out, scores, space.factor + r, v, count, call.E);
            for (int i = r; i < r + rows; ++i) tile.poisoned[i] |= !good_k || !good_v;
        }
    }
}

// The own keys of the tile's branches and, in a tree, of those on their paths.
inline void attend_to_paths_in_place(const Forward& call, ForwardSpace& space) {
    const Tile& tile = space.tile;
    const Layout& layout = call.layout;
    for (int r0 = 0, r1; r0 < tile.rows; r0 = r1) {
        r1 = end_of_branch(tile, r0);
        const int64_t own = tile.branch[r0], start = branch_of(layout, tile.batch, own).start;
        for (int64_t c = root_of(layout, tile.batch, own); c < own; ++c)
            if (node_of(layout, tile.batch, c).end > start)
                attend_to_own_in_place(call, space, r0, r1, c, branch_of(layout, tile.batch, c).length);
        attend_to_own_in_place(call, space, r0, r1, own, call.step + 1);
    }
}

// The own keys that the tile's rows see, in the order in which they are read.
inline void look_ahead(const Forward& call, ForwardSpace& space) {
    const Tile& tile = space.tile;
    Ahead& ahead = space.ahead;
    ahead.bytes = (call.K < call.E ? call.K : call.E) * size_of(call.dtype);
    for (int r0 = 0; r0 < tile.rows; r0 = end_of_branch(tile, r0)) {
        const int end = tile.own_end[end_of_branch(tile, r0) - 1] -
                        node_of(call.layout, tile.batch, tile.branch[r0]).depth;
        const Source k = own_keys(call, tile, call.k, call.k_own, tile.branch[r0], 0);
        const Source v = own_keys(call, tile, call.v, call.v_own, tile.branch[r0], 0);
        for (int s = 0; s < end; ++s) {
            ahead.add(k.first + s * k.stride);
            ahead.add(v.first + s * v.stride);
        }
    }
}

template <bool PAIRS>
void forward_of(const Forward& call, const Piece& piece, int64_t group, char* workspace) {
    ForwardSpace& space = *(ForwardSpace*)workspace;
    Tile& tile = space.tile;
    tile.batch = piece.batch;
    tile.group = group;
    read_queries<PAIRS>(call, space, piece);
    space.ahead.count = space.ahead.next = 0;
    if (!piece.text) look_ahead(call, space);
    attend_to_text<PAIRS>(call, space);
    if (!piece.text && call.step < 0) attend_to_own<PAIRS>(call, space);
    if (!piece.text && call.step >= 0) {
        for (int r = 0; PAIRS && r < tile.rows; ++r)  // own keys are used in place, as floats
            read_row(space.q + r * STRIDE,
                     row_of(call.q, call.dtype, tile.batch, tile.query_head[r], tile.query_row[r]),
                     call.dtype, call.K);
        attend_to_paths_in_place(call, space);
    }
    for (int r = 0; r < tile.rows; ++r) finish_row(call, space, r);
}

inline void forward(const Forward& call, const Piece& piece, int64_t group, char* workspace) {
    (in_pairs(call.dtype) ? forward_of<true> : forward_of<false>)(call, piece, group, workspace);
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
