// c [M,N] = a [M,K] b [K,N], contiguous, with any M, N a multiple of 8 and K one of 16. It tests the
// emulation.
#pragma once

namespace quietstar {

struct MatmulArguments {
    const void *a, *b;
    void* c;  // fp32
    int M, N, K;
    bool is_bf16;
};

void matmul(const MatmulArguments& arguments, void* stream);

}  // namespace quietstar
