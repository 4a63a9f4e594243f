"""The ops of a decoder layer compute what transformers' own modules do."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from quietstar_kernels import gated_activation, rms_norm, rotary

H, G, K = 4, 2, 16


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm, offset", [(LlamaRMSNorm, 0.0), (Qwen3RMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_norms(norm, offset):
    module, x, delta = norm(64, eps=1e-5), drawn(2, 5, 64), drawn(3, 5, 64)[:2]
    module.weight.data = drawn(64)
    total, out = rms_norm(x, module.weight, 1e-5, delta, offset)
    assert torch.equal(total, x + delta)
    assert_same(out, module(x + delta))


@pytest.mark.parametrize("norm, offset", [(None, 0.0), (Qwen3RMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_rotary(norm, offset):
    qkv, (cos, sin) = drawn(2, 5, (H + 2 * G) * K), drawn(2, 2, 5, K).sin()
    q, k, v = (x.unflatten(-1, (-1, K)) for x in qkv.split((H * K, G * K, G * K), -1))
    weights = [None, None]
    if norm is not None:
        modules = [norm(K), norm(K)]
        for module, weight in zip(modules, drawn(2, K), strict=True):
            module.weight.data = weight
        q, k, weights = modules[0](q), modules[1](k), [module.weight for module in modules]
    want = *apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin), v.transpose(1, 2)
    for x, y in zip(rotary(qkv, None, None, cos, sin, (H, G), *weights, offset=offset), want, strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("ours, theirs", [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_activations(ours, theirs):
    gate, up = drawn(2, 5, 2 * 48).chunk(2, -1)
    assert_same(gated_activation(gate, up, ours), ACT2FN[theirs](gate) * up)
