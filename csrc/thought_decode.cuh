// thought_decode: one new row of every thought over the text and the thought's own rows up to it.
#pragma once

#include <cstdint>

namespace quietstar {

// Letters as in the Python package. Rows of 16-bit numbers have a last stride of 1 and start at multiples of
// 16 bytes.
struct ThoughtDecodeArguments {
    const void* q;       // [B,H,C,K]
    const void* k_text;  // [B,G,L,K]
    const void* v_text;
    const void* k_own;  // [B,G,C,S,K]
    const void* v_own;
    const void* lo;     // int32 [B,L]; this, the table and the tree are contiguous
    const void* table;  // int32 [B,C,3]: a thought's anchor, -1 if unused; its first row; its live rows
    const void* tree;   // int32 [B,C,4] as in quietstar_kernels/branches.py, or null: no thought has a parent
    const void* step;   // int32, one
    const void* sinks;  // fp32 [H], or null
    void* out;          // [B,H,C,K], contiguous
    void* parts;        // fp32, splits * B*H*C * (K + 1) numbers; not used if splits is 1
    int64_t q_stride[3], k_text_stride[3], v_text_stride[3], k_own_stride[4], v_own_stride[4];  // in elements
    int B, H, G, L, C, K;
    float scale;
    int window;     // 0: none
    float softcap;  // 0: none
    int tile_rows;  // query rows of a block of threads: 32, 64 or 128
    int splits;     // blocks of threads that share the text of a tile
};

enum class Float16 : int { BF16 = 0, HALF = 1 };

// Throws std::runtime_error for a head width or tile without a kernel, and if CUDA can't launch.
void thought_decode(const ThoughtDecodeArguments& arguments, Float16 dtype, void* stream);

// Writes `out`, or `parts` if there are several. Each head width has a file, thought_decode_<K>.cu, so that
// they compile in parallel.
template <class T, int K>
void launch_decode(const ThoughtDecodeArguments& arguments, void* stream);

}  // namespace quietstar
