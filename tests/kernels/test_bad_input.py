"""Errors for wrong arguments name the op, the argument and its letters, what was expected and what was given."""

import re

import pytest
import torch
import torch.distributed.tensor

from quietstar_kernels import (
    ThoughtLayout,
    gated_activation,
    linear_logprob,
    rms_norm,
    rotary,
    rotary_decode,
    sample_token,
    thought_attention,
    thought_decode,
)
from quietstar_kernels.testing import attention_inputs, decode_inputs, logprob_inputs, sample_inputs

# B=2 L=3 P=2 N=2 S=2 R=8 M=11
LAYOUT = ThoughtLayout.at(torch.tensor([[0, 2], [1, -1]]), 2, 2, text_length=3)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def column_major(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def arguments(op):
    """Valid arguments: H=4 G=2 K=8 E=6; R=5 D=3 V=20."""
    generator = torch.Generator().manual_seed(0)
    if op is thought_attention:
        return attention_inputs(generator, LAYOUT, 4, 2, 8, 6, sinks=True) | {"layout": LAYOUT}
    if op is thought_decode:
        return decode_inputs(generator, LAYOUT, 4, 2, 8, 6, sinks=True) | {"layout": LAYOUT, "step": 1}
    if op is sample_token:
        return sample_inputs(generator, 5, 3, 20, bias=True) | {"seed": 0}
    if op is rms_norm:
        return {"x": zeros(2, 3, 8), "weight": zeros(8), "delta": zeros(2, 3, 8)}
    if op is gated_activation:
        return {"gate": zeros(2, 8), "up": zeros(2, 8)}
    if op in (rotary, rotary_decode):
        inputs = {"qkv": zeros(2, 3, 32), "k": zeros(2, 3, 16), "v": zeros(2, 3, 16), "q_weight": zeros(8), "heads": (4, 2)}
        inputs |= {"cos": zeros(1, 3, 8), "sin": zeros(1, 3, 8)}
        own = {"k_own": zeros(2, 2, 3, 5, 8), "v_own": zeros(2, 2, 3, 5, 8), "step": 1}
        return inputs | (own if op is rotary_decode else {})
    return logprob_inputs(generator, 5, 3, 20, bias=True)


ATTENTION = [
    ({"q": zeros(2, 4, 10, 8)}, "q must have shape [B,H,M,K]=[2,?,11,?], got [2,4,10,8]"),
    ({"q": None}, "q must be a tensor [B,H,M,K], got None"),
    ({"query_rows": "thoughts"}, "q must have shape [B,H,R,K]=[2,?,8,?], got [2,4,11,8]"),
    ({"query_rows": "text"}, "query_rows must be one of all, thoughts, got 'text'"),
    ({"k": zeros(2, 2, 8, 8)}, "k must have shape [B,G,M,K]=[2,?,11,8], got [2,2,8,8]"),
    ({"v": zeros(2, 4, 11, 6)}, "v must have shape [B,G,M,E]=[2,2,11,?], got [2,4,11,6]"),
    ({"sinks": zeros(2)}, "sinks must have shape [H]=[4], got [2]"),
    ({"sinks": zeros(4, dtype=torch.int64)}, "sinks must have dtype float32, float16, bfloat16, float64, got int64"),
    ({"q": zeros(2, 4, 11, 8, dtype=torch.int32)}, "q must have dtype float32, float16, bfloat16, float64, got int32"),
    ({"k": zeros(2, 2, 11, 8, dtype=torch.float16)}, "k must have dtype float32 like q, got float16"),
    ({"q": zeros(2, 4, 11, 8, device="meta")}, "q must be on cpu like layout, got meta"),
    ({"layout": LAYOUT.to("meta")}, "q must be on meta like layout, got cpu"),
    ({"k": zeros(2, 3, 11, 8), "v": zeros(2, 3, 11, 6)}, "H must be a multiple of G, got H=4 in q, G=3 in k"),
    ({"k": zeros(2, 0, 11, 8), "v": zeros(2, 0, 11, 6)}, "H must be a multiple of G, got H=4 in q, G=0 in k"),
    ({"q": zeros(2, 4, 11, 257), "k": zeros(2, 2, 11, 257)}, "head width K must be from 1 to 256, got 257"),
    ({"v": zeros(2, 2, 11, 257)}, "head width E must be from 1 to 256, got 257"),
    ({"q": column_major(zeros(2, 4, 11, 8))}, "q must have a last stride of 1, got strides [352, 88, 1, 11]"),
    ({"window": 0}, "window must be None or an integer of at least 1, got 0"),
    ({"scale": 0.0}, "scale must be a positive finite number, got 0.0"),
    ({"softcap": float("inf")}, "softcap must be a positive finite number, got inf"),
]

DECODE = [
    ({"q": zeros(2, 4, 8, 8)}, "q must have shape [B,H,P*N,K]=[2,?,4,?], got [2,4,8,8]"),
    ({"k_text": zeros(2, 2, 4, 8)}, "k_text must have shape [B,G,L,K]=[2,?,3,8], got [2,2,4,8]"),
    ({"k_own": zeros(2, 2, 4, 1, 8)}, "k_own must have shape [B,G,P*N,S,K]=[2,2,4,2,8], got [2,2,4,1,8]"),
    ({"q": zeros(2, 4, 4, 8, dtype=torch.int64)}, "q must have dtype float32, float16, bfloat16, float64, got int64"),
    ({"k_text": zeros(2, 2, 3, 8, dtype=torch.float64)}, "k_text must have dtype float32 like q, got float64"),
    ({"v_text": zeros(2, 2, 3, 6, device="meta")}, "v_text must be on cpu like q, got meta"),
    ({"sinks": zeros(5)}, "sinks must have shape [H]=[4], got [5]"),
    ({"q": zeros(2, 3, 4, 8), "sinks": None}, "H must be a multiple of G, got H=3 in q, G=2 in k"),
    ({"v_text": zeros(2, 2, 3, 300), "v_own": zeros(2, 2, 4, 2, 300)}, "head width E must be from 1 to 256, got 300"),
    ({"k_text": column_major(zeros(2, 2, 3, 8))}, "k_text must have a last stride of 1, got strides"),
    ({"step": 2}, "step must be from 0 to S-1=1, got 2"),
    ({"step": torch.tensor(2)}, "step must be from 0 to S-1=1, got 2"),
    ({"step": torch.tensor(-1)}, "step must be from 0 to S-1=1, got -1"),
    ({"step": torch.tensor([1])}, "step must have shape []=[], got [1]"),
    ({"step": torch.tensor(1.0)}, "step must have dtype int32, int64, got float32"),
    ({"step": torch.tensor(1, device="meta")}, "step must be on cpu like layout, got meta"),
    ({"window": 0}, "window must be None or an integer of at least 1, got 0"),
]

HEAD = [
    ({"hidden": zeros(5)}, "hidden must have shape [R,D]=[?,?], got [5]"),
    ({"hidden": zeros(5, 3, dtype=torch.int64)}, "hidden must have dtype float32, float16, bfloat16, float64, got int64"),
    ({"weight": zeros(20, 4)}, "weight must have shape [V,D]=[?,3], got [20,4]"),
    ({"weight": zeros(20, 3, dtype=torch.bfloat16)}, "weight must have dtype float32 like hidden, got bfloat16"),
    ({"weight": zeros(0, 3), "bias": None}, "weight must have at least one row, V=0"),
    ({"bias": zeros(19)}, "bias must have shape [V]=[20], got [19]"),
    ({"scale": float("inf")}, "scale must be finite, got inf"),
    ({"temperature": -0.5}, "temperature must be "),
    ({"temperature": 3.41e38}, "temperature must be at most 3.40e+38, the largest of float32, got 3.41e+38"),
    ({"banned": [3, 20]}, "banned ids must be from 0 to V-1=19, got [3, 20]"),
    ({"banned": range(20)}, "banned must leave at least one of the V=20 ids"),
]

SAMPLE = [
    ({"counters": zeros(4, 4, dtype=torch.int32)}, "counters must have shape [R,4]=[5,4], got [4,4]"),
    ({"counters": zeros(5, 4, dtype=torch.int64)}, "counters must have dtype int32, got int64"),
    ({"counters": zeros(5, 4, dtype=torch.int32, device="meta")}, "counters must be on cpu like hidden, got meta"),
    ({"seed": 2**64}, "seed must be a 64-bit integer, got 18446744073709551616"),
    ({"seed": zeros(1, dtype=torch.int64)}, "seed must have shape []=[], got [1]"),
    ({"seed": zeros(dtype=torch.int32)}, "seed must have dtype int64, got int32"),
    ({"seed": zeros(dtype=torch.int64, device="meta")}, "seed must be on cpu like hidden, got meta"),
    ({"temperature": float("inf")}, "temperature must be zero or a positive finite number, got inf"),
]

TARGETS = torch.tensor([0, 19, -100, 7, 7])
LOGPROB = [
    ({"targets": zeros(4, dtype=torch.int64)}, "targets must have shape [R]=[5], got [4]"),
    ({"targets": zeros(5, dtype=torch.int32)}, "targets must have dtype int64, got int32"),
    ({"targets": zeros(5, dtype=torch.int64, device="meta")}, "targets must be on cpu like hidden, got meta"),
    ({"targets": TARGETS + 1}, "targets must be from 0 to V-1=19 or -100, got 20"),
    ({"targets": TARGETS, "banned": [6, 7]}, "targets must not hold a banned id, got 7"),
    ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
    ({"keep_bytes": -1}, "keep_bytes must be an integer of at least 0, got -1"),
]

NORM = [
    ({"x": zeros()}, "x must have shape [...,D] with D of at least 1, got []"),
    ({"x": zeros(2, 3, 8, dtype=torch.int32)}, "x must have dtype float32, float16, bfloat16, float64, got int32"),
    ({"weight": zeros(7)}, "weight must have shape [D]=[8], got [7]"),
    ({"delta": zeros(3, 8)}, "delta must have the shape of x, [2, 3, 8], got [3, 8]"),
    ({"delta": zeros(2, 3, 8, device="meta")}, "delta must be on cpu like x, got meta"),
    ({"eps": -1.0}, "eps must be zero or a positive finite number, got -1.0"),
    ({"offset": None}, "offset must be finite, got None"),
    ({"dtype": torch.int64}, "dtype must be None or one of float32, float16, bfloat16, float64, got torch.int64"),
]

GATED = [
    ({"gate": zeros()}, "gate must have shape [...,I], got []"),
    ({"gate": zeros(2, 7), "up": None}, "gate must have shape [...,2I] without up, got [2, 7]"),
    ({"up": zeros(2, 7)}, "up must have the shape of gate, [2, 8], got [2, 7]"),
    ({"up": zeros(2, 8, dtype=torch.float16)}, "up must have dtype float32 like gate, got float16"),
    ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
]

ROTARY = [
    ({"heads": 4}, "heads must be (H, G), got 4"),
    ({"heads": (4, 0)}, "heads[1] must be from 1 to 65,536, got 0"),
    ({"cos": zeros(3, 8)}, "cos must have shape [B,n,K]=[?,?,?], got [3,8]"),
    ({"sin": zeros(1, 3, 6)}, "sin must have shape [1,n,K]=[1,3,8], got [1,3,6]"),
    ({"v": None}, "k and v must be given both or neither"),
    ({"k": None, "v": None}, "qkv must have shape [B,n,(H+2G)*K]=[?,3,64], got [2,3,32]"),
    ({"k": zeros(2, 3, 8)}, "k must have shape [B,n,G*K]=[2,3,16], got [2,3,8]"),
    ({"v": zeros(2, 3, 16, dtype=torch.float64)}, "v must have dtype float32 like qkv, got float64"),
    ({"k_weight": zeros(16)}, "k_weight must have shape [K]=[8], got [16]"),
]

DECODED = [
    ({"k_own": zeros(2, 4, 3, 5, 8)}, "k_own must have shape [B,G,C,S,K]=[2,2,3,?,8], got [2,4,3,5,8]"),
    ({"v_own": zeros(2, 2, 3, 4, 8)}, "v_own must have shape [B,G,C,S,K]=[2,2,3,5,8], got [2,2,3,4,8]"),
    ({"k_own": column_major(zeros(2, 2, 3, 5, 8))}, "k_own must have a last stride of 1, got strides"),
    ({"v_own": zeros(2, 2, 1, 5, 8).expand(2, 2, 3, 5, 8)}, "v_own must not be expanded, got strides [80, 40, 0, 8, 1]"),
    ({"step": 5}, "step must be from 0 to S-1=4, got 5"),
    ({"step": torch.tensor(5)}, "step must be from 0 to S-1=4, got 5"),
    ({"step": torch.tensor(1.0)}, "step must have dtype int32, int64, got float32"),
]

CASES = [
    (op, change, message)
    for op, table in [
        (thought_attention, ATTENTION),
        (thought_decode, DECODE),
        (sample_token, HEAD + SAMPLE),
        (linear_logprob, HEAD + LOGPROB),
        (rms_norm, NORM),
        (gated_activation, GATED),
        (rotary, ROTARY),
        (rotary_decode, ROTARY + DECODED),
    ]
    for change, message in table
]


@pytest.mark.parametrize("op, change, message", CASES, ids=[f"{op.__name__}: {message}" for op, _, message in CASES])
def test_refused(op, change, message):
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=f"^{op.__name__}: {re.escape(message)}"):
            op(**(arguments(op) | change), backend=backend)


