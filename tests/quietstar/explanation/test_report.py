"""Explain against the wrapper's own forward, and its likeliest tokens against the model run one row after another."""

import json
import math

import pytest
import torch

from quietstar import QuietStar, explain
from quietstar.cli import main as cli
from quietstar.evaluation.intervals import mean_interval
from quietstar.explanation import report as report_module
from quietstar.explanation.page import SAME
from tests.quietstar.common import wrap
from tests.quietstar.conftest import make_byte_tokenizer

TEXT = 'If é < 3:\n  "go"'


def thinking(model, **changes):
    return wrap(model, make_byte_tokenizer(), **{"thought_tokens": 3, "lookahead": 2} | changes).eval()


@pytest.fixture
def qs(tiny, request):
    """Of the preset official, unless a test asks for another."""
    return thinking(tiny("llama", vocab_size=257), preset=getattr(request, "param", "official"))


def ids_of(qs, text=TEXT):
    return qs.tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("qs", ["official", "paper"], indirect=True)
@pytest.mark.parametrize("rows", [2**13, 20], ids=["at once", "in parts"])
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
def test_values_are_those_of_the_forward(qs, rows, seed, monkeypatch):
    """Of one greedy thought, or of two that were sampled."""
    monkeypatch.setattr(report_module, "ROWS", rows)
    report, ids = explain(qs, TEXT, seed), ids_of(qs)
    tokens, count = report.tokens, 1 if seed is None else 2
    thought_ids = qs.think(ids, seed=seed, greedy=seed is None).thought_ids
    with torch.no_grad():
        out = qs(ids, thought_ids=thought_ids)
    assert (report.settings["seed"], report.settings["thoughts"]) == (seed, count)
    assert [token.id for token in tokens] == ids[0].tolist() and len(tokens) == len(TEXT.encode())
    first = tokens[0]
    assert {first.base, first.mixed, first.another, first.gain, first.mixing, first.content} == {None}
    assert first.thoughts == first.top == []
    for t, token in enumerate(tokens[1:]):
        assert token.base == pytest.approx(float(out.nll_base[0, t]), abs=1e-5)
        assert token.mixed == pytest.approx(float(out.nll_mix[0, t, :, 0].mean()), abs=1e-5)
        assert token.gain == token.base - token.mixed and len(token.thoughts) == count
        for n, thought in enumerate(token.thoughts):
            assert thought.mixed == pytest.approx(float(out.nll_mix[0, t, n, 0]), abs=1e-5)
            assert thought.weight == pytest.approx(float(out.weight[0, t, n, 0]), abs=1e-5)
            assert thought.ids == thought_ids[0, t, n].tolist() and thought.text == qs.tokenizer.decode(thought.ids)
    assert bool(thought_ids[0, :, 0].ne(thought_ids[0, :, 1]).any()) == (count == 2)


