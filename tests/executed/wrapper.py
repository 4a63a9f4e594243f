"""The wrapper on a GPU that isn't there: a training step and a generation of a tiny model with the Triton kernels."""

import pytest
import torch

from tests.quietstar.common import assert_same_gradients, step, text, wrap
from tests.quietstar.conftest import make_model

OPTIONS = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "policy_weight": 3.0, "embedding_scale": 1.0}


def wrapped():
    qs = wrap(make_model("llama"), **OPTIONS)
    qs.graphs = False  # there is nothing that could be captured
    return qs


def test_a_training_step(monkeypatch):
    """The loss and the gradients are those of the reference, which needs the same thoughts."""
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
        torch.manual_seed(0)
        found[backend] = step(wrapped(), text(), labels=text())
    (want, gradients), (got, got_gradients) = found["reference"], found["triton"]
    assert abs(got.loss - want.loss) <= 1e-5 * abs(want.loss)
    assert_same_gradients(got_gradients, gradients, 1e-4)


def test_a_text_does_not_depend_on_the_batch(monkeypatch):
    """Attention's part of the table in docs/reliability.md; products are PyTorch's here."""
    monkeypatch.setenv("QUIETSTAR_BACKEND", "triton")
    ids, numbers = text(), torch.arange(2)
    whole, alone = (wrapped()(ids[rows], sequence_ids=numbers[rows], seed=1) for rows in (slice(0, 2), slice(1, 2)))
    for name in ("thought_ids", "nll_base", "nll_mix", "reward"):
        assert torch.equal(getattr(alone, name), getattr(whole, name)[1:]), name


@pytest.mark.parametrize("think", ["always", "never"])
def test_generation(think, monkeypatch):
    """The tokens are those of the reference."""
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
        torch.manual_seed(0)
        found[backend] = wrapped().eval().generate(text(1, 6), max_new_tokens=4, think=think, do_sample=False)
    assert torch.equal(found["triton"], found["reference"])