@pytest.mark.parametrize("op", [thought_attention, thought_decode, sample_token, linear_logprob])
def test_the_arguments_that_are_changed_above_are_fine(op, backend):
    op(**arguments(op), backend=backend)


def test_a_stride_of_a_width_of_one_does_not_matter(backend):
    inputs = arguments(thought_attention) | {"v": zeros(2, 2, 11, 3)[..., 1:2]}
    assert inputs["v"].stride(-1) == 1
    inputs["v"] = inputs["v"].as_strided((2, 2, 11, 1), (66, 33, 3, 2))
    assert thought_attention(**inputs, backend=backend).shape == (2, 4, 11, 1)


FLOAT_OPTIONS = [(op, name) for op in (thought_attention, thought_decode) for name in ("scale", "softcap")]
FLOAT_OPTIONS += [(op, name) for op in (linear_logprob, sample_token) for name in ("scale", "softcap", "temperature")]


@pytest.mark.parametrize("op, name", FLOAT_OPTIONS)
def test_a_number_gets_no_gradient(op, name):
    inputs, number = arguments(op), torch.tensor(1.25, requires_grad=True)
    want = op(**inputs | {name: 1.25})
    with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must .* to which no gradient would flow: detach it"):
        op(**inputs | {name: number})
    with torch.no_grad():
        got = op(**inputs | {name: number}), op(**inputs | {name: number.detach()})
    assert all(torch.equal(x, y) for one in got for x, y in zip(one, want, strict=True))
    if op is not sample_token:
        with pytest.raises(ValueError, match=f"{name} must be at most 3.40e.38, the largest of float32, got 1e.300"):
            op(**inputs | {name: 1e300})


