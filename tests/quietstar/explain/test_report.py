"""Explain against the wrapper's own forward, and its likeliest tokens against the model run one row after another."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.explain import report as explain
from quietstar.explain.page import SAME

TEXT = 'If é < 3:\n  "go"'
PRESETS = ["official", "paper"]


def byte_tokenizer():
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def wrap(model, **changes):
    qs = QuietStar(model, ThoughtConfig(**{"thought_tokens": 3, "lookahead": 2} | changes), byte_tokenizer(), verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 0.5, generator=torch.Generator().manual_seed(1))
    return qs.eval()


@pytest.fixture(params=PRESETS)
def qs(tiny, request):
    return wrap(tiny("llama", vocab_size=257), preset=request.param)


def ids_of(qs, text=TEXT):
    return qs.tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("rows", [2**13, 20], ids=["at once", "in parts"])
def test_values_are_those_of_the_forward(qs, rows, monkeypatch):
    monkeypatch.setattr(explain, "ROWS", rows)
    tokens = qs.explain(TEXT).tokens
    ids = ids_of(qs)
    with torch.no_grad():
        out = qs(ids)
    assert [token.id for token in tokens] == ids[0].tolist() and len(tokens) == len(TEXT.encode())
    first = tokens[0]
    assert {first.base, first.mixed, first.another, first.gain, first.mixing, first.content} == {None}
    assert first.thoughts == first.top == []
    for t, token in enumerate(tokens[1:]):
        (thought,) = token.thoughts
        assert token.base == pytest.approx(float(out.nll_base[0, t]), abs=1e-5)
        assert token.mixed == thought.mixed == pytest.approx(float(out.nll_mix[0, t, 0, 0]), abs=1e-5)
        assert token.gain == token.base - token.mixed
        assert thought.weight == pytest.approx(float(out.weight[0, t, 0, 0]), abs=1e-5)
        assert thought.ids == out.thought_ids[0, t, 0].tolist()
        assert thought.text == qs.tokenizer.decode(thought.ids)


@pytest.mark.parametrize("rows", [2**13, 20], ids=["at once", "in parts"])
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
@pytest.mark.parametrize("other", [None, "Another text", "A text that is longer than the one explained"])
def test_another_texts_thoughts_at_the_same_places(qs, rows, seed, other, monkeypatch):
    """Without another text, those of the text itself from half of it further on."""
    monkeypatch.setattr(explain, "ROWS", rows)
    report, ids = qs.explain(TEXT, seed, other), ids_of(qs)
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


@pytest.mark.parametrize("rows", [2**13, 20], ids=["at once", "in parts"])
def test_several_sampled_thoughts(qs, rows, monkeypatch):
    monkeypatch.setattr(explain, "ROWS", rows)
    report, ids = qs.explain(TEXT, seed=5), ids_of(qs)
    thought_ids = qs.think(ids, seed=5, greedy=False).thought_ids
    with torch.no_grad():
        out = qs(ids, thought_ids=thought_ids)
    assert report.settings["seed"] == 5 and report.settings["thoughts"] == 2
    for t, token in enumerate(report.tokens[1:]):
        assert [thought.ids for thought in token.thoughts] == thought_ids[0, t].tolist()
        assert [thought.mixed for thought in token.thoughts] == pytest.approx(out.nll_mix[0, t, :, 0].tolist(), abs=1e-5)
        assert token.mixed == pytest.approx(float(out.nll_mix[0, t, :, 0].mean()), abs=1e-5)
    assert thought_ids[0, :, 0].ne(thought_ids[0, :, 1]).any()


@torch.no_grad()
def row_after_row(qs, prefix, thought):
    """Probabilities [V] after ``prefix`` without and with the thought, from ordinary forwards of the model."""
    embed = qs.model.get_input_embeddings()
    scale = qs.thought_config.embedding_scale
    start, end = (scale * x[None] for x in (qs.start_embedding, qs.end_embedding))
    rows = torch.cat([embed(torch.tensor(prefix)), start, embed(torch.tensor(thought)), end])
    hidden = qs.model.model(inputs_embeds=rows[None]).last_hidden_state[0]
    h_base, h_thought = hidden[len(prefix) - 1], hidden[-1]
    weight = qs.mixing_head(torch.cat([h_base, h_thought]))
    if qs.thought_config.mixing == "logits":
        mixed = qs.model.lm_head((1 - weight) * h_base + weight * h_thought).softmax(-1)
    else:
        weight = weight.sigmoid()
        base, own = (qs.model.lm_head(h).log_softmax(-1) for h in (h_base, h_thought))
        mixed = ((1 - weight) * base + weight * own).exp()
    return qs.model.lm_head(h_base).softmax(-1), mixed


def test_likeliest_tokens(qs, monkeypatch):
    monkeypatch.setattr(explain, "LOGITS", 4 * 257)  # a place at a time
    tokens = qs.explain(TEXT).tokens
    ids = [token.id for token in tokens]
    for t in (0, 4, len(ids) - 2):
        token = tokens[t + 1]
        (thought,) = token.thoughts
        base, mixed = row_after_row(qs, ids[: t + 1], thought.ids)
        for shown, want in ((token.top, base), (thought.top, mixed)):
            assert len(shown) == explain.TOP
            assert [x.probability for x in shown] == pytest.approx(want.topk(explain.TOP).values.tolist(), rel=1e-3)
            assert [x.probability for x in shown] == pytest.approx([float(want[x.id]) for x in shown], rel=1e-3)
        assert token.base == pytest.approx(-float(base[token.id].log()), abs=1e-4)
        assert token.mixed == pytest.approx(-float(mixed[token.id].log()), abs=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_probabilities_and_surprise_agree_behind_any_head(tiny, name, monkeypatch):
    """With soft caps, scales and tied heads a token has the probability of its surprise."""
    monkeypatch.setattr(explain, "TOP", 257)
    for token in wrap(tiny(name, vocab_size=257)).explain(TEXT).tokens[1:]:
        (thought,) = token.thoughts
        for surprise, top in ((token.base, token.top), (token.mixed, thought.top)):
            probability = {x.id: x.probability for x in top}
            assert math.exp(-surprise) == pytest.approx(probability[token.id], rel=1e-4)
            assert sum(probability.values()) == pytest.approx(1, abs=1e-4)


def test_texts_of_tokens(qs):
    tokens = qs.explain(TEXT).tokens
    assert "".join(token.text for token in tokens) == TEXT.replace("é", "⟨C3⟩é")


def test_summary(qs):
    report = qs.explain(TEXT)
    values = {
        name: torch.tensor([getattr(token, name) for token in report.tokens[1:]], dtype=torch.float64)
        for name in ("base", "mixed", "another", "gain", "mixing", "content")
    }
    want = {"tokens": len(values["gain"])} | {name: float(x.mean()) for name, x in values.items()}
    for name in ("gain", "mixing", "content"):
        margin = float(1.96 * values[name].std() / len(values[name]) ** 0.5)
        want |= {f"{name}_low": want[name] - margin, f"{name}_high": want[name] + margin}
    helped, hurt = values["content"] >= SAME, values["content"] < -SAME
    want |= {"helped": float(helped.double().mean()), "hurt": float(hurt.double().mean())}
    assert report.summary == pytest.approx(want)
    assert 0 < report.summary["hurt"] and set(report.summary) == set(want)


def test_to_dict(qs):
    values = qs.explain(TEXT, seed=1).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert list(values) == ["format", "model", "settings", "summary", "tokens"]
    assert values["model"] == {
        "class": "LlamaForCausalLM",
        "model_type": "llama",
        "name": "",
        "parameters": qs.model.num_parameters(),
        "dtype": "float32",
    }
    config = qs.thought_config
    expected = {"preset": config.preset, "mixing": config.mixing, "thoughts": 2, "thought_tokens": 3, "seed": 1}
    expected["another"] = None
    assert values["settings"] == expected
    token = values["tokens"][1]
    assert list(token) == ["id", "text", "base", "mixed", "another", "gain", "mixing", "content", "thoughts", "top"]
    assert list(token["thoughts"][0]) == ["ids", "tokens", "text", "weight", "mixed", "top"]
    assert list(token["top"][0]) == ["id", "text", "probability"]


def test_ids_that_the_tokenizer_does_not_know(tiny):
    qs = wrap(tiny("llama", vocab_size=257))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    qs.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokens = qs.explain("a b c a").tokens
    assert {x.text for token in tokens for x in token.top} - {"a", "b", "c"} <= {f"⟨id {i}⟩" for i in range(3, 257)}


def test_it_leaves_model_mode_and_generator_alone(qs):
    qs.train()
    config, state = qs.thought_config, torch.get_rng_state()
    first = qs.explain(TEXT)
    assert qs.thought_config is config and qs.training and qs.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first == qs.explain(TEXT)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least 3 tokens, got 0"),
        ("ab", "at least 3 tokens, got 2"),
        (None, "text must be a str, got NoneType"),
        (["a text"], "text must be a str, got list"),
        ("abc\ud83d", "character 3 is half of a surrogate pair"),
        ("a" * 126, "its 126 tokens and thoughts need 130 positions, and LlamaForCausalLM has 128"),
    ],
)
def test_a_bad_text_is_one_sentence(qs, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        qs.explain(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_longest_text(tiny, name):
    qs = wrap(tiny(name, vocab_size=257))
    assert len(qs.explain("a" * 124).tokens) == 124
    with pytest.raises(ValueError, match="125 tokens and thoughts need 129 positions"):
        qs.explain("a" * 125)


@pytest.mark.parametrize("other, message", [("ab", "another must have at least 3 tokens, got 2"), (3, "another must be a str")])
def test_a_bad_control(qs, other, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        qs.explain(TEXT, another=other)


def test_no_tokenizer(tiny):
    with pytest.raises(ValueError, match="explain needs a tokenizer"):
        QuietStar(tiny("llama"), verify=False).explain(TEXT)


def test_a_tokenizer_of_another_vocabulary(tiny):
    with pytest.raises(ValueError, match="the tokenizer is of another model: it gives id 90, and the vocabulary has 61 tokens"):
        wrap(tiny("llama")).explain("xyz")


def test_a_text_that_holds_the_start_id(tiny):
    qs = wrap(tiny("llama", vocab_size=257), start_token_id=0)
    with pytest.raises(ValueError, match="must not hold the start-of-thought id 0"):
        qs.explain("abc<end>")


def test_losses_that_are_not_finite(qs):
    with torch.no_grad():
        qs.model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        qs.explain(TEXT)


def test_save(qs, tmp_path):
    report = qs.explain(TEXT)
    report.save(tmp_path / "page.html")
    report.save(str(tmp_path / "numbers.json"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html
    assert json.loads((tmp_path / "numbers.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "page.html"]


def test_a_failed_save_leaves_the_old_page(qs, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(explain.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        qs.explain(TEXT).save(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and (tmp_path / "page.html").read_text() == "old"


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """``command(...)``: exit code, what was printed, lines on stderr; in a folder with a checkpoint and a text."""
    monkeypatch.chdir(tmp_path)
    wrap(tiny("llama", vocab_size=257)).save_pretrained("model")
    (tmp_path / "text.txt").write_text("\ufeff" + TEXT, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    capsys.readouterr()  # the progress bar of saving

    def run(*arguments):
        code = cli.main(["explain", "--model=model", *arguments])
        return code, *(text.splitlines() for text in capsys.readouterr())

    return run


def test_command(command, tmp_path):
    report = QuietStar.from_pretrained("model").explain(TEXT)
    code, out, err = command(TEXT, "--out", "page.html", "page.json")
    assert code == 0, err
    assert f"{report.summary['base']:.4f} without thoughts" in out[0] and out[-1] == "wrote page.html and page.json"
    assert [line.split()[-4] for line in out[1:4]] == [f"{report.summary[name]:+.4f}" for name in ("gain", "mixing", "content")]
    assert json.loads((tmp_path / "page.json").read_text()) == report.to_dict()
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html
    assert command(TEXT, "--another=Another text", "--out=page.json")[0] == 0
    assert json.loads((tmp_path / "page.json").read_text())["settings"]["another"] == "Another text"
    assert command("--file=text.txt", "--seed=3")[0] == 0
    assert (tmp_path / "explain.html").read_text(encoding="utf-8") == QuietStar.from_pretrained("model").explain(TEXT, 3).html


def test_help_of_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["explain", "--help"])
    assert end.value.code == 0 and "where the name ends in .json" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], cli.DATA, "a text or --file"),
        ([TEXT, "--file=text.txt"], cli.DATA, "a text or --file, one of the two"),
        (["--file=no.txt"], cli.DATA, "no.txt: No such file"),
        (["--file=text.txt", "--out", "page.html", "./text.txt"], cli.USAGE, "--out must be another file than text.txt"),
        (["--file=latin.txt"], cli.DATA, "latin.txt: byte 3, in line 1, is not UTF-8"),
        (["a" * 200], cli.DATA, "200 tokens and thoughts need 204 positions"),
        ([TEXT, "--out=nowhere/page.html"], cli.USAGE, "--out must be a file in an existing folder, got nowhere/page.html"),
    ],
)
def test_bad_input_of_the_command(command, arguments, code, message):
    got, _, err = command(*arguments)
    assert got == code and len(err) == 1 and message in err[0], err
