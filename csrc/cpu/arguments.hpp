// What the kernels are called with, in plain C++: no types of PyTorch.
#pragma once
#include <stdint.h>

namespace quietstar {

// Query rows of a tile, at most.
constexpr int TILE = 224;           // 16 blocks with AVX-512
constexpr int BACKWARD_TILE = 112;  // q and grad_out are read again for each block of keys, from the L1 cache

// Numbers of an item of multiply-adds: whole chains of every instruction set.
constexpr int PEAK_NUMBERS = 768;

enum class Dtype : int32_t { FLOAT, BFLOAT16, HALF };

// A tensor [B,heads,rows,width] whose last stride is 1; the own cache of a decode is
// [B,heads,C,S,width].
struct Rows {
    char* data;
    int64_t batch, head, row;  // strides in elements
    int64_t own = 0;           // stride of S in a decode's own cache
};

struct Branch {
    int32_t anchor, start, length;
};

// Of a branch in a tree, a node.
struct Node {
    int32_t depth;  // rows on its path before its first
    int32_t end;    // the row after the last of its subtree
    int32_t leaf;
    int32_t parent;  // -1: none
};

// Which rows see which: contiguous int32 tensors, as in quietstar_kernels/branches.py.
struct Layout {
    const int32_t* lo;      // [B,L]
    const Branch* table;    // [B,C]
    const int32_t* of_row;  // [B,R], the branch of a row, -1 where it is off; null in a decode
    int64_t B, L, C, R;
    bool full;
    const Node* tree;  // [B,C], or null: no branch hangs on another
};

// Static, as no instruction set may share these with another.
static inline const Branch& branch_of(const Layout& layout, int64_t b, int64_t c) {
    return layout.table[b * layout.C + c];
}

static inline Node node_of(const Layout& layout, int64_t b, int64_t c) {
    if (layout.tree) return layout.tree[b * layout.C + c];
    const Branch& branch = branch_of(layout, b, c);
    return {0, branch.start + branch.length, 1, -1};
}

// The first of the branches on the path of branch c.
static inline int64_t root_of(const Layout& layout, int64_t b, int64_t c) {
    for (int64_t up = c; up >= 0; up = node_of(layout, b, c).parent) c = up;
    return c;
}

// The branch after those on whose path branch c is, a root.
static inline int64_t after_tree(const Layout& layout, int64_t b, int64_t c) {
    for (++c; c < layout.C && node_of(layout, b, c).parent >= 0;) ++c;
    return c;
}

// The row after those of a branch, some of which may be off.
static inline int64_t end_of_rows(const Layout& layout, int64_t b, int64_t c) {
    const Branch& branch = branch_of(layout, b, c);
    return c + 1 < layout.C ? branch_of(layout, b, c + 1).start : branch.start + branch.length;
}

// Query rows of whole branches, or of text, and of a key head: begin..end of i*H/G + h.
struct Unit {
    int64_t batch, begin, end;
    int64_t branch, branch_end;
    bool text;
};

// A tile of a unit.
struct Piece {
    int64_t batch, begin, end;
    bool text;
};

struct Options {
    float scale;
    int64_t window;      // 0: none
    float softcap;       // 0: none
    const float* sinks;  // [H], or null
};

struct Forward {
    Rows q, k, v, out;  // q and out start with `text_rows` rows of the text, k and v with all L
    Rows k_own, v_own;  // only in a decode, where k and v hold the text alone
    float* lse;         // [B,H,rows] contiguous; null in a decode
    Layout layout;
    Options options;
    int64_t H, G, K, E, text_rows;
    int64_t step;  // of a decode; -1 otherwise
    Dtype dtype;
};

struct Backward {
    Rows grad_out, q, k, v, out, dq, dk, dv;
    const float* lse;       // [B,H,rows] contiguous
    const float* grad_lse;  // the same, or null
    float* sums;     // [B,G,parts,own_sums + L,K' + E'], without L if `in_place`; K', E' are multiples of 16
    double* dsinks;  // [B,G,parts,H/G], or null
    Layout layout;
    Options options;
    int64_t H, G, K, E, text_rows, parts;
    int64_t
        own_sums;   // rows of the longest branch or tree; 0: own dk and dv are summed where they are returned
    bool in_place;  // one part: so are the text's
    Dtype dtype;
    const Unit* units = nullptr;  // those of batch row b are first_unit[b]..first_unit[b + 1]
    const int64_t* first_unit = nullptr;
    int64_t tile = 0;
};

// Rows of logits, before bias, scale, soft cap and temperature.
struct Sample {
    const float* logits;      // [R,V]
    const float* bias;        // [V], or null
    const int32_t* counters;  // [R,4]
    const int64_t* banned;
    int64_t* ids;
    float* logprob;
    int64_t logits_stride, counters_stride, R, V, bans;
    uint64_t seed;
    float scale, softcap, temperature;  // softcap 0: none
};

// Rows of numbers that lie side by side; without data, none.
struct Matrix {
    char* data = nullptr;
    int64_t stride = 0;
    Dtype dtype = Dtype::FLOAT;
};

// Floats of a row in a workspace: whole vectors, and one more.
static inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// Of [rows,D]. x becomes the total where there is no delta.
struct Norm {
    Matrix x, delta, weight, total, out;
    float* rstd;
    int64_t rows, D;
    float eps, offset;
};

struct NormBackward {
    Matrix grad_out, grad_total, total, weight, dx, ddelta, dweight;
    const float* rstd;
    int64_t rows, D;
    float offset;
};

// Queries, keys and values [B,heads,n,K] from one place to another: turned, or with `back` turned back, which
// are the gradients. Without data in `to`, none.
struct Rotary {
    Rows from[3], to[3];  // to a cache's row `step`
    Rows x[3];            // what the forward normed; only with `back`
    Rows cos, sin;        // [B,1,n,K]
    Matrix weight[2], dweight[2];
    int64_t B, n, H, G, K, step;
    float eps, offset;
    Dtype dtype, cos_dtype, sin_dtype;
    bool back;
};

// Of [rows,I]. With a `grad`, `out` is the gradient of the gate.
struct Gated {
    Matrix gate, up, grad, out, dup;
    int64_t rows, I;
    bool gelu;
};

struct MultiplyAdds {
    float* numbers;  // [items,PEAK_NUMBERS]
    int64_t items, rounds;
};

struct Copy {
    char* to;
    const char* from;
    int64_t bytes;
};

// Items of a call are independent, except that `Backward::finish` sums what the parts of a head have left.
struct Kernels {
    const char* name;
    void (*forward)(const Forward&, const Piece&, int64_t group, char* workspace);
    void (*backward)(const Backward&, int64_t item, char* workspace);  // B*G*parts items
    void (*finish)(const Backward&, int64_t item);                     // B*G items
    void (*sample)(const Sample&, int64_t row);
    // Rows begin..end; `sums` of padded widths take what a share of the rows adds to the gradients of
    // weights.
    void (*norm)(const Norm&, int64_t begin, int64_t end, char* workspace);
    void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end, float* sums, char* workspace);
    void (*rotary)(const Rotary&, int64_t begin, int64_t end, float* sums, char* workspace);
    void (*gated)(const Gated&, int64_t begin, int64_t end);
    void (*add_up)(float* sums, int64_t shares, int64_t stride, const Matrix& to, int64_t width);
    void (*multiply_adds)(float* numbers, int64_t rounds);
    int64_t forward_bytes, backward_bytes;  // of a thread's workspace
};

}  // namespace quietstar
