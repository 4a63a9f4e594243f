// Launches thought_decode, and merges the parts of a text.
#include <stdexcept>

#include "thought_decode_softmax.cuh"

namespace quietstar {

// A warp takes one row and adds its parts in order, weighted by their sums of weights.
template <class T>
__global__ void __launch_bounds__(128) merge(ThoughtDecodeArguments a) {
    const int64_t rows = static_cast<int64_t>(a.B) * a.H * a.C;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / WARP;
    if (row >= rows) return;
    const float* parts = static_cast<const float*>(a.parts);
    const float* log_total = parts + a.splits * rows * a.K + row;
    float top = LOWEST_SUBTRACTED;
    for (int split = 0; split < a.splits; ++split) top = fmaxf(top, log_total[split * rows]);
    for (int k = threadIdx.x % WARP * 2; k < a.K; k += 2 * WARP) {
        float total = 0, left = 0, right = 0;
#pragma unroll 4
        for (int split = 0; split < a.splits; ++split) {
            const float weight = fast_exp2(log_total[split * rows] - top);
            const float2 part = *reinterpret_cast<const float2*>(parts + (split * rows + row) * a.K + k);
            total += weight;
            left += weight * part.x;
            right += weight * part.y;
        }
        const float scale = total == 0 ? 0 : 1 / total;
        static_cast<uint32_t*>(a.out)[(row * a.K + k) / 2] = pack<T>(left * scale, right * scale);
    }
}

template <class T>
void decode_and_merge(const ThoughtDecodeArguments& a, void* stream) {
    switch (a.K) {
        case 64:
            launch_decode<T, 64>(a, stream);
            break;
        case 128:
            launch_decode<T, 128>(a, stream);
            break;
        case 256:
            launch_decode<T, 256>(a, stream);
            break;
        default:
            throw std::runtime_error("thought_decode: the head width must be 64, 128 or 256");
    }
    if (a.splits == 1) return;
    const int64_t rows = static_cast<int64_t>(a.B) * a.H * a.C;
    launch(merge<T>, dim3((rows + 3) / 4), 128, 0, stream, a);
}

void thought_decode(const ThoughtDecodeArguments& a, Float16 dtype, void* stream) {
    dtype == Float16::BF16 ? decode_and_merge<bf16>(a, stream) : decode_and_merge<half>(a, stream);
}

}  // namespace quietstar
