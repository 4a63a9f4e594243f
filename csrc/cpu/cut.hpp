// Cuts the query rows of a call into tiles. What it finds depends on the layout and the sizes alone, never on
// the number of threads.
//
// The H/G query heads of a key head are rows too: those of text position or branch row i are i*H/G + h, so
// that rows next to each other see about the same text.
#pragma once
#include <algorithm>
#include <vector>

#include "arguments.hpp"

namespace quietstar {

constexpr int64_t SMALLEST_TILE = 56;
constexpr int64_t ENOUGH_TILES = 32;  // for some threads to share

class Cut {
  public:
    int64_t tile;
    std::vector<Unit> units;     // of each batch row: branches in order, then text
    std::vector<int64_t> first;  // unit of each batch row, and one more

    Cut(const Layout& layout, int64_t heads, int64_t groups, int64_t text_rows, bool decode, int64_t most) {
        const int64_t rows = decode ? layout.C : layout.R;
        const int64_t all = (text_rows + rows) * heads * layout.B * groups;
        for (tile = most; tile > SMALLEST_TILE && all < ENOUGH_TILES * tile;) tile /= 2;
        for (int64_t b = 0; b < layout.B; ++b) {
            first.push_back((int64_t)units.size());
            add_rows(b, add_branches(layout, b, heads, decode), rows * heads, false);
            add_rows(b, 0, text_rows * heads, true);
        }
        first.push_back((int64_t)units.size());
    }

    // Tiles of the last branches see most: they come first, so that the threads end at the same time.
    std::vector<Piece> pieces() const {
        std::vector<std::vector<Piece>> own(first.size() - 1), text(first.size() - 1);
        for (const Unit& unit : units)
            for (int64_t begin = unit.begin; begin < unit.end; begin += tile)
                (unit.text ? text : own)[unit.batch].push_back(
                    {unit.batch, begin, std::min(begin + tile, unit.end), unit.text});
        for (auto& of_batch : own) std::reverse(of_batch.begin(), of_batch.end());
        std::vector<Piece> all;
        for (const auto* kind : {&own, &text})
            for (size_t i = 0, more = 1; more; ++i) {
                more = 0;
                for (const auto& of_batch : *kind)
                    if (i < of_batch.size()) all.push_back(of_batch[i]), more = 1;
            }
        return all;
    }

  private:
    // Whole branches or trees, as many as fit a tile; or one that may be longer. Returns the row after the
    // last.
    int64_t add_branches(const Layout& layout, int64_t b, int64_t heads, bool decode) {
        int64_t begin = 0, end = 0, branch = 0;
        for (int64_t c = 0, next; c < layout.C; c = next) {
            next = decode ? c + 1 : after_tree(layout, b, c);
            const int64_t after = (decode ? next : end_of_rows(layout, b, next - 1)) * heads;
            if (end > begin && after - begin > tile) {
                units.push_back({b, begin, end, branch, c, false});
                begin = end, branch = c;
            }
            end = after;
        }
        if (end > begin) units.push_back({b, begin, end, branch, layout.C, false});
        return end;
    }

    // Rows that belong to no branch, a tile a unit.
    void add_rows(int64_t b, int64_t begin, int64_t end, bool text) {
        for (; begin < end; begin += tile)
            units.push_back({b, begin, std::min(begin + tile, end), 0, 0, text});
    }
};

}  // namespace quietstar
