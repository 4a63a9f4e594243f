// Knows what each row of a tile sees.
#pragma once
#include "rows.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

// The rows of a tile that are on. Bounds of keys are inclusive `first` and exclusive `end`.
struct Tile {
    int rows;
    int64_t batch, group;
    int32_t query_head[TILE];        // h
    int64_t query_row[TILE];         // in the query tensor
    int32_t branch[TILE];            // -1 for text
    int32_t place[TILE];             // among the rows of all branches
    int32_t own[TILE];               // which row of its path
    int32_t own_end[TILE];           // of the own keys on its path that it sees
    int32_t first[TILE], end[TILE];  // of the text
    int32_t oldest[TILE];            // with a window: position ids above this are seen
    int32_t from[TILE], to[TILE];    // of the current block of keys
    bool poisoned[TILE];             // sees a NaN
};

struct Seen {
    int32_t first, end;
};

// The text that at least one of the tile's rows sees.
inline Seen text_of(const Tile& tile, const Layout& layout, int64_t window) {
    Seen seen = {INT32_MAX, 0};
    int32_t oldest = INT32_MAX;
    for (int r = 0; r < tile.rows; ++r) {
        if (tile.first[r] < seen.first) seen.first = tile.first[r];
        if (tile.end[r] > seen.end) seen.end = tile.end[r];
        if (tile.oldest[r] < oldest) oldest = tile.oldest[r];
    }
    const int32_t* const lo = layout.lo + tile.batch * layout.L;
    if (window)
        while (seen.first < seen.end && seen.first - lo[seen.first] <= oldest) ++seen.first;
    if (seen.first < seen.end) seen.first -= (seen.first - lo[seen.first]) % LANES;
    return seen;
}

// The end of a block of text keys. The next one begins where a position id is a multiple of KEYS, so that the
// order in which a row sums depends on its own document alone: not on its tile, nor on what is packed beside.
// A document of one token, such as padding, may lie anywhere.
inline int32_t block_end(const Layout& layout, int64_t batch, int32_t begin, int32_t end) {
    const int32_t* const lo = layout.lo + batch * layout.L;
    if (end - begin > KEYS) end = begin + KEYS;
    for (int32_t t = begin + 1; t < end; ++t)
        if ((t - lo[t]) % KEYS == 0 && !(lo[t] == t && t + 1 < layout.L && lo[t + 1] == t + 1)) return t;
    return end;
}

// Text keys begin..begin+count become the block.
inline void bound_by_text(Tile& tile, int32_t begin, int32_t count) {
    for (int r = 0; r < tile.rows; ++r) {
        const int32_t from = tile.first[r] - begin, to = tile.end[r] - begin;
        tile.from[r] = from > 0 ? from : 0;
        tile.to[r] = to < 0 ? 0 : to < count ? to : count;
    }
}

// Own keys begin..begin+count of the path of rows r0..r1 become the block.
inline void bound_by_own(Tile& tile, int r0, int r1, int32_t begin, int32_t count, int64_t window) {
    for (int r = r0; r < r1; ++r) {
        const int64_t to = tile.own_end[r] - begin, from = window ? tile.own[r] + 1 - window - begin : 0;
        tile.from[r] = (int32_t)(from > 0 ? from : 0);
        tile.to[r] = (int32_t)(to < 0 ? 0 : to < count ? to : count);
    }
}

// Rows r0..r1 of the tile belong to a branch or to one below it. Called for branches in turn, with the r0 of
// the one before, first 0.
inline void find_rows(const Tile& tile, const Branch& branch, const Node& node, int& r0, int& r1) {
    while (r0 < tile.rows && tile.place[r0] < branch.start) ++r0;
    for (r1 = r0; r1 < tile.rows && tile.place[r1] < node.end;) ++r1;
}

// The end of the own keys of a branch that the last of the rows it found sees, and so some row.
inline int own_keys_end(const Tile& tile, const Branch& branch, const Node& node, int r1) {
    const int end = tile.own_end[r1 - 1] - node.depth;
    return end < branch.length ? end : branch.length;
}

// The end of the block's keys that one of the rows sees; 0 if none.
inline int end_of(const Tile& tile, int r0, int r1) {
    int end = 0;
    for (int r = r0; r < r1; ++r)
        if (tile.to[r] > tile.from[r] && tile.to[r] > end) end = tile.to[r];
    return end;
}

// Of the lanes of a vector of scores: those of keys that row r sees. `position` has the position ids of the
// keys, or is null.
QUIETSTAR_INLINE Ints visible(const Tile& tile, int r, int column, const int32_t* position) {
    const Ints key = iota() + column;
    Ints seen = (key >= tile.from[r]) & (key < tile.to[r]);
    if (position) seen &= load(position + column) > tile.oldest[r];
    return seen;
}

// Whether row r sees all keys of the vector.
QUIETSTAR_INLINE bool sees_all(const Tile& tile, int r, int column, const int32_t* position) {
    return !position && column >= tile.from[r] && column + LANES <= tile.to[r];
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
