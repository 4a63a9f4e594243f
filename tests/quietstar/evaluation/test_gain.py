"""The two parts of a gain, and what may be said of them."""

import pytest
import torch

from quietstar.evaluation.intervals import format_gain, mean_gains, parts_of, verdict

TEXTS = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gains(mixing, content):
    """Of texts whose parts are these, with a little noise between the ways to predict."""
    base = 4 + TEXTS
    another = base - mixing + 0.01 * TEXTS.roll(1)
    return mean_gains(base, another - content + 0.01 * TEXTS.roll(2), another)


def test_the_parts_add_up():
    parts = parts_of(TEXTS, TEXTS.roll(1), TEXTS.roll(2))
    assert list(parts) == ["gain", "mixing", "content"]
    torch.testing.assert_close(parts["gain"], parts["mixing"] + parts["content"])
    assert list(parts_of(TEXTS, TEXTS.roll(1))) == ["gain"]
    figures = gains(0.02, 0.3)
    assert figures["gain"] == pytest.approx(figures["mixing"] + figures["content"], abs=1e-12)
    assert figures["content"] == pytest.approx(0.3, abs=0.01) and figures["content_low"] < 0.3 < figures["content_high"]


def test_helped_and_hurt_are_said_of_content_alone():
    assert verdict(gains(-0.4, 0.7)).startswith("what was thought helped: ")
    assert verdict(gains(0.1, -0.2)).startswith("what was thought hurt: ")
    none = verdict(gains(0.02, 0.0))
    assert none.startswith("what was thought made no difference: ") and "helped" not in none and "hurt" not in none


@pytest.mark.parametrize("mixing, content, said", [(0.1, 0.0, True), (0.1, -0.2, True), (0.0, 0.0, False), (0.1, 0.2, False)])
def test_what_mixing_alone_gained_is_said(mixing, content, said):
    assert ("the gain is from mixing" in verdict(gains(mixing, content))) is said


def test_a_single_text_has_no_interval():
    figures = mean_gains(TEXTS[:1], TEXTS[1:2], TEXTS[2:3])
    assert figures["content"] is not None and figures["content_low"] is figures["content_high"] is None
    assert verdict(figures).startswith("what was thought made no difference")
    assert format_gain(figures, "content") == f"{figures['content']:+.3f}"
    assert format_gain({"gain": 0.5, "gain_low": -0.25, "gain_high": 1.25}, digits=2) == "+0.50 (-0.25 to +1.25)"
