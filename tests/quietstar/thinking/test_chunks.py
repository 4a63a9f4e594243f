"""Anchors in chunks: the numbers of the whole step, in memory that does not grow with anchors and thoughts."""

from dataclasses import replace

import pytest
import torch

from quietstar.cli.main import COMMANDS
from quietstar.cli.options import parse
from quietstar.thinking import chunks
from tests.quietstar.common import Peak, assert_same_gradients, step, text

T = 3


def step_in(chunk, qs, **batch):
    """The output of a step and every gradient."""
    qs.anchor_chunk = chunk
    return step(qs, **batch)


def assert_same(qs, batch, chunk, names=("loss", "loss_ce", "policy_loss", "nll_base", "nll_mix", "weight", "reward")):
    (whole, want), (cut, got) = step_in(None, qs, **batch), step_in(chunk, qs, **batch)
    assert torch.equal(whole.thought_ids, cut.thought_ids)
    for name in names:
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)
    assert cut.reward.any()
    assert_same_gradients(got, want)


def batches():
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :4] = padding[1, 9:] = 0
    labels = text()
    labels[0, 6] = -100
    return {
        "every position": {},
        "padding and labels": {"attention_mask": padding, "labels": labels},
        "documents": {"document_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 12])},
        "anchors": {"anchors": torch.tensor([[1, 4, 5, 8], [6, -1, -1, -1]])},
        "lengths": {"thought_lengths": torch.arange(48).view(2, 12, 2) % (T + 1)},
    }


@pytest.mark.parametrize("what", batches())
def test_chunks_change_nothing(thinker, what):
    """Grouped key heads and a window (Mistral); 5 and 3 divide no number of anchors here."""
    assert_same(thinker("mistral"), {"input_ids": text(), "seed": 4, **batches()[what]}, 3 if what == "anchors" else 5)


SAMPLED = {"advantage": "leave_one_out", "kl_weight": 0.1, "entropy_weight": 0.1, "policy_temperature": 1.0}
OTHERS = {
    "soft caps": ("gemma2", {"preset": "paper"}),
    "sinks and experts": ("gpt_oss", {}),
    "divergence and entropy": ("llama", SAMPLED),
    "frozen base model": ("llama", {"base_model": "frozen", "ratio_clip": 0.2}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_and_objectives(thinker, case):
    name, fields = OTHERS[case]
    assert_same(thinker(name, **fields), {"input_ids": text(), "seed": 4}, 5)


def test_given_thoughts_and_counts_of_a_larger_batch(thinker):
    qs = thinker()
    ids, mask = text(4), torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = mask[3, :5] = 0
    thoughts = qs.think(ids, mask, seed=0).thought_ids
    counts = qs.count_targets(ids[:1], mask[:1]) + qs.count_targets(ids[1:], mask[1:])
    whole, want = step_in(None, qs, input_ids=ids, attention_mask=mask, thought_ids=thoughts)
    total, got = 0.0, {name: torch.zeros_like(x) for name, x in want.items()}
    for part in (slice(0, 1), slice(1, 4)):
        given = {"attention_mask": mask[part], "thought_ids": thoughts[part], "counts": counts}
        out, grads = step_in(5, qs, input_ids=ids[part], **given)
        total += out.loss.detach()
        got = {name: got[name] + grads[name] for name in got}
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(got, want)


def test_with_checkpointed_layers(thinker):
    """The text's layers are computed again in the backward, after every chunk has been."""
    qs = thinker()
    _, want = step_in(None, qs, input_ids=text(), seed=4)
    qs.gradient_checkpointing_enable()
    _, got = step_in(5, qs, input_ids=text(), seed=4)
    assert all(layer.gradient_checkpointing for layer in qs.model.model.layers)
    assert_same_gradients(got, want)
    qs.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        step_in(5, qs, input_ids=text(), seed=4)


def test_with_autocast_and_a_scaled_loss(thinker):
    """As a training loop with mixed precision does it: the backward runs outside of autocast."""
    qs = thinker()
    thoughts = qs.think(text(), seed=0).thought_ids
    gradients = []
    for qs.anchor_chunk in (None, 5):
        qs.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = qs(text(), thought_ids=thoughts)
        (out.loss * 1024).backward()
        gradients.append(torch.cat([p.grad.flatten() / 1024 for p in qs.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 0.02 * gradients[0].norm()


def peak(qs, chunk, ids, thoughts=2, **options):
    qs.thought_config = replace(qs.thought_config, thoughts=thoughts)
    qs.anchor_chunk = chunk
    qs.zero_grad()
    with Peak() as measured:
        qs(ids, seed=0, **options).loss.backward()
    qs.zero_grad()
    return measured.bytes


@pytest.mark.long
def test_memory_is_flat_in_anchors_and_thoughts(thinker):
    """6 anchors at a time: three times as many cost next to nothing. Half the anchors at a time for twice the thoughts."""
    qs = thinker()
    ids = text(1, 36)
    few, many = (peak(qs, 6, ids, anchors=torch.arange(0, 36, 36 // count)[None]) for count in (12, 36))
    assert many < 1.03 * few
    assert peak(qs, None, ids) > 2 * many

    ids = text(1, 24)
    two, eight = peak(qs, 8, ids), peak(qs, 2, ids, thoughts=8)
    assert eight < 1.1 * two
    assert peak(qs, None, ids, thoughts=8) > 3 * eight


FREE = (4, 10, 1000)  # MiB


@pytest.mark.long
def test_auto_takes_what_memory_has_room_for(thinker, monkeypatch):
    assert 2**20 < chunks.free_memory(torch.device("cpu")) < 2**50
    qs = thinker()
    ids = text(1, 96)
    sizes = []
    held = sum(p.nbytes for p in qs.parameters())
    layout = qs.thinker.layout(ids)
    for megabytes in FREE:
        monkeypatch.setattr(chunks, "free_memory", lambda device, size=megabytes: size * 2**20)
        qs.anchor_chunk = "auto"
        sizes.append(qs.chunk_size(layout))
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == 96
    assert 0.3 * FREE[1] * 2**20 < peak(qs, sizes[1], ids) + 2 * held < FREE[1] * 2**20  # AdamW's moments come later
    qs.anchor_chunk = "auto"
    assert qs.chunk_size(layout) == 96
    monkeypatch.setattr(chunks, "free_memory", lambda device: 0)
    assert qs.chunk_size(layout) == 96  # measured once, before the first chunk
    other = qs.with_config(replace(qs.thought_config, thoughts=1))  # as an evaluation has
    assert other.chunk_size(other.thinker.layout(ids)) == 1 and qs.chunk_size(layout) == 96
    qs.anchor_chunk = "auto"
    assert qs.chunk_size(layout) == 1


def test_the_command_line_takes_a_size():
    for typed, size in (("12", 12), ("auto", "auto"), ("None", None)):
        command = parse(COMMANDS, ["train", "--model=m", "--data=d", f"--anchor-chunk={typed}"])
        assert command.train.anchor_chunk == size
