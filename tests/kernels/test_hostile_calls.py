"""Every public function of the kernels under calls with hostile arguments; the rule is in tests/hostile.py."""

import importlib
from contextlib import suppress

import pytest
import torch

from quietstar_kernels import (
    ThoughtLayout,
    backends,
    check,
    cpu_library,
    cuda_library,
    linear_logprob,
    philox,
    sample_thoughts,
    sample_token,
    testing,
    thought_attention,
    thought_decode,
)
from tests.hostile import Target, attack, public_functions

MODULES = {  # with what is left out of them
    "quietstar_kernels": "",
    "quietstar_kernels.testing": "",
    "quietstar_kernels.check": "check",  # runs everything
    "quietstar_kernels.philox": "",
}
B, L, P, N, S, T = 2, 6, 3, 2, 4, 2
TARGETS = {}


def target(name, function, good, replaces=()):
    TARGETS[name] = Target(name, function, good, replaces)


def unless_wrong(function):
    """An AssertionError is what it is for."""

    def call(**arguments):
        with suppress(AssertionError):
            function(**arguments)

    return call


def generator():
    return torch.Generator().manual_seed(0)


def layout():
    return ThoughtLayout.at(torch.tensor([[0, 2, 5], [1, 4, -1]]), N, S, text_length=L)


OPTIONS = {"scale": 0.5, "window": 4, "softcap": 3.0, "backend": "auto"}
HEAD = {"scale": 0.5, "softcap": 3.0, "temperature": 0.7, "banned": [3, 5], "backend": "auto"}

target(
    "thought_attention",
    thought_attention,
    lambda: {
        **testing.attention_inputs(generator(), layout(), sinks=True),
        "layout": layout(),
        **OPTIONS,
        "query_rows": "all",
        "return_lse": False,
    },
)
target(
    "thought_decode",
    thought_decode,
    lambda: {**testing.decode_inputs(generator(), layout(), sinks=True), "layout": layout(), "step": 1, **OPTIONS},
)
target("sample_token", sample_token, lambda: {**testing.sample_inputs(generator(), 5, bias=True), "seed": 3, **HEAD})
target(
    "linear_logprob",
    linear_logprob,
    lambda: {
        **testing.logprob_inputs(generator(), 5, bias=True, banned=(3, 5)),
        **HEAD,
        "return_entropy": False,
        "grad_scale": torch.ones(5),
        "keep_bytes": 2**20,
    },
)
target(
    "sample_thoughts",
    sample_thoughts,
    lambda: {
        "forward": lambda ids, layout: torch.sin(ids[..., None] + torch.arange(8.0)),
        "weight": torch.randn(33, 8, generator=generator()),
        "layout": layout(),
        "input_ids": torch.arange(B * L).view(B, L),
        "thought_tokens": T,
        "start_id": 1,
        "seed": 3,
        "sequence_ids": torch.arange(B),
        **HEAD,
    },
)
target("backends", backends, lambda: {"device": "cpu"})
target("cpu_library", cpu_library, lambda: {})
target("cuda_library", cuda_library, lambda: {})

ANCHORS = {"anchors": torch.tensor([[0, 2, 5], [1, 4, -1]])}
SIZES = {"thoughts": N, "rows": S}
target(
    "ThoughtLayout",
    ThoughtLayout,
    lambda: {"anchor": layout().anchor, "lo": layout().lo, "length": layout().length, "rows": S},
)
target(
    "ThoughtLayout.every_position",
    ThoughtLayout.every_position,
    lambda: {"batch": B, "text_length": L, **SIZES, "device": "cpu"},
)
target(
    "ThoughtLayout.at",
    ThoughtLayout.at,
    lambda: {
        **ANCHORS,
        **SIZES,
        "text_length": L,
        "lo": torch.zeros(B, L, dtype=torch.int32),
        "length": torch.full((B, P, N), S),
        "validate": True,
        "own": "full",
    },
)
target(
    "ThoughtLayout.from_padding",
    ThoughtLayout.from_padding,
    lambda: {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]), **SIZES, **ANCHORS},
)
target(
    "ThoughtLayout.from_documents",
    ThoughtLayout.from_documents,
    lambda: {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 2, 2, -1, -1]]), **SIZES, **ANCHORS},
)
target(
    "ThoughtLayout.packed",
    ThoughtLayout.packed,
    lambda: {
        **ANCHORS,
        "lengths": torch.tensor([[2, 0, 3], [1, 1, 0]]),
        "text_length": L,
        "lo": torch.zeros(B, L, dtype=torch.int32),
        "rows": 6,
        "own": "full",
        "validate": True,
    },
)
for name in ("row_anchor", "branch_of_row", "row_in_branch", "live", "text_position_ids", "position_ids", "text_only"):
    target(f"ThoughtLayout.{name}", getattr(layout(), name), lambda: {})
