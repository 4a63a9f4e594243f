// The only file that depends on PyTorch, and only on its stable ABI: one library serves PyTorch 2.10 and all
// later versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "run.hpp"

namespace quietstar {
namespace {

using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
    using torch::headeronly::ScalarType;
    return x.scalar_type() == ScalarType::Float  ? Dtype::FLOAT
           : x.scalar_type() == ScalarType::Half ? Dtype::HALF
                                                 : Dtype::BFLOAT16;
}

Rows rows(const Tensor& x, const void* data) {
    return {(char*)data, x.stride(0), x.stride(1), x.stride(2), x.dim() == 5 ? x.stride(3) : 0};
}

Rows read(const Tensor& x) { return rows(x, x.const_data_ptr()); }
Rows write(const Tensor& x) { return rows(x, x.mutable_data_ptr()); }

Layout layout_of(const Tensor& lo, const Tensor& table, const std::optional<Tensor>& tree) {
    Layout layout{};
    layout.tree = tree ? (const Node*)tree->const_data_ptr() : nullptr;
    layout.lo = (const int32_t*)lo.const_data_ptr();
    layout.table = (const Branch*)table.const_data_ptr();
    layout.B = lo.size(0), layout.L = lo.size(1), layout.C = table.size(1);
    return layout;
}

Layout layout_of(const Tensor& lo, const Tensor& table, const Tensor& of_row,
                 const std::optional<Tensor>& tree, bool full) {
    Layout layout = layout_of(lo, table, tree);
    layout.of_row = (const int32_t*)of_row.const_data_ptr();
    layout.R = of_row.size(1);
    layout.full = full;
    return layout;
}

Options options_of(double scale, int64_t window, double softcap, const std::optional<Tensor>& sinks) {
    return {(float)scale, window, (float)softcap, sinks ? (const float*)sinks->const_data_ptr() : nullptr};
}

// PyTorch's threads, as many as it is set to use.
struct Parallel {
    static int64_t threads() { return torch::stable::get_num_threads(); }

    template <class Work>
    void operator()(int64_t count, const Work& work) const {
        torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { work(); });
    }
};

void thought_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor lo, const Tensor table,
                       const Tensor of_row, const std::optional<Tensor> tree,
                       const std::optional<Tensor> sinks, Tensor out, Tensor lse, bool full, double scale,
                       int64_t window, double softcap) {
    Forward call{};
    call.q = read(q), call.k = read(k), call.v = read(v), call.out = write(out);
    call.lse = (float*)lse.mutable_data_ptr();
    call.layout = layout_of(lo, table, of_row, tree, full);
    call.options = options_of(scale, window, softcap, sinks);
    call.H = q.size(1), call.G = k.size(1), call.K = q.size(3), call.E = v.size(3);
    call.text_rows = q.size(2) - call.layout.R;
    call.step = -1;
    call.dtype = dtype_of(q);
    run(Parallel(), call);
}

void thought_attention_backward(const Tensor grad_out, const Tensor q, const Tensor k, const Tensor v,
                                const Tensor out, const Tensor lse, const Tensor lo, const Tensor table,
                                const Tensor of_row, const std::optional<Tensor> tree,
                                const std::optional<Tensor> sinks, Tensor dq, Tensor dk, Tensor dv,
                                Tensor sums, std::optional<Tensor> dsinks,
                                const std::optional<Tensor> grad_lse, bool full, int64_t parts,
                                int64_t own_sums, double scale, int64_t window, double softcap) {
    Backward call{};
    call.grad_out = read(grad_out), call.q = read(q), call.k = read(k), call.v = read(v),
    call.out = read(out);
    call.dq = write(dq), call.dk = write(dk), call.dv = write(dv);
    call.lse = (const float*)lse.const_data_ptr();
    call.grad_lse = grad_lse ? (const float*)grad_lse->const_data_ptr() : nullptr;
    call.sums = (float*)sums.mutable_data_ptr();
    call.dsinks = dsinks ? (double*)dsinks->mutable_data_ptr() : nullptr;
    call.layout = layout_of(lo, table, of_row, tree, full);
    call.options = options_of(scale, window, softcap, sinks);
    call.H = q.size(1), call.G = k.size(1), call.K = q.size(3), call.E = v.size(3);
    call.text_rows = q.size(2) - call.layout.R;
    call.parts = parts;
    call.own_sums = own_sums;
    call.in_place = sums.size(3) == own_sums;
    call.dtype = dtype_of(q);
    run(Parallel(), call);
}

