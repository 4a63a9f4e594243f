// Gradients of attention in one pass over the rows: five products for a tile of rows and a block of keys.
//
// A part of a head's units sums its share of the text's dk and dv, in an order that depends on sizes alone;
// `finish` adds up the parts. The own keys of a branch belong to one unit.
#pragma once
#include "forward.hpp"

namespace quietstar {
namespace QUIETSTAR_SET {

struct BackwardSpace {
    KeyBlock keys;
    alignas(64) float v_panels[KEYS * 256];
    float q[BACKWARD_TILE * STRIDE];
    float grad[BACKWARD_TILE * STRIDE];
    float dq[BACKWARD_TILE * STRIDE];
    float weights[BACKWARD_TILE * STRIDE];
    float dscores[BACKWARD_TILE * STRIDE];
    float q_pairs[BACKWARD_TILE / 2 * STRIDE];
    float grad_pairs[BACKWARD_TILE / 2 * STRIDE];
    float row[STRIDE];
    float lse[BACKWARD_TILE];    // times log2(e)
    float delta[BACKWARD_TILE];  // rowsum(grad_out * out) - grad_lse
    Tile tile;
};

// Where the gradients of some keys are summed: rows of k's and v's, in floats.
struct Sums {
    float *dk, *dv;
    int64_t dk_stride, dv_stride;