target(
    "ThoughtLayout.token_ids",
    layout().token_ids,
    lambda: {
        "input_ids": torch.arange(B * L).view(B, L),
        "thought_ids": torch.zeros(B, P, N, T, dtype=torch.int64),
        "start_id": 1,
        "end_id": 2,
        "pad_id": 0,
    },
)
target("ThoughtLayout.split", layout().split, lambda: {"packed": torch.zeros(B, layout().M, 3)})
target("ThoughtLayout.predicting", layout().predicting, lambda: {"packed": torch.zeros(B, layout().M, 3), "lookahead": 2})
target("ThoughtLayout.targets", layout().targets, lambda: {"labels": torch.arange(B * L).view(B, L), "lookahead": 2})
target("ThoughtLayout.dense_mask", layout().dense_mask, lambda: {"window": 4})
target("ThoughtLayout.select", layout().select, lambda: {"places": slice(0, 2)})
target("ThoughtLayout.to", layout().to, lambda: {"device": "cpu"})

INPUTS = {"heads": 4, "groups": 2, "width": 8, "value_width": 4, "sinks": True, "strided": True, "dtype": torch.float32}
HEAD_INPUTS = {"rows": 5, "width": 8, "vocabulary": 33, "bias": True, "dtype": torch.float32, "device": "cpu"}
target("philox", philox.philox, lambda: {"counter": tuple(torch.arange(4)), "key": (3, 4)})
target(
    "draw_words",
    philox.draw_words,
    lambda: {"counters": torch.zeros(5, 4, dtype=torch.int32), "blocks": torch.arange(3), "seed": 3},
)
target("served", check.served, lambda: {"device": torch.device("cpu")})
target(
    "attention_inputs",
    testing.attention_inputs,
    lambda: {"generator": generator(), "layout": layout(), **INPUTS, "query_rows": "all"},
)
target("decode_inputs", testing.decode_inputs, lambda: {"generator": generator(), "layout": layout(), **INPUTS})
target("sample_inputs", testing.sample_inputs, lambda: {"generator": generator(), **HEAD_INPUTS})
target("logprob_inputs", testing.logprob_inputs, lambda: {"generator": generator(), **HEAD_INPUTS, "banned": [3]})
target(
    "random_layout",
    testing.random_layout,
    lambda: {
        "generator": generator(),
        "kind": "anchors",
        "max_batch": 3,
        "max_text": 8,
        "max_thoughts": 2,
        "max_rows": 4,
        "device": "cpu",
    },
)
target(
    "plain_attention",
    testing.plain_attention,
    lambda: {
        **testing.attention_inputs(generator(), layout(), sinks=True),
        "layout": layout(),
        **{name: OPTIONS[name] for name in ("scale", "window", "softcap")},
        "query_rows": "all",
    },
)
target(
    "plain_decode",
    testing.plain_decode,
    lambda: {
        **testing.decode_inputs(generator(), layout(), sinks=True),
        "layout": layout(),
        "step": 1,
        **{name: OPTIONS[name] for name in ("scale", "window", "softcap")},
    },
)


def head_inputs(make, **options):
    return make(generator(), 5, bias=True, **options) | {name: HEAD[name] for name in HEAD if name != "backend"}


target(
    "plain_log_softmax",
    testing.plain_log_softmax,
    lambda: {name: x for name, x in head_inputs(testing.sample_inputs).items() if name != "counters"},
)
target("plain_logprob", testing.plain_logprob, lambda: head_inputs(testing.logprob_inputs, banned=(3, 5)))
target(
    "attention_magnitudes",
    testing.attention_magnitudes,
    lambda: {
        "inputs": testing.attention_inputs(generator(), layout()),
        "grad_out": torch.ones(B, 4, layout().M, 8),
        "scale": 0.5,
    },
)
target(
    "assert_close_as_plain",
    unless_wrong(testing.assert_close_as_plain),
    lambda: {
        "got": torch.ones(3),
        "plain": torch.ones(3),
        "truth": torch.ones(3, dtype=torch.float64),
        "what": "result",
        "magnitude": 1.0,
    },
)
OURS = ("op", "grad_outputs")  # the other inputs are for the op that is judged, which may refuse them in its own words
JUDGED = {"inputs": {"x": torch.ones(3)}, "grad_outputs": [torch.ones(3)]}
target("forward_backward", testing.forward_backward, lambda: {"op": lambda x: x.exp(), **JUDGED}, OURS)
target(
    "assert_op_close_as_plain",
    unless_wrong(testing.assert_op_close_as_plain),
    lambda: {
        "op": lambda x: x.exp(),
        "plain": lambda x: x.exp(),
        **JUDGED,
        "what": "exp",
        "magnitudes": {"x": 1.0},
    },
    (*OURS, "plain", "what", "magnitudes"),
)


def run(name, calls, seed, record_property):
    tally = attack(TARGETS[name], calls if TARGETS[name].good() else 1, seed)
    record_property("counts", ["hostile calls of the kernels", tally.counts])
    assert not tally.broken, "\n\n".join(tally.broken)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_calls(name, record_property):
    run(name, 40, 0, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_more_hostile_calls(name, record_property):
    run(name, 100, 1, record_property)


@pytest.mark.parametrize("module, left_out", MODULES.items())
def test_every_public_function_is_attacked(module, left_out):
    assert public_functions(importlib.import_module(module)) - set(left_out.split()) <= TARGETS.keys()