void thought_decode(const Tensor q, const Tensor k_text, const Tensor v_text, const Tensor k_own,
                    const Tensor v_own, const Tensor lo, const Tensor table, const std::optional<Tensor> tree,
                    const std::optional<Tensor> sinks, Tensor out, int64_t step, double scale, int64_t window,
                    double softcap) {
    Forward call{};
    call.q = read(q), call.k = read(k_text), call.v = read(v_text), call.out = write(out);
    call.k_own = read(k_own), call.v_own = read(v_own);
    call.layout = layout_of(lo, table, tree);
    call.options = options_of(scale, window, softcap, sinks);
    call.H = q.size(1), call.G = k_text.size(1), call.K = q.size(3), call.E = v_text.size(3);
    call.step = step;
    call.dtype = dtype_of(q);
    run(Parallel(), call);
}

void sample_token(const Tensor logits, const std::optional<Tensor> bias, const Tensor counters,
                  const std::optional<Tensor> banned, const Tensor seed, Tensor ids, Tensor logprob,
                  double scale, double softcap, double temperature) {
    Sample call{};
    call.logits = (const float*)logits.const_data_ptr();
    call.bias = bias ? (const float*)bias->const_data_ptr() : nullptr;
    call.counters = (const int32_t*)counters.const_data_ptr();
    call.banned = banned ? (const int64_t*)banned->const_data_ptr() : nullptr;
    call.bans = banned ? banned->size(0) : 0;
    call.ids = (int64_t*)ids.mutable_data_ptr();
    call.logprob = (float*)logprob.mutable_data_ptr();
    call.logits_stride = logits.stride(0), call.counters_stride = counters.stride(0);
    call.R = logits.size(0), call.V = logits.size(1);
    call.seed = *(const uint64_t*)seed.const_data_ptr();
    call.scale = (float)scale, call.softcap = (float)softcap, call.temperature = (float)temperature;
    run(Parallel(), call);
}

using Maybe = std::optional<Tensor>;

// Rows of the last dimension, evenly spaced.
Matrix matrix(const Tensor& x, const void* data) {
    int64_t d = x.dim() - 1;
    const int64_t width = x.size(d);
    while (d > 0 && x.size(d - 1) == 1) --d;
    return {(char*)data, d > 0 ? x.stride(d - 1) : width, dtype_of(x)};
}

Matrix source(const Tensor& x) { return matrix(x, x.const_data_ptr()); }
Matrix source(const Maybe& x) { return x ? source(*x) : Matrix{}; }
Matrix target(const Tensor& x) { return matrix(x, x.mutable_data_ptr()); }
Matrix target(const Maybe& x) { return x ? target(*x) : Matrix{}; }

int64_t rows_of(const Tensor& x, int64_t width) { return width ? x.numel() / width : 0; }

void rms_norm(const Tensor x, const Maybe delta, const Tensor weight, Maybe total, Tensor out, Tensor rstd,
              double eps, double offset) {
    const int64_t D = weight.size(0);
    run(Parallel(), Norm{source(x), source(delta), source(weight), target(total), target(out),
                         (float*)rstd.mutable_data_ptr(), rows_of(x, D), D, (float)eps, (float)offset});
}

void rms_norm_backward(const Tensor grad_out, const Maybe grad_total, const Tensor total, const Tensor rstd,
                       const Tensor weight, Tensor dx, Maybe ddelta, Maybe dweight, double offset) {
    const int64_t D = weight.size(0);
    run(Parallel(), NormBackward{source(grad_out), source(grad_total), source(total), source(weight),
                                 target(dx), target(ddelta), target(dweight),
                                 (const float*)rstd.const_data_ptr(), rows_of(total, D), D, (float)offset});
}

