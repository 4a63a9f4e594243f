"""Samplers are checked by their log-probabilities and the mean of many samples, losses by value and gradients."""

import sys

import pytest
import torch

from benchmarks import bench_linear_logprob, bench_sample_token
from benchmarks.baselines import head
from benchmarks.baselines.head import LOSSES, SAMPLERS
from benchmarks.bench_linear_logprob import LogprobCase
from benchmarks.bench_sample_token import SampleCase
from benchmarks.harness.case import Wrong
from quietstar_kernels.cpu import products

SAMPLE = SampleCase(R=256, D=16, V=200)
LOSS = LogprobCase(R=40, D=16, V=200, what="forward+backward")


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(products, "library", lambda: "onednn")
    monkeypatch.setattr(products, "LEAST", 1)


def drawn(choose):
    def sample(hidden, weight):
        logp = (hidden @ weight.T).log_softmax(-1)
        ids = choose(logp)
        return ids, logp.gather(1, ids[:, None])[:, 0]

    return sample


def flatter(logp):
    return torch.multinomial((logp / 1.8).softmax(-1), 1)[:, 0]


@pytest.mark.parametrize("candidate", [bench_sample_token.OURS, *SAMPLERS], ids=lambda candidate: candidate.name)
def test_samplers_are_right(candidate, onednn):
    if reason := candidate.why_not(SAMPLE):
        assert candidate.package == "vllm"
        pytest.skip(reason)
    SAMPLE.check(candidate.prepare(SAMPLE))


def test_a_sampler_is_taken_from_vllm_without_vllm(tmp_path, monkeypatch):
    """Its file alone, where the package can't be imported."""
    path = tmp_path / "vllm" / head.VLLM_SAMPLER
    path.parent.mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('built for another PyTorch')")
    path.write_text(
        "from vllm.triton_utils import tl, triton\nassert triton.language is tl\n"
        "def gumbel_sample(logits, rows, temperature, seed, pos, apply_temperature, is_drafting):\n"
        "    assert rows.shape == temperature.shape == seed.shape == pos.shape == logits.shape[:1] and not apply_temperature\n"
        "    p = logits.softmax(-1)\n    return (p / p.clone().exponential_()).argmax(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    SAMPLE.check(head._vllm(SAMPLE))
    assert "vllm" not in sys.modules


@pytest.mark.parametrize("choose", [lambda logp: logp.argmax(-1), lambda logp: logp.argmin(-1), flatter])
def test_a_sampler_of_another_distribution_is_refused(choose):
    """Whatever the seed."""
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(Wrong, match="standard errors"):
            SAMPLE.check(drawn(choose))


def test_wrong_log_probabilities_are_refused():
    def wrong(hidden, weight):
        ids, logprob = SAMPLERS[0].prepare(SAMPLE)(hidden, weight)
        return ids, logprob + 0.01

    with pytest.raises(Wrong, match="logprob differs"):
        SAMPLE.check(wrong)
    with pytest.raises(Wrong, match="outside the vocabulary"):
        SAMPLE.check(lambda hidden, weight: (torch.full((256,), 200), torch.zeros(256)))
    with pytest.raises(Wrong, match="logits differs"):
        SAMPLE.check(lambda hidden, weight: 1.01 * hidden @ weight.T)


@pytest.mark.parametrize(
    "candidate",
    [pytest.param(x, id=x.name, marks=[pytest.mark.long] * (x.package == "trl")) for x in (bench_linear_logprob.OURS, *LOSSES)],
)
def test_losses_are_right(candidate, onednn):
    if reason := candidate.why_not(LOSS):
        pytest.skip(reason)
    LOSS.check(candidate.prepare(LOSS))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda loss, hidden, weight: 1.01 * loss, "loss differs"),
        (lambda loss, hidden, weight: loss + 0.1 * (hidden.sum() - hidden.detach().sum()), "dhidden differs"),
        (lambda loss, hidden, weight: loss + 0.1 * (weight.sum() - weight.detach().sum()), "dweight differs"),
    ],
)
def test_wrong_losses_are_refused(wrong, message):
    right = bench_linear_logprob.ours(LOSS)
    with pytest.raises(Wrong, match=message):
        LOSS.check(lambda hidden, weight, targets: wrong(right(hidden, weight, targets), hidden, weight))
