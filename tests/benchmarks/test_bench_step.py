"""The published schedule has our losses and gradients, and keeps more memory the more passes it makes."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import published_schedule
from benchmarks.baselines.published_schedule import PublishedSchedule
from benchmarks.bench_step import LIGER, OURS, PUBLISHED, StepCase
from benchmarks.harness.case import Wrong
from quietstar import QuietStar
from tests.quietstar.common import kept_for_backward

TINY = StepCase(L=12, T=3, J=2, layers=2, D=32, I=48, V=90)


@pytest.mark.parametrize("what", ["training step", "rollout"])
@pytest.mark.parametrize("sizes", [{}, {"B": 2, "N": 1, "J": 1}, {"T": 1, "J": 3}])
def test_the_published_schedule_is_right(what, sizes):
    case = replace(TINY, what=what, **sizes)
    case.check(PUBLISHED.prepare(case))


def test_it_samples_the_same_thoughts_and_has_the_same_loss():
    case = replace(TINY, B=2)
    ours, published = case.wrapped(QuietStar), case.wrapped(PublishedSchedule)
    published.load_state_dict(ours.state_dict())
    text = case.inputs(0)["input_ids"]
    mine, theirs = ours(text, seed=7), published(text, seed=7)
    assert torch.equal(mine.thought_ids, theirs.thought_ids) and len(mine.thought_ids.unique()) > 20
    torch.testing.assert_close(mine.loss_ce, theirs.loss_ce)
    torch.testing.assert_close(mine.reward, theirs.reward, rtol=1e-3, atol=1e-4)
    assert mine.reward.abs().max() > 0.01


def test_a_schedule_that_forgets_a_diagonal_is_refused(monkeypatch):
    right = published_schedule._additive

    def without_the_first_thought_row(mask, dtype):
        L = len(mask)
        mask = mask.clone()
        mask[:, L : 2 * L] &= mask.shape[1] == 2 * L  # only the pass that made it still sees it
        return right(mask, dtype)

    monkeypatch.setattr(published_schedule, "_additive", without_the_first_thought_row)
    with pytest.raises(Wrong, match="differs"):
        TINY.check(PUBLISHED.prepare(TINY))


def test_a_candidate_with_other_layers_is_refused():
    """Its model is compared with another one, not with itself."""
    function = OURS.prepare(TINY)
    TINY.check(function)
    norm = function.qs.model.model.layers[0].input_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) * 1.5
    with pytest.raises(Wrong, match="loss_ce differs"):
        TINY.check(function)


def test_ligers_layers_stay_in_their_model(monkeypatch):
    """Liger also changes the classes of models to come, among them the one that it is compared with."""
    from transformers.models.llama import modeling_llama

    def apply(rope, fused_linear_cross_entropy, model):
        assert not rope and not fused_linear_cross_entropy
        modeling_llama.LlamaRMSNorm = torch.nn.Identity
        for layer in model.model.layers:
            layer.input_layernorm.forward = lambda x: x

    liger = SimpleNamespace(apply_liger_kernel_to_llama=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    norm = modeling_llama.LlamaRMSNorm
    function = LIGER.prepare(TINY)
    assert modeling_llama.LlamaRMSNorm is norm
    with pytest.raises(Wrong, match="differs"):
        TINY.check(function)


def test_memory_of_the_published_schedule_grows_with_the_square_of_the_passes():
    few, many = replace(TINY, T=2), replace(TINY, T=14)
    rows = (few.T + few.J + 2, many.T + many.J + 2)
    ours, published = (
        [kept_for_backward(case.wrapped(kind), case.inputs(0)["input_ids"], seed=0) for case in (few, many)]
        for kind in (QuietStar, PublishedSchedule)
    )
    assert ours[1] / ours[0] < 1.15 * rows[1] / rows[0]
    assert published[1] / published[0] > 1.3 * rows[1] / rows[0]
    assert published[1] > 1.5 * ours[1]


def test_work_counts_the_matmuls_of_the_rollout_and_of_every_packed_pass():
    """Compare with the FLOPs that PyTorch counts in forwards over as many rows with hardly any attention."""
    from torch.utils.flop_counter import FlopCounterMode

    case = replace(TINY, layers=3)
    qs = case.wrapped(QuietStar)

    def layers(S):
        rows = case.L * (1 + case.N * S)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            qs.model.model(torch.zeros(rows, 1, dtype=torch.long))
        attention = case.layers * 2 * case.D * (case.N * S * case.L * (case.L + S + 2) + case.L * (case.L + 1))
        return counter.get_total_flops() - case.layers * 4 * case.D * rows + attention  # not each row's attention to itself

    sampled = case.L * case.N * case.T
    rollout = layers(case.T) + 2 * sampled * case.D * case.V
    packed = layers(case.T + case.J + 1)
    head = 2 * (sampled + case.L * (1 + case.N * case.J)) * case.D * case.V
    assert replace(case, what="rollout").work().flops == pytest.approx(rollout, rel=0.01)
    assert case.work().flops == pytest.approx(rollout + 3 * (packed + head), rel=0.01)
    assert replace(case, lora=True).work().flops == pytest.approx(rollout + 2 * (packed + head), rel=0.01)
    checkpointed = replace(case, lora=True, checkpointing=True)
    assert checkpointed.work().flops == pytest.approx(rollout + 3 * packed + 2 * head, rel=0.01)
    assert checkpointed.work().bytes > replace(case, lora=True).work().bytes