// Queries, keys and values [B,heads,n,K]: all in qkv [B,n,heads*K], or apart.
void put_heads(Rows (&heads)[3], const Tensor& qkv, const Maybe& k, const Maybe& v, const Rotary& call) {
    const Tensor* const of[] = {&qkv, k ? &*k : &qkv, v ? &*v : &qkv};
    const int64_t first[] = {0, k ? 0 : call.H, v ? 0 : call.H + call.G};
    for (int i = 0; i < 3; ++i)
        heads[i] = {(char*)of[i]->const_data_ptr() + first[i] * call.K * (int64_t)qkv.element_size(),
                    of[i]->stride(0), call.K, of[i]->stride(1)};
}

Rotary rotary_of(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                 const Maybe& q_weight, const Maybe& k_weight, double eps, double offset) {
    Rotary call{};
    call.cos = {(char*)cos.const_data_ptr(), cos.size(0) == 1 ? 0 : cos.stride(0), 0, cos.stride(1)};
    call.sin = {(char*)sin.const_data_ptr(), sin.size(0) == 1 ? 0 : sin.stride(0), 0, sin.stride(1)};
    call.weight[0] = source(q_weight), call.weight[1] = source(k_weight);
    call.B = q.size(0), call.n = cos.size(1), call.H = q.size(1), call.G = k.size(1), call.K = cos.size(2);
    call.eps = (float)eps, call.offset = (float)offset;
    call.dtype = dtype_of(q), call.cos_dtype = dtype_of(cos), call.sin_dtype = dtype_of(sin);
    return call;
}

// v_out is null where v stays where it is; k_out and v_out may be caches.
void rotary(const Tensor qkv, const Maybe k, const Maybe v, const Tensor cos, const Tensor sin,
            const Maybe q_weight, const Maybe k_weight, Tensor q_out, Tensor k_out, Maybe v_out, int64_t step,
            double eps, double offset) {
    Rotary call = rotary_of(q_out, k_out, cos, sin, q_weight, k_weight, eps, offset);
    put_heads(call.from, qkv, k, v, call);
    call.to[0] = write(q_out), call.to[1] = write(k_out), call.to[2] = v_out ? write(*v_out) : Rows{};
    call.step = step;
    run(Parallel(), call);
}

void rotary_backward(const Tensor grad_q, const Tensor grad_k, const Maybe grad_v, const Tensor cos,
                     const Tensor sin, const Maybe qkv, const Maybe k, const Maybe q_weight,
                     const Maybe k_weight, Tensor dqkv, Maybe dk, Maybe dq_weight, Maybe dk_weight,
                     double eps, double offset) {
    Rotary call = rotary_of(grad_q, grad_k, cos, sin, q_weight, k_weight, eps, offset);
    call.from[0] = read(grad_q), call.from[1] = read(grad_k);
    call.from[2] = grad_v ? read(*grad_v) : Rows{};
    put_heads(call.to, dqkv, dk, {}, call);
    if (!grad_v) call.to[2] = {};
    if (qkv) put_heads(call.x, *qkv, k, {}, call);
    call.dweight[0] = target(dq_weight), call.dweight[1] = target(dk_weight);
    call.back = true;
    run(Parallel(), call);
}

// With a `grad` the gradients. Both halves of a row are in one tensor where there is no second.
void gated_activation(const Tensor gate, const Maybe up, const Maybe grad, Tensor out, Maybe dup, bool gelu) {
    const int64_t width = gate.size(gate.dim() - 1), I = up ? width : width / 2;
    const auto second = [&](const Matrix& both) {
        return Matrix{both.data + I * (int64_t)gate.element_size(), both.stride, both.dtype};
    };
    Gated call{source(gate),         source(up), source(grad), target(out), target(dup),
               rows_of(gate, width), I,          gelu};
    if (!up) call.up = second(call.gate);
    if (!up && grad) call.dup = second(call.out);
    run(Parallel(), call);
}

void multiply_adds(Tensor numbers, int64_t rounds) {
    run(Parallel(), MultiplyAdds{(float*)numbers.mutable_data_ptr(), numbers.size(0), rounds});
}

