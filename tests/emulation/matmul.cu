// A warp computes 16 rows and 64 columns; steps of 16 along K are copied in two stages.
#include "common.cuh"
#include "matmul.cuh"

namespace quietstar {

constexpr int WARPS = 2, ROWS = 16 * WARPS, COLUMNS = 64;
constexpr int A_BYTES = ROWS * 16 * 2, STAGE_BYTES = A_BYTES + 16 * COLUMNS * 2;

// Rows of a and columns of b at step `step`, zeros after their ends.
__device__ void load(Shared to, const MatmulArguments& x, int first_row, int first_column, int step) {
    const auto* a = static_cast<const uint16_t*>(x.a) + 16 * step;
    const auto* b = static_cast<const uint16_t*>(x.b) + 16 * step * x.N;
    for (int i = threadIdx.x; i < ROWS * 2; i += WARPS * WARP) {
        const int row = first_row + i / 2;
        cp_async(to + 16 * i, a + row * x.K + i % 2 * 8, row < x.M);
    }
    for (int i = threadIdx.x; i < 16 * COLUMNS / 8; i += WARPS * WARP) {
        const int column = first_column + i % 8 * 8;
        cp_async(to + A_BYTES + 16 * i, b + i / 8 * x.N + column, column < x.N);
    }
    cp_async_commit();
}

template <class T>
__global__ void kernel(MatmulArguments x) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first_row = blockIdx.y * ROWS, first_column = blockIdx.x * COLUMNS, steps = x.K / 16;
    const Shared memory = shared_address(dynamic_shared());
    float sums[8][4] = {};
    load(memory, x, first_row, first_column, 0);
    for (int step = 0; step < steps; ++step) {
        const Shared tile = memory + step % 2 * STAGE_BYTES;
        if (step + 1 < steps) {
            load(memory + (step + 1) % 2 * STAGE_BYTES, x, first_row, first_column, step + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        block_sync();
        uint32_t a[4], b[4];
        ldmatrix4<false>(a, tile + (warp * 16 + lane % 16) * 32 + lane / 16 * 16);
        for (int n = 0; n < 8; n += 2) {
            ldmatrix4<true>(b, tile + A_BYTES + lane % 16 * (2 * COLUMNS) + n * 16 + lane / 16 * 16);
            mma<T>(sums[n], a, {b[0], b[1]});
            mma<T>(sums[n + 1], a, {b[2], b[3]});
        }
        block_sync();
    }
    for (int n = 0; n < 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int row = first_row + warp * 16 + lane / 4 + i / 2 * 8;
            const int column = first_column + n * 8 + lane % 4 * 2 + i % 2;
            if (row < x.M && column < x.N) static_cast<float*>(x.c)[row * x.N + column] = sums[n][i];
        }
    }
}

void matmul(const MatmulArguments& x, void* stream) {
    const dim3 grid((x.N + COLUMNS - 1) / COLUMNS, (x.M + ROWS - 1) / ROWS);
    launch(x.is_bf16 ? kernel<bf16> : kernel<half>, grid, WARPS * WARP, 2 * STAGE_BYTES, stream, x);
}

}  // namespace quietstar