@pytest.mark.parametrize("op", [linear_logprob, sample_token, thought_attention, thought_decode])
def test_a_distributed_tensor(op):
    """FSDP2 leaves weights as DTensors outside a forward."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for name, value in arguments(op).items():
            if isinstance(value, torch.Tensor):
                whole = torch.distributed.tensor.distribute_tensor(value, mesh)
                with pytest.raises(
                    ValueError, match=rf"^{op.__name__}: {name} must .* got a DTensor: pass {name}.full_tensor\(\)"
                ):
                    op(**arguments(op) | {name: whole})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("op", [linear_logprob, sample_token, thought_attention, thought_decode])
def test_mixed_dtypes_under_autocast(op):
    """They are cast as ``linear`` casts them, with gradients in the dtypes of the inputs; equal ones stay as they are."""
    given = arguments(op)
    names = [name for name, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "sinks"]
    half = {name: given[name].bfloat16() for name in names}
    mixed = {name: given[name].clone() if i % 2 else half[name].clone() for i, name in enumerate(names)}
    differentiable = op in (linear_logprob, thought_attention)
    for x in mixed.values():
        x.requires_grad_(differentiable)
    with torch.autocast("cpu", torch.bfloat16):
        got, fp32 = op(**given | mixed), op(**given)
    want = op(**given | half)
    for x, y in ((got, want), (fp32, op(**given))):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    if differentiable:
        got.sum().backward()
        assert all(x.grad.dtype == x.dtype for x in mixed.values())
    with pytest.raises(ValueError, match="must have dtype"):
        op(**given | mixed)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have dtype"):
        op(**given | {names[0]: given[names[0]].double()})
