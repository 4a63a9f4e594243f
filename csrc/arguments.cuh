// The private functions that Python calls, for any kind of tensor: PyTorch's in csrc/bindings.cpp, those of
// the tests in tests/emulation/bindings.cpp.
//
// Python has checked shapes, dtypes and devices, has allocated the outputs, and has set the device: this only
// passes them on. `From` defines a tensor: the types `Tensor` and `MaybeTensor`, with size(i) and stride(i);
// `read` and `write`, which give a pointer to its numbers (null if there is no tensor); is_bf16 and stream.
#pragma once

#include "sample_token.cuh"
#include "thought_decode.cuh"

namespace quietstar {

template <class Tensor, int COUNT>
void strides(int64_t (&to)[COUNT], const Tensor& from) {
    for (int i = 0; i < COUNT; ++i) to[i] = from.stride(i);
}

template <class From, class Tensor = typename From::Tensor, class MaybeTensor = typename From::MaybeTensor>
void call_thought_decode(const Tensor& q, const Tensor& k_text, const Tensor& v_text, const Tensor& k_own,
                         const Tensor& v_own, const Tensor& lo, const Tensor& table, const MaybeTensor& tree,
                         const Tensor& step, const MaybeTensor& sinks, const Tensor& out,
                         const MaybeTensor& parts, double scale, int64_t window, double softcap,
                         int64_t tile_rows, int64_t splits) {
    ThoughtDecodeArguments arguments{};
    arguments.q = From::read(q);
    arguments.k_text = From::read(k_text);
    arguments.v_text = From::read(v_text);
    arguments.k_own = From::read(k_own);
    arguments.v_own = From::read(v_own);
    arguments.lo = From::read(lo);
    arguments.table = From::read(table);
    arguments.tree = From::read(tree);
    arguments.step = From::read(step);
    arguments.sinks = From::read(sinks);
    arguments.out = From::write(out);
    arguments.parts = From::write(parts);
    strides(arguments.q_stride, q);
    strides(arguments.k_text_stride, k_text);
    strides(arguments.v_text_stride, v_text);
    strides(arguments.k_own_stride, k_own);
    strides(arguments.v_own_stride, v_own);
    arguments.B = q.size(0);
    arguments.H = q.size(1);
    arguments.G = k_text.size(1);
    arguments.L = k_text.size(2);
    arguments.C = q.size(2);
    arguments.K = q.size(3);
    arguments.scale = scale;
    arguments.window = window;
    arguments.softcap = softcap;
    arguments.tile_rows = tile_rows;
    arguments.splits = splits;
    thought_decode(arguments, From::is_bf16(q) ? Float16::BF16 : Float16::HALF, From::stream(q));
}

template <class From, class Tensor = typename From::Tensor, class MaybeTensor = typename From::MaybeTensor>
void call_sample_token(const Tensor& logits, const MaybeTensor& bias, const Tensor& counters,
                       const Tensor& state, const Tensor& ids, const Tensor& logprob, const Tensor& seed,
                       int64_t first, double scale, double softcap, double temperature) {
    SampleTokenArguments arguments{};
    arguments.logits = From::read(logits);
    arguments.bias = From::read(bias);
    arguments.counters = From::read(counters);
    arguments.state = From::write(state);
    arguments.ids = From::write(ids);
    arguments.logprob = From::write(logprob);
    arguments.logits_stride = logits.stride(0);
    strides(arguments.counters_stride, counters);
    arguments.R = logits.size(0);
    arguments.columns = logits.size(1);
    arguments.first = first;
    arguments.seed = From::read(seed);
    arguments.scale = scale;
    arguments.softcap = softcap;
    arguments.temperature = temperature;
    sample_token(arguments, From::stream(logits));
}

}  // namespace quietstar
