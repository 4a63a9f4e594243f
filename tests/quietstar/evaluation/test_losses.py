"""Evaluation against each text by itself, by hand, and what it must not change."""

import pytest
import torch

from quietstar import QuietStar
from quietstar.evaluation.losses import evaluate, token_losses
from tests.quietstar.common import texts_of, wrap

LENGTHS = (9, 12, 7, 12, 5)


@pytest.fixture(params=["official", "paper"])
def qs(tiny, request):
    return wrap(tiny("llama"), spread=0.2, thoughts=2, thought_tokens=3, lookahead=3, preset=request.param)


@torch.no_grad()
def by_hand(qs, examples):
    """Means over each text, from a separate forward with all N thoughts and J targets: without a thought, with its own, and
    with those of the text two further on."""
    outs = [qs.eval()(**{name: x[None] for name, x in example.items()}) for example in examples]
    base = torch.stack([out.nll_base.double().mean() for out in outs])
    mixed = torch.stack([out.nll_mix[0, :-1, 0, 0].double().mean() for out in outs])
    another = []
    for i, example in enumerate(examples):
        thoughts = outs[(i + 2) % len(outs)].thought_ids
        thoughts = thoughts[:, torch.arange(len(example["input_ids"])) % thoughts.shape[1]]
        out = qs(example["input_ids"][None], thought_ids=thoughts)
        another.append(out.nll_mix[0, :-1, 0, 0].double().mean())
    return base, mixed, torch.stack(another)


def close(figures, want):
    assert {name: figures[name] for name in want} == pytest.approx({name: float(x) for name, x in want.items()}, abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_means_and_intervals(qs, batch_size):
    base, mixed, another = by_hand(qs, texts_of(LENGTHS))
    figures = evaluate(qs, texts_of(LENGTHS), batch_size)
    want = {"base": base.mean(), "mixed": mixed.mean(), "another": another.mean()}
    for name, values in {"gain": base - mixed, "mixing": base - another, "content": another - mixed}.items():
        margin = 2.776445 * values.std() / len(values) ** 0.5  # Student's t of five texts
        want |= {name: values.mean(), f"{name}_low": values.mean() - margin, f"{name}_high": values.mean() + margin}
    close(figures, want)
    assert figures["texts"] == 5 and figures["tokens"] == sum(LENGTHS) - 5
    assert figures.keys() == want.keys() | {"texts", "tokens", "leak_rate", "thought_length"}
    assert (
        figures["gain"] == pytest.approx(figures["mixing"] + figures["content"], abs=1e-12) and abs(figures["content"]) > 1e-4
    )


def test_without_controls(qs, monkeypatch):
    """The same to the last bit, with half the forwards; thoughts are sampled once either way."""
    calls, forward, sample = [], QuietStar.forward, QuietStar.sample
    monkeypatch.setattr(QuietStar, "forward", lambda *args, **options: calls.append("forward") or forward(*args, **options))
    monkeypatch.setattr(QuietStar, "sample", lambda *args, **options: calls.append("sample") or sample(*args, **options))
    figures = evaluate(qs, texts_of(LENGTHS), controls=False)
    assert calls == ["forward", "sample"]
    whole = evaluate(qs, texts_of(LENGTHS))
    assert calls[2:] == ["forward", "sample", "forward"]
    assert figures == {name: whole[name] for name in figures} and "content" not in figures


def test_another_texts_thoughts_in_packed_documents(qs):
    """Of another row, whose documents are others."""
    examples = [{**x, "document_ids": (torch.arange(len(x["input_ids"])) >= 4).long()} for x in texts_of(LENGTHS)[:2]]
    with torch.no_grad():
        one, other = [qs.eval()(**{name: x[None] for name, x in example.items()}) for example in examples]
        out = qs(**{name: x[None] for name, x in examples[0].items()}, thought_ids=other.thought_ids[:, :9])
    losses = token_losses(qs, examples)
    predicted = [0, 1, 2, 4, 5, 6, 7]  # position 3 ends its document
    assert losses.place[losses.text == 0].tolist() == predicted
    torch.testing.assert_close(losses.another[losses.text == 0], out.nll_mix[0, predicted, 0, 0].double(), atol=1e-5, rtol=0)
    assert not torch.allclose(losses.another, losses.mixed, atol=1e-3)


def test_texts_with_nothing_to_predict_are_left_out(qs):
    examples = texts_of(LENGTHS)
    examples[1]["labels"] = torch.full_like(examples[1]["input_ids"], -100)
    for i in (0, 2, 3, 4):
        examples[i]["labels"] = examples[i]["input_ids"]
    figures = evaluate(qs, examples)
    base, mixed, _ = by_hand(qs, [example for i, example in enumerate(examples) if i != 1])
    assert figures["texts"] == 4 and figures["tokens"] == sum(LENGTHS) - 5 - (LENGTHS[1] - 1)
    assert (figures["base"], figures["mixed"]) == pytest.approx((float(base.mean()), float(mixed.mean())), abs=1e-5)


def test_only_the_anchors_and_their_own_document_count(qs):
    examples = texts_of(LENGTHS)[:2]
    for example in examples:
        example["anchors"] = torch.tensor([1, 3, 4, -1])
        example["document_ids"] = (torch.arange(len(example["input_ids"])) >= 4).long()
    figures = evaluate(qs, examples)
    with torch.no_grad():
        outs = [qs.eval()(**{name: x[None] for name, x in example.items()}) for example in examples]
    # Position 3 ends its document, so nothing is predicted there.
    base = [out.nll_base[0, [1, 4]].mean() for out in outs]
    mixed = [out.nll_mix[0, [0, 2], 0, 0].mean() for out in outs]
    assert figures["tokens"] == 4
    assert figures["base"] == pytest.approx(float(sum(base)) / 2, abs=1e-5)
    assert figures["mixed"] == pytest.approx(float(sum(mixed)) / 2, abs=1e-5)


def test_it_leaves_model_mode_and_generator_alone(qs):
    qs.train()
    config, state = qs.thought_config, torch.get_rng_state()
    evaluate(qs, texts_of(LENGTHS))
    assert qs.thought_config is config and qs.training and qs.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in qs.parameters())
