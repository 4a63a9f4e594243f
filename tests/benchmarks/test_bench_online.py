"""All ways to make a step of RLP have the same thoughts, rewards and gradients. If one doesn't, the benchmark refuses it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.baselines import online
from benchmarks.baselines.online import SequencePerThought
from benchmarks.bench_online import BASELINES, BENCHMARK, OURS, smoke
from benchmarks.harness.case import Wrong

TINIEST, ROLLOUT = smoke(torch.device("cpu"))
TINY = replace(TINIEST, B=2, L=24, N=3, T=10)


@pytest.mark.parametrize("candidate", [OURS, *BASELINES], ids=lambda candidate: candidate.name)
def test_all_ways_are_right(candidate):
    case = replace(TINY, layers=2, N=6)
    case.check(candidate.prepare(case))


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("continue_from", lambda thoughts: thoughts.flip(0), "12 of 12 thoughts differ"),
        ("without_thoughts", lambda logp: logp + 1, "rewards differs by"),
        ("losses", lambda losses: losses[..., :1], "gradient differs by"),
    ],
)
def test_what_differs_is_refused(method, wrong, message):
    right = getattr(SequencePerThought, method)
    way = type("Other", (SequencePerThought,), {method: lambda self, *inputs: wrong(right(self, *inputs))})
    with pytest.raises(Wrong, match=message):
        TINY.check(way(TINY))


def test_batches_of_a_few_sequences_have_the_same_thoughts(monkeypatch):
    way, ids = SequencePerThought(TINY), TINY.inputs(1)["input_ids"]
    whole = way.rollout(ids)
    monkeypatch.setitem(online.CACHE, "cpu", 5 * (TINY.L + TINY.T) * 2 * TINY.K * 4)  # five
    assert torch.equal(way.rollout(ids), whole) and whole.shape == (2, 2, 3, 10)
    assert torch.equal((whole >= 0).sum(-1), TINY.lengths)


def test_thoughts_have_many_lengths():
    lengths = replace(TINY, N=64, T=48).lengths.flatten().float()
    assert lengths.min() == 1 and lengths.max() == 48 and len(lengths.unique()) > 24
    assert 0.25 < lengths.mean() / 48 < 0.55


def test_work_counts_the_matmuls_of_every_row():
    """Compare with the FLOPs that PyTorch counts in forwards over as many rows with hardly any attention."""
    from torch.utils.flop_counter import FlopCounterMode

    case = replace(TINY, layers=3)
    model, text = case.model().model, range(case.L)

    def layers(own):
        seen = [t + 1 for t in text] * case.B
        for of_text in own:
            seen += [t + 2 + s for t, lengths in zip(case.anchors, of_text, strict=True) for n in lengths for s in range(n)]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(len(seen), 1, dtype=torch.long))
        return counter.get_total_flops() + case.layers * 4 * case.D * sum(seen)

    head, own = 2 * case.D * case.V, case.lengths
    rollout = layers(own.tolist()) + head * int(own.sum())
    assert replace(case, what="rollout").work().flops == pytest.approx(rollout, rel=0.01)
    learned = 3 * (layers((own + 1).tolist()) + head * int(own.sum()))
    base = layers([]) + 2 * head * case.B * case.P
    assert case.work().flops == pytest.approx(rollout + learned + base, rel=0.01)


def test_rows(conditions):
    ours, theirs = BENCHMARK.compare(ROLLOUT, OURS, BASELINES[1:], conditions)
    assert ours.of_roofline and theirs.times_ours
    assert ours.note == theirs.note == f"thoughts of {float(TINIEST.lengths.float().mean()):.0f} tokens"
