"""thought_delta through a rule that knows sequences only, as FLA's functions do: here one on the CPU has their place."""

import inspect

import pytest
import torch
from torch.nn.functional import normalize

from quietstar_kernels import ThoughtLayout, thought_delta
from quietstar_kernels.delta import fla, reference
from tests.kernels.drawn import normal, seeded
from tests.kernels.test_thought_conv import drawn_layout

K, E = 4, 3


def drawn_inputs(seed, layout, by_channel=False, width=K, dtype=torch.float64):
    """q, k, v, g and beta as back ends get them, of two key heads and four heads."""
    generator, (B, M) = seeded(seed), (layout.B, layout.M)
    q, k = (normalize(normal(generator, B, 2, M, width, dtype=dtype), dim=-1) for _ in range(2))
    v = normal(generator, B, 4, M, E, dtype=dtype)
    g = -torch.rand(B, 4, M, width if by_channel else 1, generator=generator, dtype=torch.float64).to(dtype)
    beta = torch.rand(B, 4, M, 1, generator=generator, dtype=torch.float64).to(dtype)
    live = torch.cat([torch.ones_like(layout.lo, dtype=torch.bool), layout.branches.live()], 1)[:, None, :, None]
    return [x.where(live, 0).requires_grad_() for x in (q, k, v, g, beta)]


def by_sequence(rule):
    def of_all(q, k, v, g, beta, state, final, ends):
        outs, last = [], []
        for i, (a, b) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
            first = None if state is None else state[i : i + 1]
            out, after = rule(*(x[:, a:b] for x in (q, k, v, g, beta)), initial_state=first, output_final_state=True)
            outs.append(out)
            last.append(after)
        return torch.cat(outs, 1), torch.cat(last) if final else None

    return of_all


@by_sequence
def one_by_one(q, k, v, g, beta, initial_state, output_final_state):
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S, outs = v.new_zeros(1, v.shape[2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state, []
    for t in range(v.shape[1]):
        decay = g[:, t].exp()
        S = S * (decay[..., None] if g.ndim == 4 else decay[..., None, None])
        w = beta[:, t, :, None] * (v[:, t] - (k[:, t, :, :, None] * S).sum(-2))
        S = S + k[:, t, :, :, None] * w[:, :, None]
        outs.append((q[:, t, :, :, None] * S).sum(-2))
    return torch.stack(outs, 1), S


def gradients(results, inputs, seed):
    grads = [normal(seeded(seed + i), *x.shape, dtype=x.dtype) for i, x in enumerate(results)]
    return torch.autograd.grad(results, inputs, grads, materialize_grads=True) if results[0].requires_grad else []


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("group", range(11))
def test_random_layouts(group, by_channel):
    for seed in range(group * 4, group * 4 + 4):
        layout = drawn_layout(seed)
        if layout.R > 200:
            continue
        inputs = drawn_inputs(seed, layout, by_channel, width=(K, 30)[seed % 2])
        got = fla.thought_delta(*inputs, layout, rule=one_by_one)
        want = reference.thought_delta(*inputs, layout, None)
        for x, y in zip(got + gradients(got, inputs, 0), want + gradients(want, inputs, 0), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=f"seed {seed} {layout}")


@pytest.mark.kernels
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("seed", [0, 6, 9, 10])
def test_rules_of_transformers(seed, by_channel):
    """In fp32, with no-op rows behind anchors."""
    if by_channel:
        from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention as rule
    else:
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as rule

    layout = drawn_layout(seed)
    inputs = drawn_inputs(seed, layout, by_channel, dtype=torch.float32)
    rule = inspect.unwrap(rule)

    @by_sequence
    def unscaled(q, *rest, **state):
        return rule(q * K**0.5, *rest, **state) if by_channel else rule(q * K**0.5, *rest, chunk_size=16, **state)

    got = fla.thought_delta(*inputs, layout, rule=unscaled)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = reference.thought_delta(*wide, layout, None)
    for x, y in zip(got + gradients(got, inputs, 0), want + gradients(want, wide, 0), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_why_not(monkeypatch):
    layout = ThoughtLayout.every_position(1, 3, 1, 2)
    q, k, v, g, beta = (x.detach() for x in drawn_inputs(0, layout, dtype=torch.bfloat16))
    call = q, k, v, g[..., 0], beta[..., 0], layout
    with pytest.raises(ValueError, match="backend 'fla' is not available: FLA is not installed"):
        thought_delta(*call, backend="fla")
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="it serves GPUs, these tensors are on cpu"):
        thought_delta(*call, backend="fla")
