"""The ops and the constructors of layouts under calls with hostile arguments; the rule is in tests/hostile.py."""

import pytest
import torch

from quietstar_kernels import (
    ThoughtLayout,
    gated_activation,
    linear_divergence,
    linear_logprob,
    rms_norm,
    rotary,
    rotary_decode,
    sample_thoughts,
    sample_token,
    thought_attention,
    thought_decode,
)
from quietstar_kernels.testing import attention_inputs, decode_inputs, logprob_inputs, sample_inputs
from tests.hostile import Target, attack

B, L, P, N, S, T = 2, 6, 3, 2, 4, 2
ANCHORS = torch.tensor([[0, 2, 5], [1, 4, -1]])
SIZES = {"thoughts": N, "rows": S}
OPTIONS = {"scale": 0.5, "window": 4, "softcap": 3.0, "backend": "auto"}
HEAD = {"scale": 0.5, "softcap": 3.0, "temperature": 0.7, "banned": [3, 5], "backend": "auto"}


def generator():
    return torch.Generator().manual_seed(0)


def layout():
    return ThoughtLayout.at(ANCHORS, N, S, text_length=L)


def heads():
    student, teacher = (sample_inputs(generator(), 5, width, bias=True) for width in (8, 6))
    names = ("hidden", "weight", "bias")
    return {name: student[name] for name in names} | {f"teacher_{name}": teacher[name] for name in names}


def turned():
    cos, sin, weight, rows = torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.ones(4), torch.rand(2, 3, 8)
    norm = {"q_weight": weight, "k_weight": weight, "eps": 1e-6, "offset": 1.0, "backend": "auto"}
    return {"qkv": torch.rand(2, 3, 16), "k": rows, "v": rows, "cos": cos, "sin": sin, "heads": (4, 2), **norm}


TARGETS = {
    rms_norm: lambda: {
        "x": torch.rand(2, 3, 8),
        "weight": torch.ones(8),
        "eps": 1e-6,
        "delta": torch.rand(2, 3, 8),
        "offset": 1.0,
        "dtype": torch.float16,
        "backend": "auto",
    },
    gated_activation: lambda: {"gate": torch.rand(3, 8), "up": torch.rand(3, 8), "activation": "silu", "backend": "auto"},
    rotary: turned,
    rotary_decode: lambda: {**turned(), "k_own": torch.rand(2, 2, 3, 5, 4), "v_own": torch.rand(2, 2, 3, 5, 4), "step": 1},
    thought_attention: lambda: {
        **attention_inputs(generator(), layout(), sinks=True),
        **OPTIONS,
        "layout": layout(),
        "query_rows": "all",
        "return_lse": False,
    },
    thought_decode: lambda: {**decode_inputs(generator(), layout(), sinks=True), **OPTIONS, "layout": layout(), "step": 1},
    sample_token: lambda: {**sample_inputs(generator(), 5, bias=True), **HEAD, "seed": 3},
    linear_logprob: lambda: {
        **logprob_inputs(generator(), 5, bias=True, banned=(3, 5)),
        **HEAD,
        "return_entropy": False,
        "keep_bytes": 2**20,
    },
    linear_divergence: lambda: {
        **heads(),
        "beta": 0.5,
        "scale": 0.5,
        "teacher_scale": 2.0,
        "softcap": 3.0,
        "teacher_softcap": 4.0,
        "temperature": 0.7,
    },
    sample_thoughts: lambda: {
        **HEAD,
        "forward": lambda ids, layout: torch.sin(ids[..., None] + torch.arange(8.0)),
        "weight": torch.randn(33, 8, generator=generator()),
        "layout": layout(),
        "input_ids": torch.arange(B * L).view(B, L),
        "thought_tokens": T,
        "start_id": 1,
        "seed": 3,
        "sequence_ids": torch.arange(B),
    },
    ThoughtLayout.every_position: lambda: {"batch": B, "text_length": L, **SIZES, "device": "cpu"},
    ThoughtLayout.at: lambda: {
        **SIZES,
        "anchors": ANCHORS,
        "text_length": L,
        "lo": torch.zeros(B, L, dtype=torch.int32),
        "length": torch.full((B, P, N), S),
        "own": "full",
    },
    ThoughtLayout.from_padding: lambda: {
        **SIZES,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "anchors": ANCHORS,
    },
    ThoughtLayout.from_documents: lambda: {
        **SIZES,
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 2, 2, -1, -1]]),
        "anchors": ANCHORS,
    },
    ThoughtLayout.packed: lambda: {
        "anchors": ANCHORS,
        "lengths": torch.tensor([[2, 0, 3], [1, 1, 0]]),
        "text_length": L,
        "lo": torch.zeros(B, L, dtype=torch.int32),
        "rows": 6,
        "own": "full",
    },
}


@pytest.mark.parametrize("calls, seed", [(12, 0), pytest.param(150, 1, marks=pytest.mark.kernels)])
@pytest.mark.parametrize("function", TARGETS, ids=lambda function: function.__name__)
def test_hostile_calls(function, calls, seed, record_property):
    tally = attack(Target(function.__qualname__, function, TARGETS[function]), calls, seed)
    record_property("counts", ["hostile calls of the kernels", tally.counts])
    assert not tally.broken, "\n\n".join(tally.broken)
