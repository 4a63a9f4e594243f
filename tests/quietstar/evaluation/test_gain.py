"""The two parts of a gain, and what may be said of them."""

import random

import pytest
import torch

from quietstar.evaluation.intervals import PARTS, format_gain, mean_gains, parts_of, smaller, verdict
from quietstar.evaluation.losses import evaluate
from tests.quietstar.common import wrap

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


@pytest.mark.parametrize(
    "mixing, content, said",
    [
        (-0.4, 0.7, "what was thought helped: better than no thoughts and than another text's"),
        (0.2, -0.1, "what was thought hurt: another text's thoughts predict better"),
        (0.02, 0.0, "what was thought made no difference: another text's thoughts do as well"),
        (-0.2, 0.2, "no gain from thinking: better than another text's thoughts, but not than none"),
        (-0.28, 0.05, "thinking hurts; its own thoughts hurt less than another text's"),
        (-0.2, 0.0, "thinking hurts; its own thoughts hurt as much as another text's"),
        (0.1, -0.2, "thinking hurts; another text's thoughts predict better"),
    ],
)
def test_what_is_said(mixing, content, said):
    assert verdict(gains(mixing, content)).splitlines()[0] == said


@pytest.mark.parametrize("mixing, content, name", [(-0.4, 0.7, "gain"), (0.2, 0.1, "content"), (-0.28, 0.05, "gain")])
def test_the_headline_is_the_smaller(mixing, content, name):
    """With its interval; it can't exceed what there is to gain."""
    figures = gains(mixing, content)
    assert figures[smaller(figures)] == min(figures["gain"], figures["content"])
    assert verdict(figures).endswith(f"\nworth, the smaller of gain and content: {format_gain(figures, name, 4)}")


@pytest.mark.parametrize(
    "low, said", [(-0.1, "no gain from what was thought: a constant one"), (0.1, "what was thought helped")]
)
def test_a_constant_thought(low, said):
    assert verdict(gains(0.1, 0.2) | {"constant_low": low, "constant_high": 0.2}).startswith(said)


def test_few_texts_give_no_verdict():
    few, enough = (mean_gains(*(x + 0.01 * TEXTS[:n].roll(i) for i, x in enumerate((4, 3, 3.5)))) for n in (9, 10))
    assert verdict(few).startswith("too few texts to say what thinking does: 9, ") and "help" not in verdict(few)
    assert format_gain(few, "content", 4) in verdict(few)
    assert "helped" in verdict(enough)


def test_without_controls_nothing_is_said_of_what_was_thought():
    for mixing, said in ((0.1, "not known whether what was thought matters: "), (-0.1, "thinking hurts: ")):
        figures = {name: x for name, x in gains(mixing, 0.0).items() if name[:4] in ("gain", "text")}
        assert verdict(figures) == f"{said}no other text's thoughts were tried"


def test_help_needs_a_gain_and_harm_a_loss():
    """Whatever the intervals are."""
    generator = random.Random(0)
    said = set()
    for _ in range(5000):
        figures = {"texts": generator.randrange(8, 20)}
        for name in generator.choice([("gain",), PARTS, (*PARTS, "constant")]):
            low, high = sorted(generator.choice([-0.2, 0.0, 0.2]) + generator.gauss(0, 0.1) for _ in range(2))
            figures |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
        text = verdict(figures)
        above = [figures[f"{name}_low"] > 0 for name in ("gain", "content", "constant") if name in figures]
        below = [figures[f"{name}_high"] < 0 for name in ("gain", "content") if name in figures]
        if "help" in text:
            assert all(above) and "content" in figures and figures["texts"] >= 10, (text, figures)
        if "hurt" in text or "harm" in text:
            assert any(below), (text, figures)
        assert max(map(len, text.splitlines())) <= 80
        said.add(text.splitlines()[0])
    assert len(said) == 12  # every sentence was tried


@pytest.mark.parametrize("mixing, content, said", [(0.1, 0.0, True), (0.1, -0.05, True), (0.1, -0.2, False), (0.1, 0.2, False)])
def test_what_mixing_alone_gained_is_said(mixing, content, said):
    assert ("the gain is from mixing" in verdict(gains(mixing, content))) is said


def test_a_single_text_has_no_interval():
    figures = mean_gains(TEXTS[:1], TEXTS[1:2], TEXTS[2:3])
    assert figures["content"] is not None and figures["content_low"] is figures["content_high"] is None
    assert verdict(figures).startswith("too few texts to say")
    assert format_gain(figures, "content") == f"{figures['content']:+.3f}"
    assert format_gain({"gain": 0.5, "gain_low": -0.25, "gain_high": 1.25}, digits=2) == "+0.50 (-0.25 to +1.25)"


@pytest.mark.parametrize("seed, weight, own_better", [(0, 0.1, False), (1, 0.3, True)])
def test_an_untrained_model_is_never_helped(tiny, seed, weight, own_better):
    """On texts of its own, with the mixing weight forced: its thoughts disturb it, those of another text often even more."""
    model = tiny("llama", seed, tie_word_embeddings=True)
    ids = torch.arange(3, 61).repeat_interleave(2)[:, None]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)  # so that it goes on with what it has read
        while ids.shape[1] < 16:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].softmax(-1).multinomial(1)], 1)
    qs = wrap(model, thoughts=1, thought_tokens=3, lookahead=1)
    qs.mixing_head.register_forward_hook(lambda module, given, out: torch.full_like(out, weight))
    figures = evaluate(qs, [{"input_ids": text} for text in ids], batch_size=64)
    assert figures["gain_high"] < 0 and (figures["content_low"] > 0) is own_better
    said = verdict(figures)
    assert said.startswith("thinking hurts") and "help" not in said
