"""The demo runs end to end in seconds and writes the files that it promises; its verdict follows from its controls."""

import json
import math

import pytest
import torch

from quietstar import QuietStar
from quietstar.evaluation.losses import evaluate


@pytest.fixture
def english(example):
    return example("english")


def test_paragraphs_are_in_one_part_only(english) -> None:
    parts = english.paragraphs(seed=0)
    assert [len(part) for part in parts[1:]] == [english.NEW, english.HELD_OUT]
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.long
def test_demo(english, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(english, "LENGTH", 32)
    monkeypatch.setattr(english, "HELD_OUT", 16)
    monkeypatch.setattr("sys.argv", ["english.py", "--seconds-lm=2", "--seconds-thoughts=1", f"--out={tmp_path}"])
    english.main()

    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {entry["phase"] for entry in entries} == {"language model", "no thoughts", "thoughts", "held_out", "gain"}
    assert all(math.isfinite(value) for entry in entries for value in entry.values() if not isinstance(value, str))
    assert QuietStar.from_pretrained(tmp_path / "checkpoint").thought_config == english.THOUGHTS
    said = capsys.readouterr().out
    assert "Thoughts on a held-out text" in said
    found = {entry["of"]: (entry["gain"], entry["low"], entry["high"]) for entry in entries if entry["phase"] == "gain"}
    assert found.keys() == english.GAINS.keys() and english.verdict(found) in said
    pytest.importorskip("matplotlib")
    assert (tmp_path / "losses.png").stat().st_size > 0


LOSSES = {"before": 4.9, "plain": 4.8, "base": 4.87, "own": 4.849, "another": 4.849, "constant": 4.849}


def with_losses(english, **changes):
    """The gains where texts have these mean losses, with a little noise between the ways."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(128, generator=generator, dtype=torch.float64)
    means = LOSSES | changes
    return english.gains({name: mean + texts + 0.01 * texts.roll(i) for i, (name, mean) in enumerate(means.items())})


def test_helped_is_said_where_every_control_is_beaten(english) -> None:
    assert "helped" in english.verdict(with_losses(english, another=4.87, constant=4.87))
    assert "hurt" in english.verdict(with_losses(english, another=4.83))
    # Every thought gains as much over none, as it did in this demo.
    found = with_losses(english)
    assert found["mixing"][1] > 0 and found["content"][1] < 0 < found["content"][2]
    said = english.verdict(found)
    assert "helped" not in said and "made no difference" in said and "the gain is from mixing" in said
    assert "from mixing" not in english.verdict(with_losses(english, base=4.83))
    # Another text's thoughts mislead, and a constant one doesn't; or all do, the own ones least.
    said = english.verdict(with_losses(english, another=4.87))
    assert "helped" not in said and "a constant one is as good" in said
    said = english.verdict(with_losses(english, base=4.8, another=4.87, constant=4.87))
    assert said.startswith("thinking hurts; its own thoughts hurt less than another text's")


def test_the_controls_are_what_they_are_called(english) -> None:
    texts = [{"input_ids": torch.randint(1, 250, (length,))} for length in (20, 32, 27)]
    tokenizer = english.train_tokenizer(["a text"])
    qs = QuietStar(english.new_model(tokenizer), english.THOUGHTS, tokenizer).eval()
    torch.nn.init.normal_(qs.mixing_head[-1].weight)
    found = evaluate(qs, texts)
    assert float(english.plain_losses(qs.model, texts).mean()) == pytest.approx(found["base"], abs=1e-5)
    losses = english.mixed_losses(qs, texts)
    assert float(losses["own"].mean()) == pytest.approx(found["mixed"], abs=1e-5)
    assert all(len(values) == 3 for values in losses.values())
    assert (losses["own"] - losses["another"]).abs().min() > 1e-3 and (losses["own"] - losses["constant"]).abs().min() > 1e-3
