// What the kernels are called with, in plain C++: no types of PyTorch.
#pragma once
#include <stdint.h>

namespace quietstar {

enum class Dtype : int32_t { FLOAT, BFLOAT16, HALF };

// A tensor [B,heads,rows,width] whose last stride is 1; the own cache of a decode is
// [B,heads,thoughts,S,width].
struct Rows {
    char* data;
    int64_t batch, head, row;  // strides in elements
    int64_t own = 0;           // stride of S in a decode's own cache
};

// Which rows see which: contiguous int32 tensors, as in ThoughtLayout.
struct Layout {
    const int32_t* anchor;  // [B,P]
    const int32_t* lo;      // [B,L]
    const int32_t* length;  // [B,P,N]
    int64_t B, L, P, N, S;
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
    const float* lse;  // [B,H,rows] contiguous
    float* sums;       // [B,G,parts,S + L,K' + E'], without L if `in_place`; K' and E' are multiples of 16
    double* dsinks;    // [B,G,parts,H/G], or null
    Layout layout;
    Options options;
    int64_t H, G, K, E, text_rows, parts;
    bool in_place;  // one part: the text's dk and dv are summed where they are returned
    Dtype dtype;
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

// Items of a call are independent, except that `Backward::finish` sums what the parts of a head have left.
struct Kernels {
    const char* name;
    int64_t (*forward_items)(const Forward&);
    void (*forward)(const Forward&, int64_t item, char* workspace);
    void (*backward)(const Backward&, int64_t item, char* workspace);  // B*G*parts items
    void (*finish)(const Backward&, int64_t item);                     // B*G items
    void (*sample)(const Sample&, int64_t row);
    int64_t forward_bytes, backward_bytes;  // of a thread's workspace
};

}  // namespace quietstar