@pytest.mark.parametrize("rows", [2**13, 20], ids=["at once", "in parts"])
@pytest.mark.parametrize("seed, other", [(None, None), (5, "Another text"), (None, "A text longer than the one explained")])
def test_another_texts_thoughts_at_the_same_places(qs, rows, seed, other, monkeypatch):
    """Without another text, those of the text itself from half of it further on."""
    monkeypatch.setattr(report_module, "ROWS", rows)
    report, ids = explain(qs, TEXT, seed, other), ids_of(qs)
    P = ids.shape[1] - 1
    sequence_ids = torch.tensor([0 if other is None else 1])
    thoughts = qs.think(ids_of(qs, other or TEXT), seed=seed or 0, greedy=seed is None, sequence_ids=sequence_ids).thought_ids
    thoughts = thoughts[:, :-1]  # the last place predicts nothing
    taken = (torch.arange(P + 1) + (0 if other else P // 2)) % thoughts.shape[1]
    with torch.no_grad():
        out = qs(ids, thought_ids=thoughts[:, taken])
    for t, token in enumerate(report.tokens[1:]):
        assert token.another == pytest.approx(float(out.nll_mix[0, t, :, 0].mean()), abs=1e-5)
        assert (token.mixing, token.content) == (token.base - token.another, token.another - token.mixed)
        assert token.gain == pytest.approx(token.mixing + token.content)
    assert report.settings["another"] == other
    assert max(abs(token.content) for token in report.tokens[1:]) > 0.01


@pytest.mark.parametrize("name, preset", [("gemma2", "official"), ("granite", "official"), ("cohere", "paper")])
def test_probabilities_and_surprise_agree_behind_any_head(tiny, name, preset, monkeypatch):
    """With soft caps, scales and tied heads a token has the probability of its surprise; the paper's don't add up to 1."""
    monkeypatch.setattr(report_module, "TOP", 257)
    for token in explain(thinking(tiny(name, vocab_size=257), preset=preset), TEXT).tokens[1:]:
        (thought,) = token.thoughts
        for surprise, top in ((token.base, token.top), (token.mixed, thought.top)):
            probability = {x.id: x.probability for x in top}
            assert math.exp(-surprise) == pytest.approx(probability[token.id], rel=1e-4)
            assert sum(probability.values()) == pytest.approx(1, abs=1e-4) or (preset == "paper" and top is thought.top)


def test_summary(qs):
    report = explain(qs, TEXT)
    values = {
        name: torch.tensor([getattr(token, name) for token in report.tokens[1:]], dtype=torch.float64)
        for name in ("base", "mixed", "another", "gain", "mixing", "content")
    }
    want = {"tokens": len(values["gain"])} | {name: float(x.mean()) for name, x in values.items()}
    for name in ("gain", "mixing", "content"):
        _, low, high = mean_interval(values[name].tolist())
        want |= {f"{name}_low": low, f"{name}_high": high}
    helped, hurt = (values["gain"] >= SAME) & (values["content"] >= SAME), values["gain"] < -SAME
    want |= {"helped": float(helped.double().mean()), "hurt": float(hurt.double().mean()), "leaks": 0.0}
    assert report.summary == pytest.approx(want)
    assert 0 < report.summary["hurt"] and set(report.summary) == set(want)


def test_it_leaves_model_mode_and_generator_alone(qs):
    qs.train()
    config, state = qs.thought_config, torch.get_rng_state()
    first = explain(qs, TEXT)
    assert qs.thought_config is config and qs.training and qs.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first == explain(qs, TEXT)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least 3 tokens, got 0"),
        (None, "text must be a str, got NoneType"),
        ("abc\ud83d", "character 3 is half of a surrogate pair"),
        ("a" * 126, "its 126 tokens and thoughts need 130 positions, and LlamaForCausalLM has 128"),
    ],
)
def test_a_bad_text_is_one_sentence(qs, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        explain(qs, text)
    assert "\n" not in str(caught.value)


def test_save(qs, tmp_path):
    report = explain(qs, TEXT)
    report.save(tmp_path / "page.html")
    report.save(str(tmp_path / "numbers.json"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html
    assert json.loads((tmp_path / "numbers.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "page.html"]


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """``command(...)``: exit code, what was printed, lines on stderr; in a folder with a checkpoint and a text."""
    monkeypatch.chdir(tmp_path)
    thinking(tiny("llama", vocab_size=257)).save_pretrained("model")
    (tmp_path / "text.txt").write_text("\ufeff" + TEXT, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    capsys.readouterr()  # the progress bar of saving

    def run(*arguments):
        code = cli.main(["explain", "--model=model", *arguments])
        return code, *(text.splitlines() for text in capsys.readouterr())

    return run


def test_command(command, tmp_path):
    report = explain(QuietStar.from_pretrained("model"), TEXT)
    code, out, err = command(TEXT, "--out", "page.html", "page.json")
    assert code == 0, err
    assert f"{report.summary['base']:.4f} without thoughts" in out[0] and out[-1] == "wrote page.html and page.json"
    assert [line.split()[-4] for line in out[1:4]] == [f"{report.summary[name]:+.4f}" for name in ("gain", "mixing", "content")]
    assert json.loads((tmp_path / "page.json").read_text()) == report.to_dict()
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html
    assert command(TEXT, "--another=Another text", "--out=page.json")[0] == 0
    assert json.loads((tmp_path / "page.json").read_text())["settings"]["another"] == "Another text"
    assert command("--file=text.txt", "--seed=3")[0] == 0
    assert (tmp_path / "explain.html").read_text(encoding="utf-8") == explain(QuietStar.from_pretrained("model"), TEXT, 3).html


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], cli.DATA, "a text or --file"),
        (["--file=latin.txt"], cli.DATA, "latin.txt: byte 3, in line 1, is not UTF-8"),
        (["a" * 200], cli.DATA, "200 tokens and thoughts need 204 positions"),
        ([TEXT, "--out=nowhere/page.html"], cli.USAGE, "--out must be a file in an existing folder, got nowhere/page.html"),
    ],
)
def test_bad_input_of_the_command(command, arguments, code, message):
    got, _, err = command(*arguments)
    assert got == code and len(err) == 1 and message in err[0], err


def test_a_mixture_that_is_not_finite(qs):
    torch.nn.init.constant_(qs.mixing_head[4].weight, torch.nan)
    with pytest.raises(ValueError, match="not finite at position 0"):
        explain(qs, TEXT)
