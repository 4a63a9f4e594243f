// sample_token: adds a chunk of the vocabulary to the race of each row and to the sum for its
// log-probability.
#pragma once

#include <cstdint>

namespace quietstar {

// Letters as in the Python package.
struct SampleTokenArguments {
    const void* logits;    // fp32 [R,columns], products of the head; -inf for a banned id
    const void* bias;      // fp32 [columns], or null
    const void* counters;  // int32 [R,4]
    void* state;           // fp32 [R,4], the result of the earlier chunks
    void* ids;             // int64 [R], written after each chunk; final after the last; -1: LSE not finite
    void* logprob;         // fp32 [R], the same
    int64_t logits_stride,
        counters_stride[2];  // in elements; logits_stride is a multiple of 4, logits and bias of 16 bytes
    int R, columns;
    int first;          // the id of the first column, a multiple of 128; 0 starts the race
    const void* seed;   // int64
    float scale;        // above 0
    float softcap;      // 0: none
    float temperature;  // 0: the lowest-index argmax
};

// Throws std::runtime_error if CUDA can't launch.
void sample_token(const SampleTokenArguments& arguments, void* stream);

}  // namespace quietstar
