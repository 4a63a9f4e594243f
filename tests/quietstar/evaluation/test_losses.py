"""Evaluation against each text by itself, by hand, and what it must not change."""

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig
from quietstar.evaluation.losses import evaluate, summary, token_losses

CONFIG = ThoughtConfig(thoughts=2, thought_tokens=3, lookahead=3)
LENGTHS = (9, 12, 7, 12, 5)


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 61, (length,), generator=generator)} for length in LENGTHS]


@pytest.fixture(params=["official", "paper"])
def qs(tiny, request):
    config = ThoughtConfig(thoughts=2, thought_tokens=3, lookahead=3, preset=request.param)
    qs = QuietStar(tiny("llama"), config, verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    return qs


def by_hand(qs, examples):
    """Means over each text, from a separate forward with all N thoughts and J targets."""
    base, mixed = [], []
    for example in examples:
        with torch.no_grad():
            out = qs.eval()(**{name: x[None] for name, x in example.items()})
        base.append(out.nll_base.double().mean())
        mixed.append(out.nll_mix[0, :-1, 0, 0].double().mean())
    return torch.stack(base), torch.stack(mixed)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_means_and_interval(qs, batch_size):
    base, mixed = by_hand(qs, texts())
    figures = evaluate(qs, texts(), batch_size)
    gain = base - mixed
    margin = 1.96 * gain.std() / len(gain) ** 0.5
    want = {"base": base.mean(), "mixed": mixed.mean(), "gain": gain.mean()}
    want |= {"gain_low": gain.mean() - margin, "gain_high": gain.mean() + margin}
    assert {name: figures[name] for name in want} == pytest.approx({name: float(x) for name, x in want.items()}, abs=1e-5)
    assert figures["texts"] == 5 and figures["tokens"] == sum(LENGTHS) - 5


def test_the_loss_of_every_token(qs):
    losses = token_losses(qs, texts(), batch_size=2)
    assert losses.text.tolist() == [i for i, length in enumerate(LENGTHS) for _ in range(length - 1)]
    with torch.no_grad():
        outs = [qs.eval()(**{name: x[None] for name, x in example.items()}) for example in texts()]
    assert torch.allclose(losses.base, torch.cat([out.nll_base[0] for out in outs]).double(), atol=1e-5)
    assert torch.allclose(losses.mixed, torch.cat([out.nll_mix[0, :-1, 0, 0] for out in outs]).double(), atol=1e-5)
    assert summary(losses) == pytest.approx(evaluate(qs, texts()), abs=1e-6)


def test_texts_with_nothing_to_predict_are_left_out(qs):
    examples = texts()
    examples[1]["labels"] = torch.full_like(examples[1]["input_ids"], -100)
    for i in (0, 2, 3, 4):
        examples[i]["labels"] = examples[i]["input_ids"]
    figures = evaluate(qs, examples)
    base, mixed = by_hand(qs, [example for i, example in enumerate(examples) if i != 1])
    assert figures["texts"] == 4 and figures["tokens"] == sum(LENGTHS) - 5 - (LENGTHS[1] - 1)
    assert (figures["base"], figures["mixed"]) == pytest.approx((float(base.mean()), float(mixed.mean())), abs=1e-5)


def test_an_untrained_wrapper_gains_nothing(tiny):
    figures = evaluate(QuietStar(tiny("llama"), CONFIG, verify=False), texts())
    assert [abs(figures[name]) < 1e-6 for name in ("gain", "gain_low", "gain_high")] == [True] * 3


def test_only_the_anchors_and_their_own_document_count(qs):
    examples = texts()[:2]
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
    evaluate(qs, texts())
    assert qs.thought_config is config and qs.training and qs.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in qs.parameters())


@pytest.mark.parametrize("count", [0, 1])
def test_no_interval_from_one_text(qs, count):
    with pytest.raises(ValueError, match=f"needs at least 2 texts with something to predict, got {count}"):
        evaluate(qs, texts()[:count])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"examples": torch.zeros(2, 3)}, "examples must be examples by index, got a tensor"),
        ({"examples": [[1, 2, 3]]}, r"each example must be a dict with input_ids, got \[1, 2, 3\]"),
        ({"examples": [{"input_ids": [1, 2, 3]}]}, r"input_ids must be a tensor \[L\], got \[1, 2, 3\]"),
        ({"examples": [{"input_ids": torch.arange(5), "weight": 1}]}, "an example may have input_ids, .*, got 'weight'"),
    ],
)
def test_bad_arguments(qs, changes, message):
    with pytest.raises(ValueError, match=f"^evaluate: .*{message}" if "batch_size" in changes else message):
        evaluate(**{"qs": qs, "examples": texts(), **changes})
