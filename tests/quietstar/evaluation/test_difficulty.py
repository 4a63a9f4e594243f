"""Gains by the base model's loss, against sums by hand."""

import math
from dataclasses import replace

import pytest
import torch

from quietstar.evaluation import difficulty
from quietstar.evaluation.losses import TokenLosses

LOSSES = TokenLosses(
    base=torch.tensor([3.0, 0.1, 2.0, 0.2, 5.0, 0.3, 1.0, 4.0], dtype=torch.float64),
    mixed=torch.tensor([2.0, 0.2, 2.5, 0.1, 1.0, 0.3, 1.0, 4.0], dtype=torch.float64),
    text=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]),
    place=torch.tensor([0, 1, 2, 3, 0, 1, 0, 1]),
)


def test_groups_by_hand(monkeypatch):
    monkeypatch.setattr(difficulty, "GROUPS", 2)
    easy, hard = difficulty.by_difficulty(LOSSES)["base"]
    assert (easy["tokens"], easy["easiest"], easy["hardest"]) == (4, 0.1, 1.0)
    assert (hard["tokens"], hard["easiest"], hard["hardest"]) == (4, 2.0, 5.0)
    assert (hard["base"], hard["mixed"], hard["gain"]) == pytest.approx((3.5, 2.375, 1.125))
    # Gains are 1 and -0.5 in text 0, 4 in text 1, 0 in text 2: sums of deviations from the mean, 1.125 per token.
    off = (0.5 - 2 * 1.125, 4 - 1.125, 0 - 1.125)
    margin = 4.302653 * math.sqrt(sum(x * x for x in off) * 3 / 2) / 4  # Student's t of three texts
    assert (hard["gain_low"], hard["gain_high"]) == pytest.approx((1.125 - margin, 1.125 + margin))
    # By the mean of both losses, the token with 2 and 2.5 comes before the one with 3 and 1.
    easy, hard = difficulty.by_difficulty(LOSSES)["mean"]
    assert (easy["tokens"], easy["easiest"], easy["hardest"]) == pytest.approx((4, 0.15, 1.0))
    assert (hard["easiest"], hard["hardest"], hard["gain"]) == pytest.approx((2.25, 4.0, 1.125))


def test_predictions_that_are_equally_good_gain_nothing_where_the_sorting_is_fair():
    """Sorted by one of two, the other seems to help on hard tokens and to hurt on easy ones. The gain is fair by the mean of
    both, the content of a thought by the loss without any, which knows neither thought."""
    generator = torch.Generator().manual_seed(3)
    difficult = 5 * torch.rand(4000, generator=generator, dtype=torch.float64)
    base, mixed, another = (difficult + torch.randn(4000, generator=generator, dtype=torch.float64) for _ in range(3))
    tenths = difficulty.by_difficulty(TokenLosses(base, mixed, torch.arange(4000) % 200, torch.arange(4000) // 200, another))
    assert tenths["base"][0]["gain_high"] < -0.5 and tenths["base"][-1]["gain_low"] > 0.5
    assert sum(group["gain_low"] < 0 < group["gain_high"] for group in tenths["mean"]) >= 8
    assert sum(group["content_low"] < 0 < group["content_high"] for group in tenths["base"]) >= 8
    assert tenths["mean"][0]["content_low"] > 0 > tenths["mean"][-1]["content_high"]
    for group in tenths["base"] + tenths["mean"]:
        assert group["gain"] == pytest.approx(group["mixing"] + group["content"])


def test_interval_covers_the_gain_when_texts_differ():
    """Tokens of a text share a gain, so an interval over tokens would contain the mean, 0.2, far too rarely."""
    generator, hits = torch.Generator().manual_seed(1), 0
    text, place = torch.arange(40).repeat_interleave(25), torch.arange(25).repeat(40)
    for _ in range(200):
        gain = 0.2 + torch.randn(40, generator=generator).double()[text]
        group = difficulty.gain_of(TokenLosses(gain, torch.zeros(1000).double(), text, place), torch.arange(1000))
        hits += group["gain_low"] <= 0.2 <= group["gain_high"]
    assert 178 <= hits <= 199


@pytest.mark.parametrize("another", [None, LOSSES.mixed.flip(0)], ids=["gain alone", "with its content"])
def test_text_and_picture(tmp_path, monkeypatch, another):
    monkeypatch.setattr(difficulty, "GROUPS", 3)
    groups = difficulty.by_difficulty(replace(LOSSES, another=another))
    lines = difficulty.difficulty_text(groups).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) <= 84  # 80 if it were not 27 nats
    hardest = lines[4].split()
    assert hardest[:5] == ["4.000", "to", "5.000", "+2.000", "(-23.412"]  # Student's t of two texts
    assert hardest[7:8] == ([] if another is None else [f"{groups['base'][2]['content']:+.3f}"])
    assert ("content" in lines[1]) is (another is not None) and "content" not in lines[5]
    difficulty.draw(groups, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
