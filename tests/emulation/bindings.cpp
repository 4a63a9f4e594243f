// The private functions of csrc/bindings.cpp over the emulation, with tensors on the CPU.
#include <pybind11/pybind11.h>

#include "arguments.cuh"

namespace {

// A PyTorch tensor or None, accessed through Python, so that PyTorch isn't linked.
class PythonTensor : public pybind11::object {
  public:
    PYBIND11_OBJECT_DEFAULT(PythonTensor, object, PyObject_Type)

    int64_t size(int i) const { return attr("size")(i).cast<int64_t>(); }
    int64_t stride(int i) const { return attr("stride")(i).cast<int64_t>(); }
};

struct Python {
    using Tensor = PythonTensor;
    using MaybeTensor = PythonTensor;

    static void* write(const Tensor& x) {
        return x.is_none() ? nullptr : reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
    }
    static const void* read(const Tensor& x) { return write(x); }
    static bool is_bf16(const Tensor& x) {
        return pybind11::str(x.attr("dtype")).cast<std::string>() == "torch.bfloat16";
    }
    static void* stream(const Tensor&) { return nullptr; }
};

}  // namespace

PYBIND11_MODULE(emulated, module) {
    module.def("_thought_decode_cuda", &quietstar::call_thought_decode<Python>);
    module.def("_sample_token_cuda", &quietstar::call_sample_token<Python>);
}