    Sums at(int64_t row) const { return {dk + row * dk_stride, dv + row * dv_stride, dk_stride, dv_stride}; }
};

constexpr int WIDTH = 16;  // rows of `Backward::sums` have multiples of this

inline Sums sums_of(const Backward& call, int64_t pair, int64_t part) {
    const int64_t width = round_up(call.K, WIDTH) + round_up(call.E, WIDTH);
    const int64_t rows = (call.in_place ? 0 : call.layout.L) + call.own_sums;
    float* const first = call.sums + (pair * call.parts + part) * rows * width;
    return {first, first + round_up(call.K, WIDTH), width, width};
}

inline Sums returned_sums(const Backward& call, int64_t pair, int64_t row) {
    const int64_t batch = pair / call.G, group = pair % call.G;
    return {(float*)row_of(call.dk, call.dtype, batch, group, row),
            (float*)row_of(call.dv, call.dtype, batch, group, row), call.dk.row, call.dv.row};
}

inline Sums text_sums_of(const Backward& call, int64_t pair, int64_t part) {
    return call.in_place ? returned_sums(call, pair, 0) : sums_of(call, pair, part).at(call.own_sums);
}

inline void clear(const Sums& sums, int64_t rows, int64_t K, int64_t E) {
    for (int64_t i = 0; i < rows; ++i) {
        memset(sums.dk + i * sums.dk_stride, 0, 4 * round_up(K, WIDTH));
        memset(sums.dv + i * sums.dv_stride, 0, 4 * round_up(E, WIDTH));
    }
}

// Weights of row r from its scores, and the gradient of the scores from that of the weights.
inline void differentiate_row(BackwardSpace& space, int r, int end, const int32_t* position,
                              const Options& options) {
    float* const weights = space.weights + r * STRIDE;
    float* const dscores = space.dscores + r * STRIDE;
    const float cap = options.softcap, unit = unit_of(options), lse = space.lse[r], delta = space.delta[r];
    for (int column = 0; column < end; column += LANES) {
        Vec x = load(weights + column), slope = splat(options.scale);
        if (cap > 0) {
            x = tanh(x * (options.scale / cap));
            slope = slope * (1 - x * x);
        }
        Vec p = exp2(x * unit - lse);
        Vec ds = p * (load(dscores + column) - delta) * slope;
        if (!sees_all(space.tile, r, column, position)) {
            const Ints seen = visible(space.tile, r, column, position);
            p = select(seen, p, Vec{});
            ds = select(seen, ds, Vec{});
        }
        store(weights + column, p);
        store(dscores + column, ds);
    }
}

// Rounds weights and gradients of the scores of `rows` rows to pairs: of rows in place, in the first rows,
// and of keys behind the gradients of the scores.
inline void round_to_pairs(float* weights, float* dscores, int rows, int keys) {
    for (int r = 0; r < rows; r += 2)
        for (int column = 0; column < keys; column += LANES) {
            Halves w[2] = {}, ds[2] = {};
            for (int i = 0; i < 2 && r + i < rows; ++i) {
                w[i] = rounded(load(weights + (r + i) * STRIDE + column));
                ds[i] = rounded(load(dscores + (r + i) * STRIDE + column));
                store((uint16_t*)(dscores + (r + i) * STRIDE + KEYS) + column, ds[i]);
            }
            store(weights + r / 2 * STRIDE + column, zip(w[0], w[1]));
            store(dscores + r / 2 * STRIDE + column, zip(ds[0], ds[1]));
        }
}

// to [keys,width] += weights [rows,keys] transposed times x [rows,width].
template <bool PAIRS>
void add_to_keys(float* to, int64_t stride, const float* weights, const float* x, int keys, int rows,
                 int64_t width) {
    const int wide = round_up(width, LANES);
    const Blocks blocks(0, keys);
    for (int column = 0; column < wide; column += PANEL)
        for (int key = 0; key < keys; key += blocks.size)
            block_of<PAIRS, true>(blocks.rows(key), wide - column > LANES)(weights + key, x + column, STRIDE,
                                                                           to + key * stride + column, stride,
                                                                           words<PAIRS>(rows), nullptr, true);
}

// The gradients of rows r0..r1 and the block of keys.
template <bool PAIRS>
void differentiate(BackwardSpace& space, int r0, int r1, int64_t K, int64_t E, const int32_t* position,
                   const Options& options, const Sums& sums) {
    const Tile& tile = space.tile;
    const int all = end_of(tile, r0, r1);
    if (all == 0) return;
    multiply_keys<PAIRS>(space.weights, space.q, space.keys.k_panels, tile, r0, r1, K);
    multiply_keys<PAIRS>(space.dscores, space.grad, space.v_panels, tile, r0, r1, E);
    const Blocks blocks(r0, r1);
    for (int r = r0; r < r1; r += blocks.size) {
        const int rows = blocks.rows(r), end = round_up(end_of(tile, r, r + rows), LANES);
        for (int i = r; i < r + rows; ++i) {
            differentiate_row(space, i, end, position, options);
            for (int column = end; column < all; column += LANES) {
                store(space.weights + i * STRIDE + column, Vec{});
                store(space.dscores + i * STRIDE + column, Vec{});
            }
        }
    }
    float *const q = space.q + r0 * STRIDE, *const grad = space.grad + r0 * STRIDE;
    float *const weights = space.weights + r0 * STRIDE, *const dscores = space.dscores + r0 * STRIDE;
    if (PAIRS) {
        round_to_pairs(weights, dscores, r1 - r0, all);
        to_pairs(space.keys.k, space.keys.k, all, K);
        to_pairs(space.q_pairs, q, r1 - r0, K);
        to_pairs(space.grad_pairs, grad, r1 - r0, E);
    }
    add_values<PAIRS>(space.dq, space.dscores + (PAIRS ? KEYS : 0), space.keys.k, tile, r0, r1, K, nullptr);
    add_to_keys<PAIRS>(sums.dk, sums.dk_stride, dscores, PAIRS ? space.q_pairs : q, all, r1 - r0, K);
    add_to_keys<PAIRS>(sums.dv, sums.dv_stride, weights, PAIRS ? space.grad_pairs : grad, all, r1 - r0, E);
}

template <bool PAIRS>
void read_tile(const Backward& call, BackwardSpace& space, const Piece& piece, double* dsinks) {
    Tile& tile = space.tile;
    const int64_t heads = call.H / call.G, all_rows = call.text_rows + call.layout.R;
    tile.rows = 0;
    for (int64_t i = piece.begin; i < piece.end; ++i) {
        int32_t head;
        int64_t row;
        const int r = tile.rows;
        const bool on = add_row(tile, heads, call.layout, call.text_rows, call.options.window, -1, piece.text,
                                i, head, row);
        char* const dq = row_of(call.dq, call.dtype, tile.batch, head, row);
        if (!on) {
            fill_row(dq, 0, call.dtype, call.K);
            continue;
        }
        float* const grad = space.grad + r * STRIDE;
        read_row(grad, row_of(call.grad_out, call.dtype, tile.batch, head, row), call.dtype, call.E);
        read_row(space.row, row_of(call.out, call.dtype, tile.batch, head, row), call.dtype, call.E);
        read_row<PAIRS>(space.q + r * STRIDE, row_of(call.q, call.dtype, tile.batch, head, row), call.dtype,
                        call.K);
        Vec products{};
        for (int e = 0; e < call.E; e += LANES) products += load(grad + e) * load(space.row + e);
        if (PAIRS) read_pairs(grad, row_of(call.grad_out, call.dtype, tile.batch, head, row), call.E);
        const int64_t at = (tile.batch * call.H + head) * all_rows + row;
        const float lse = call.lse[at], delta = sum(products) - (call.grad_lse ? call.grad_lse[at] : 0);
        if (!((delta + lse) * 0 == 0)) {  // it has seen a NaN, and adds nothing to the gradients of the keys
            fill_row(dq, NAN, call.dtype, call.K);
            --tile.rows;
            continue;
        }
        space.delta[r] = delta;
        space.lse[r] = lse * LOG2_E;
        memset(space.dq + r * STRIDE, 0, 4 * round_up(call.K, LANES));
        if (dsinks) dsinks[i % heads] -= (double)(expf(call.options.sinks[head] - lse) * delta);
    }
}

template <bool PAIRS>
void read_all(const Backward& call, BackwardSpace& space, int64_t first, int count) {
    const Tile& tile = space.tile;
    const Source k = {row_of(call.k, call.dtype, tile.batch, tile.group, first),
                      call.k.row * size_of(call.dtype)};
    const Source v = {row_of(call.v, call.dtype, tile.batch, tile.group, first),
                      call.v.row * size_of(call.dtype)};
    read_keys<PAIRS>(space.keys, k, v, count, call.K, call.E, call.dtype);
    to_panels(space.v_panels, space.keys.v, count, words<PAIRS>(call.E));
}

inline void write_keys(const Backward& call, int64_t batch, int64_t group, int64_t first, int64_t count,
                       const Sums& sums) {
    for (int64_t i = 0; i < count; ++i) {
        write_row(row_of(call.dk, call.dtype, batch, group, first + i), sums.dk + i * sums.dk_stride, 1,
                  call.dtype, call.K);
        write_row(row_of(call.dv, call.dtype, batch, group, first + i), sums.dv + i * sums.dv_stride, 1,
                  call.dtype, call.E);
    }
}

inline void clear_keys(const Backward& call, int64_t pair, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
        fill_row(row_of(call.dk, call.dtype, pair / call.G, pair % call.G, row), 0, call.dtype, call.K);
        fill_row(row_of(call.dv, call.dtype, pair / call.G, pair % call.G, row), 0, call.dtype, call.E);
    }
}

// The own keys of the tile's branches and of those on their paths, and, with the last piece of a unit, their
// dk and dv.
template <bool PAIRS>
void differentiate_own(const Backward& call, BackwardSpace& space, const Unit& unit, const Piece& piece,
                       int64_t pair, const Sums& sums) {
    Tile& tile = space.tile;
    const Layout& layout = call.layout;
    int r0 = 0, r1;
    int64_t root = 0;  // its first row
    for (int64_t c = unit.branch; c < unit.branch_end; ++c) {
        const Branch& branch = branch_of(layout, tile.batch, c);
        const Node node = node_of(layout, tile.batch, c);
        const int64_t first = layout.L + branch.start, live = first + branch.length;
        if (node.parent < 0) root = branch.start;
        find_rows(tile, branch, node, r0, r1);
        const int end = r0 < r1 ? own_keys_end(tile, branch, node, r1) : 0;
        const Sums own = call.own_sums ? sums.at(branch.start - root) : returned_sums(call, pair, first);
        if (piece.begin == unit.begin) clear(own, branch.length, call.K, call.E);
        for (int key = 0; key < end; key += KEYS) {
            const int count = end - key < KEYS ? end - key : KEYS;
            bound_by_own(tile, r0, r1, node.depth + key, count, call.options.window);
            if (end_of(tile, r0, r1) == 0) continue;
            read_all<PAIRS>(call, space, first + key, count);
            differentiate<PAIRS>(space, r0, r1, call.K, call.E, nullptr, call.options, own.at(key));
        }
        if (piece.end == unit.end) {
            if (call.own_sums) write_keys(call, tile.batch, tile.group, first, branch.length, own);
            clear_keys(call, pair, live, layout.L + end_of_rows(layout, tile.batch, c));
        }
    }
}

template <bool PAIRS>
void differentiate_tile(const Backward& call, BackwardSpace& space, const Sums& text) {
    Tile& tile = space.tile;
    const Layout& layout = call.layout;
    const Seen seen = text_of(tile, layout, call.options.window);
    for (int begin = seen.first, count; begin < seen.end; begin += count) {
        count = block_end(layout, tile.batch, begin, seen.end) - begin;
        read_all<PAIRS>(call, space, begin, count);
        const int32_t* const position =
            read_positions(space.keys, layout, tile.batch, call.options.window, begin, count);
        bound_by_text(tile, begin, count);
        differentiate<PAIRS>(space, 0, tile.rows, call.K, call.E, position, call.options, text.at(begin));
    }
    for (int r = 0; r < tile.rows; ++r)
        write_row(row_of(call.dq, call.dtype, tile.batch, tile.query_head[r], tile.query_row[r]),
                  space.dq + r * STRIDE, 1, call.dtype, call.K);
}

// A part of the units of a head.
template <bool PAIRS>
void backward_of(const Backward& call, int64_t item, char* workspace) {
    BackwardSpace& space = *(BackwardSpace*)workspace;
    Tile& tile = space.tile;
    const Layout& layout = call.layout;
    const int64_t pairs = layout.B * call.G, pair = item % pairs, part = item / pairs,
                  heads = call.H / call.G;
    tile.batch = pair / call.G;
    tile.group = pair % call.G;
    const Sums own = sums_of(call, pair, part), text = text_sums_of(call, pair, part);
    clear(text, layout.L, call.K, call.E);
    double* const dsinks = call.dsinks ? call.dsinks + (pair * call.parts + part) * heads : nullptr;
    for (int64_t h = 0; dsinks && h < heads; ++h) dsinks[h] = 0;
    for (int64_t i = call.first_unit[tile.batch] + part; i < call.first_unit[tile.batch + 1];
         i += call.parts) {
        const Unit& unit = call.units[i];
        for (int64_t begin = unit.begin; begin < unit.end; begin += call.tile) {
            const int64_t end = begin + call.tile < unit.end ? begin + call.tile : unit.end;
            const Piece piece = {unit.batch, begin, end, unit.text};
            read_tile<PAIRS>(call, space, piece, dsinks);
            if (!unit.text) differentiate_own<PAIRS>(call, space, unit, piece, pair, own);
            differentiate_tile<PAIRS>(call, space, text);
        }
        if (!unit.text && unit.branch == unit.branch_end)  // rows of no branch
            clear_keys(call, pair, layout.L + unit.begin / heads, layout.L + unit.end / heads);
    }
}

inline void backward(const Backward& call, int64_t item, char* workspace) {
    (in_pairs(call.dtype) ? backward_of<true> : backward_of<false>)(call, item, workspace);
}

// Adds up the parts of a head's text, always in the same order.
inline void finish(const Backward& call, int64_t pair) {
    if (call.in_place) return;
    const Layout& layout = call.layout;
    const int wide_k = round_up(call.K, WIDTH), wide_e = round_up(call.E, WIDTH);
    const Sums all = text_sums_of(call, pair, 0);
    for (int64_t part = 1; part < call.parts; ++part) {
        const Sums more = text_sums_of(call, pair, part);
        for (int64_t i = 0; i < layout.L; ++i) {
            const Sums to = all.at(i), from = more.at(i);
            for (int c = 0; c < wide_k; c += LANES) store(to.dk + c, load(to.dk + c) + load(from.dk + c));
            for (int c = 0; c < wide_e; c += LANES) store(to.dv + c, load(to.dv + c) + load(from.dv + c));
        }
    }
    write_keys(call, pair / call.G, pair % call.G, 0, layout.L, all);
}

}  // namespace QUIETSTAR_SET
}  // namespace quietstar
