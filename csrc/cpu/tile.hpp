// Cuts the query rows of a head into tiles, and knows what each row of a tile sees.
//
// The H/G query heads of a key head are rows too: those of text position t are t*H/G + h, those of thought i
// are (i*S + s)*H/G + h, so that rows next to each other see about the same text.
#pragma once
#include "rows.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

constexpr int TILE = 224;  // rows: 16 blocks with AVX-512
constexpr int SMALLEST_TILE = 56;
constexpr int ENOUGH_TILES = 32;  // for some threads to share

// A range of query rows. Tiles of a unit belong to one thought that is too long for a tile; other units are
// one tile.
struct Piece {
    bool text;
    int64_t begin, end;
};

// What depends on the sizes of a call alone, never on the number of threads.
struct Cut {
    int64_t heads, text_rows, thoughts, thought_rows, tile, per_unit, pieces;
    int64_t thought_units, text_units;

    Cut(const Layout& layout, int64_t heads_, int64_t groups, int64_t text_positions, bool decode,
        int64_t most = TILE) {
        heads = heads_;
        text_rows = text_positions * heads;
        thoughts = layout.P * layout.N;
        thought_rows = (decode ? 1 : layout.S) * heads;
        const int64_t all = (text_rows + thoughts * thought_rows) * layout.B * groups;
        for (tile = most; tile > SMALLEST_TILE && all < ENOUGH_TILES * tile;) tile /= 2;
        per_unit = thought_rows < tile ? tile / thought_rows : 1;
        pieces = (thought_rows + tile - 1) / tile;
        thought_units = (thoughts + per_unit - 1) / per_unit;
        text_units = (text_rows + tile - 1) / tile;
    }

    int64_t units() const { return thought_units + text_units; }
    int64_t tiles() const { return thought_units * pieces + text_units; }
    int64_t tiles_of(int64_t unit) const { return unit < thought_units ? pieces : 1; }

    // Thoughts come first.
    Piece piece(int64_t unit, int64_t part) const {
        if (unit >= thought_units) {
            const int64_t begin = (unit - thought_units) * tile;
            return {true, begin, begin + tile < text_rows ? begin + tile : text_rows};
        }
        const int64_t first = unit * per_unit * thought_rows;
        const int64_t last = (unit + 1) * per_unit * thought_rows, all = thoughts * thought_rows;
        if (pieces == 1) return {false, first, last < all ? last : all};
        const int64_t begin = first + part * tile;
        return {false, begin, begin + tile < last ? begin + tile : last};
    }
};

// The rows of a tile that are on. Bounds of keys are inclusive `first` and exclusive `end`.
struct Tile {
    int rows;
    int64_t batch, group;
    int32_t query_head[TILE];        // h
    int64_t query_row[TILE];         // in the query tensor
    int32_t thought[TILE];           // p*N + n; -1 for text
    int32_t own[TILE];               // s
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
    return seen;
}

// Text keys begin..begin+count become the block.
inline void bound_by_text(Tile& tile, int32_t begin, int32_t count) {
    for (int r = 0; r < tile.rows; ++r) {
        const int32_t from = tile.first[r] - begin, to = tile.end[r] - begin;
        tile.from[r] = from > 0 ? from : 0;
        tile.to[r] = to < 0 ? 0 : to < count ? to : count;
    }
}

// Own keys begin..begin+count of the thought of rows r0..r1 become the block.
inline void bound_by_own(Tile& tile, int r0, int r1, int32_t begin, int32_t count, int64_t window) {
    for (int r = r0; r < r1; ++r) {
        const int64_t to = tile.own[r] + 1 - begin, from = window ? to - window : 0;
        tile.from[r] = (int32_t)(from > 0 ? from : 0);
        tile.to[r] = (int32_t)(to < 0 ? 0 : to < count ? to : count);
    }
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
