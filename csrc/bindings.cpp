// The only file that depends on PyTorch, and only on its stable ABI: one library serves PyTorch 2.10 and all
// later versions.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "arguments.cuh"

// In libtorch_cuda.so. A PyTorch for CPUs doesn't have it: then the address is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace {

struct Torch {
    using Tensor = torch::stable::Tensor;
    using MaybeTensor = std::optional<Tensor>;

    static const void* read(const Tensor& x) { return x.const_data_ptr(); }
    static const void* read(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }
    static void* write(const Tensor& x) { return x.mutable_data_ptr(); }
    static void* write(const MaybeTensor& x) { return x ? x->mutable_data_ptr() : nullptr; }
    static bool is_bf16(const Tensor& x) {
        return x.scalar_type() == torch::headeronly::ScalarType::BFloat16;
    }

    // PyTorch's current stream on the device of x. A null pointer would mean the default stream instead.
    static void* stream(const Tensor& x) {
        if (!x.is_cuda()) throw std::runtime_error("no CUDA device: these tensors are not on one");
        if (aoti_torch_get_current_cuda_stream == nullptr)
            throw std::runtime_error("this PyTorch has no CUDA");
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
        return stream;
    }
};

}  // namespace

STABLE_TORCH_LIBRARY(quietstar_kernels, library) {
    library.def(
        "_thought_decode_cuda(Tensor q, Tensor k_text, Tensor v_text, Tensor k_own, Tensor v_own, "
        "Tensor lo, Tensor table, Tensor? tree, Tensor step, Tensor? sinks, Tensor(a!) out, "
        "Tensor(b!)? parts, float scale, int window, float softcap, int tile_rows, int splits) -> ()");
    library.def(
        "_sample_token_cuda(Tensor logits, Tensor? bias, Tensor counters, Tensor(a!) state, Tensor(b!) ids, "
        "Tensor(c!) logprob, Tensor seed, int first, float scale, float softcap, float temperature) -> ()");
}

// For every device, so that a call without a GPU gets as far as the stream, and fails there with a message.
// Tensors are passed from Python to here in the same way on all devices.
STABLE_TORCH_LIBRARY_IMPL(quietstar_kernels, CompositeExplicitAutograd, library) {
    library.impl("_thought_decode_cuda", TORCH_BOX(&quietstar::call_thought_decode<Torch>));
    library.impl("_sample_token_cuda", TORCH_BOX(&quietstar::call_sample_token<Torch>));
}

#define QUIETSTAR_PUBLIC extern "C" __attribute__((visibility("default")))

// quietstar_kernels/cuda/_library.py calls these through ctypes, also without a GPU.

// "13.0 sm_80 compute_80 ...": the version of the toolkit, then the architectures.
QUIETSTAR_PUBLIC const char* quietstar_built_for() {
    static const std::string text = std::to_string(CUDART_VERSION / 1000) + "." +
                                    std::to_string(CUDART_VERSION % 1000 / 10) + " " +
                                    QUIETSTAR_ARCHITECTURES;
    return text.c_str();
}

// Why CUDA can't run here, such as a driver older than the toolkit; null if it can.
QUIETSTAR_PUBLIC const char* quietstar_cuda_error() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