void copy(Tensor to, const Tensor from) {
    const int64_t bytes = to.numel() * (int64_t)to.element_size();
    run(Parallel(), Copy{(char*)to.mutable_data_ptr(), (const char*)from.const_data_ptr(), bytes});
}

}  // namespace
}  // namespace quietstar

STABLE_TORCH_LIBRARY(quietstar_kernels_cpu, library) {
    library.def(
        "thought_attention(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor table, Tensor of_row, "
        "Tensor? tree, Tensor? sinks, Tensor(a!) out, Tensor(b!) lse, bool full, float scale, int window, "
        "float softcap) "
        "-> "
        "()");
    library.def(
        "thought_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor lo, Tensor table, Tensor of_row, Tensor? tree, Tensor? sinks, Tensor(a!) dq, Tensor(b!) dk, "
        "Tensor(c!) dv, "
        "Tensor(d!) sums, Tensor(e!)? dsinks, Tensor? grad_lse, bool full, int parts, int own_sums, "
        "float scale, int window, float softcap) -> ()");
    library.def(
        "thought_decode(Tensor q, Tensor k_text, Tensor v_text, Tensor k_own, Tensor v_own, Tensor lo, "
        "Tensor table, Tensor? tree, Tensor? sinks, Tensor(a!) out, int step, float scale, int window, "
        "float softcap) -> ()");
    library.def(
        "sample_token(Tensor logits, Tensor? bias, Tensor counters, Tensor? banned, Tensor seed, "
        "Tensor(a!) ids, Tensor(b!) logprob, float scale, float softcap, float temperature) -> ()");
    library.def(
        "rms_norm(Tensor x, Tensor? delta, Tensor weight, Tensor(a!)? total, Tensor(b!) out, "
        "Tensor(c!) rstd, float eps, float offset) -> ()");
    library.def(
        "rms_norm_backward(Tensor grad_out, Tensor? grad_total, Tensor total, Tensor rstd, Tensor weight, "
        "Tensor(a!) dx, Tensor(b!)? ddelta, Tensor(c!)? dweight, float offset) -> ()");
    library.def(
        "rotary(Tensor qkv, Tensor? k, Tensor? v, Tensor cos, Tensor sin, Tensor? q_weight, "
        "Tensor? k_weight, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out, int step, float eps, "
        "float offset) -> ()");
    library.def(
        "rotary_backward(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor cos, Tensor sin, Tensor? qkv, "
        "Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor(a!) dqkv, Tensor(b!)? dk, "
        "Tensor(c!)? dq_weight, Tensor(d!)? dk_weight, float eps, float offset) -> ()");
    library.def(
        "gated_activation(Tensor gate, Tensor? up, Tensor? grad, Tensor(a!) out, Tensor(b!)? dup, "
        "bool gelu) -> ()");
    library.def("multiply_adds(Tensor(a!) numbers, int rounds) -> ()");
    library.def("copy(Tensor(a!) to, Tensor from) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(quietstar_kernels_cpu, CPU, library) {
    library.impl("thought_attention", TORCH_BOX(&quietstar::thought_attention));
    library.impl("thought_attention_backward", TORCH_BOX(&quietstar::thought_attention_backward));
    library.impl("thought_decode", TORCH_BOX(&quietstar::thought_decode));
    library.impl("sample_token", TORCH_BOX(&quietstar::sample_token));
    library.impl("rms_norm", TORCH_BOX(&quietstar::rms_norm));
    library.impl("rms_norm_backward", TORCH_BOX(&quietstar::rms_norm_backward));
    library.impl("rotary", TORCH_BOX(&quietstar::rotary));
    library.impl("rotary_backward", TORCH_BOX(&quietstar::rotary_backward));
    library.impl("gated_activation", TORCH_BOX(&quietstar::gated_activation));
    library.impl("multiply_adds", TORCH_BOX(&quietstar::multiply_adds));
    library.impl("copy", TORCH_BOX(&quietstar::copy));
}

// quietstar_kernels/cpu/_library.py calls this through ctypes.
extern "C" __attribute__((visibility("default"))) const char* quietstar_cpu_kernels() {
    return quietstar::chosen().name;
}
