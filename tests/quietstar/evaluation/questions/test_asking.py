"""Asking questions end to end: probabilities against the published rule, counts for crafted answers, written files."""

import json
import re
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quietstar.cli import main as cli
from quietstar.evaluation.questions import asking
from quietstar.evaluation.questions.asking import Asking, ask, prompt, scored_answers
from quietstar.evaluation.questions.reading import Question
from tests.quietstar.common import drawn_from, wrap

LETTERS = {"A": "bank", "B": "library", "C": "store"}
WHERE = Question("Where?", LETTERS, "B", "B")
MANY = Question("How many?", {}, "1004", "1,004")
FEW = Question("How few are left?", {}, "3", "3")
QUESTIONS = [MANY, WHERE, FEW]
SHORT = Asking(max_new_tokens=5)


@pytest.fixture
def qs(tiny, byte_tokenizer, request):
    """Of the preset official, unless a test asks for another."""
    model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
    return wrap(model, byte_tokenizer, thought_tokens=3, lookahead=2, preset=getattr(request, "param", "official")).eval()


def published(qs, text, think, kept, first):
    """The product in the published compute_metrics over the answer in a text; the answer's tokens start at ``first``."""
    ids, product = qs.tokenizer(text)["input_ids"], 1.0
    for j in range(first - 1, len(ids) - 1):
        if ids[j + 1] in kept:
            p = drawn_from(qs, ids[: j + 1], think).exp()
            product *= float(p[ids[j + 1]] / p[kept].sum())
    return product


@pytest.mark.parametrize("qs", ["official", "paper"], indirect=True)
def test_probability_of_bytes(qs):
    report = ask(qs, QUESTIONS, SHORT)
    letters = [qs.tokenizer.convert_tokens_to_ids(x) for x in "ABC"] + [qs.tokenizer("\n")["input_ids"][0]]
    digits = [qs.tokenizer.convert_tokens_to_ids(x) for x in "0123456789"] + letters[-1:]
    for asked, kept in zip(report.asked, (digits, letters, digits), strict=True):
        head = prompt(asked.question)
        for name, think in (("thinking", "always"), ("base", "never")):
            want = published(qs, f"{head} {asked.question.written}\n", think, kept, len(head))
            assert asked.answers[name].probability == pytest.approx(want, rel=1e-3)
    for name in ("thinking", "base"):
        p = [asked.answers[name].probability for asked in report.asked]
        assert report.figures["probability"][name]["mean"] == pytest.approx(sum(p) / 3)
    pair = report.figures["probability"]["paired"]
    assert pair["mean"] == pytest.approx(
        sum(x.answers["thinking"].probability - x.answers["base"].probability for x in report.asked) / 3
    )


def sentence_pieces():
    """Like Mistral's: texts start with a space, each digit is a token, A to C include their space, bytes are the fallback."""
    letters = "▁ABCQow:many?()bkilrystneh0123456789,-"
    entries = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(letters), "▁A", "▁B", "▁C"]
    bpe = Tokenizer(
        models.BPE(
            vocab={x: i for i, x in enumerate(entries)}, merges=[("▁", x) for x in "ABC"], unk_token="<unk>", byte_fallback=True
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def test_the_published_sets_of_tokens(tiny):
    """The published valid_letter_tokens and valid_number_tokens are Mistral's ▁A to ▁E, 0 to 9, and <0x0A>."""
    qs = wrap(tiny("llama", vocab_size=320), sentence_pieces(), thought_tokens=3, lookahead=2).eval()
    where, many, minus = scored_answers(qs, [WHERE, MANY, Question("How many?", {}, "-3", "-3")])
    name = qs.tokenizer.convert_ids_to_tokens
    assert set(name(where.allowed.tolist())) == {"▁A", "▁B", "▁C", "<0x0A>"}
    assert set(name(many.allowed.tolist())) == {*"0123456789", "<0x0A>"} == set(name(minus.allowed.tolist()))
    assert [name(where.ids[i]) for i in where.places] == ["▁B", "<0x0A>"]
    assert [name(many.ids[i]) for i in many.places] == ["1", "0", "0", "4", "<0x0A>"]
    assert [name(minus.ids[i]) for i in minus.places] == ["3", "<0x0A>"]
    assert where.ids[0] == qs.tokenizer.bos_token_id and where.places[-1] == len(where.ids) - 1


def test_greedy_answers_are_those_of_generate(qs):
    report = ask(qs, QUESTIONS, Asking(max_new_tokens=5, batch_size=3))
    for question, asked in zip(QUESTIONS, report.asked, strict=True):
        ids = qs.tokenizer(prompt(question), return_tensors="pt")["input_ids"]
        for name, generate in (("thinking", qs.generate), ("base", qs.model.generate)):
            out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
            text = qs.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert asked.answers[name].text == text.split("Q:")[0].split("\n\n\n")[0]


WRITTEN = {  # in order: greedy with thoughts, greedy without; sampled 0 to 2 with thoughts, without
    prompt(MANY): ["#### 1,004", "The answer is 1003", "1", "1004", "1004", "no", "no", "no"],
    prompt(WHERE): ["(B)", "C", "A", "C", "B", "C", "C", "B"],
    prompt(FEW): ["dunno", "The answer is 3.", "3", "4", "no", "4", "3", "4"],
}


@pytest.fixture
def crafted(qs, monkeypatch):
    """A model that writes the answers in WRITTEN, and how often it was asked."""
    calls = []

    def write(qs, prompts, max_new_tokens, stop, think, do_sample, **options):
        calls.append((think, do_sample))
        turn = sum(call == (think, do_sample) for call in calls) - 1
        column = (2 + turn + (0 if think == "always" else 3)) if do_sample else (0 if think == "always" else 1)
        return [WRITTEN[qs.tokenizer.decode(ids)][column] for ids in prompts]

    monkeypatch.setattr(asking, "continue_texts", write)
    return qs


def test_counts_by_hand(crafted, tmp_path):
    report = ask(crafted, QUESTIONS, Asking(votes=3, max_new_tokens=5))
    exact, vote = report.figures["exact"], report.figures["vote"]
    assert [x.answers["thinking"].extracted for x in report.asked] == ["1004", "B", None]
    assert [x.answers["base"].extracted for x in report.asked] == ["1003", "C", "3"]
    assert [(exact[name]["right"], exact[name]["questions"], exact[name]["unanswered"]) for name in ("thinking", "base")] == [
        (2, 3, 1),
        (1, 3, 0),
    ]
    assert [exact["paired"][name] for name in ("both", "first", "second", "neither")] == [0, 2, 1, 0]
    assert (exact["base"]["low"], exact["base"]["high"]) == pytest.approx((0.0615, 0.7923), abs=5e-5)
    assert [x.answers["thinking"].votes for x in report.asked] == [["1", "1004", "1004"], ["A", "C", "B"], ["3", "4", None]]
    assert [x.answers["thinking"].vote for x in report.asked] == ["1004", "A", "3"], "the first of equally frequent ones"
    assert [x.answers["base"].vote for x in report.asked] == [None, "C", "4"]
    assert (vote["thinking"]["right"], vote["base"]["right"], vote["base"]["unanswered"]) == (2, 0, 1)
    assert "only with thoughts: 2; only without: 1" in report.markdown

    written = report.save(tmp_path / "out.json")
    assert sorted(tmp_path.iterdir()) == written and [path.name for path in written] == ["out.json", "out.md"]
    saved = json.loads(written[0].read_text())
    assert saved["figures"] == json.loads(json.dumps(report.figures)) and len(saved["questions"]) == 3
    assert saved["questions"][2]["thinking"]["text"] == "dunno" and saved["questions"][1]["choices"] == LETTERS
    page = written[1].read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table.splitlines()]
    assert rows[2] == ["exact match", "with thoughts", "66.7 % (20.8 to 93.9)"]
    assert rows[3] == ["exact match", "without", "33.3 % (6.1 to 79.2)"] and rows[4][1:2] == ["difference"]
    assert report.table in page and max(map(len, report.table.splitlines())) <= 80
    assert "majority of 3" in page and "1 with thoughts and 0 without, of 3" in page
    assert (
        "| How many? | 1004 | 1004 | 1003 |" in page
        and "| How few are left? | 3 | - | 3 |" in page
        and "| Where? | B | B | C |" in page
    )


def test_markup_in_a_question_stays_text(crafted, monkeypatch):
    odd = Question("a | b <b>\n_c_", {}, "1004", "1,004")
    monkeypatch.setitem(WRITTEN, prompt(odd), ["1004", "3"])
    assert "| a &#124; b &#60;b&#62; &#95;c&#95; | 1004 | 1004 | 3 |" in ask(crafted, [odd], SHORT).markdown


def test_votes_are_fixed_by_the_seed(qs):
    texts = lambda seed: [  # noqa: E731
        [
            asking._generate(qs, [[40, 41], [50, 51]], "never", Asking(max_new_tokens=6, seed=seed), k, lambda n: None)
            for k in (0, 1)
        ]
    ]
    state = torch.get_rng_state()
    first = texts(0)
    assert texts(0) == first and texts(1) != first and first[0][0] != first[0][1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prefix_is_for_generation_only(qs, monkeypatch):
    seen = []
    write = lambda qs, prompts, *rest, **options: seen.append(qs.tokenizer.decode(prompts[0])) or ["" for _ in prompts]  # noqa: E731
    monkeypatch.setattr(asking, "continue_texts", write)
    plain, prefixed = (ask(qs, [FEW], Asking(answer_prefix=x, max_new_tokens=3)) for x in ("", " Let's think step by step."))
    assert seen[0] == prompt(FEW) and seen[-1] == prompt(FEW) + " Let's think step by step."
    assert plain.figures["probability"] == prefixed.figures["probability"]


def test_in_the_chat_template(qs, chat_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(asking, "continue_texts", lambda qs, prompts, n, stop, **_: seen.append((prompts[0], stop)) or ["B"])
    qs.tokenizer = chat_tokenizer
    turns = [{"role": "user", "content": "Where?\n(A) bank\n(B) library\n(C) store"}]
    ids = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    report = ask(qs, [WHERE], Asking(chat=True, max_new_tokens=3))
    assert seen == 2 * [(ids, ())] and report.figures["exact"]["base"]["right"] == 1 and "chat template" in report.markdown
    (scored,) = scored_answers(qs, [WHERE], chat=True)
    assert scored.ids == [*ids, *chat_tokenizer.convert_tokens_to_ids(["B", "<end>"])]
    assert scored.places == [len(ids), len(ids) + 1]
    assert chat_tokenizer.convert_ids_to_tokens(scored.allowed.tolist()) == ["<end>", "A", "B", "C"]


def other_tokenizer():
    words = Tokenizer(models.WordLevel({"Q": 0, "[U]": 300}, unk_token="[U]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[U]")


LONG = [FEW, Question("x" * 197, {}, "3", "3")]
OTHER = "the tokenizer belongs to another model: it gives id 300, and the vocabulary has 257 tokens"


@pytest.mark.parametrize(
    "questions, new, tokenizer, message",
    [
        ([FEW, WHERE], 5, lambda: None, "the checkpoint has no tokenizer"),
        ([FEW, WHERE], 5, other_tokenizer, OTHER),
        ([], 5, None, "there is no question"),
        (LONG, 5, None, "1 of 2 questions are too long: with 5 new tokens and a thought they need up to 212 positions"),
        ([FEW, WHERE], 120, None, "2 of 2 questions are too long: with 120 new tokens"),
    ],
)
def test_bad_input_is_reported_before_the_first_question(qs, monkeypatch, questions, new, tokenizer, message):
    qs.tokenizer = tokenizer() if tokenizer else qs.tokenizer
    for name in ("score_tokens", "continue_texts"):
        monkeypatch.setattr(asking, name, None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ask(qs, questions, Asking(max_new_tokens=new))
    assert "\n" not in str(error.value)


@pytest.fixture
def home(qs, tmp_path, monkeypatch):
    """An empty folder with a checkpoint and questions in it."""
    monkeypatch.chdir(tmp_path)
    qs.save_pretrained("model")
    rows = [{"question": f"{i} and {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command(home, capsys):
    arguments = ["ask", "--model=model", "--questions=sums.jsonl", "--limit=3", "--max-new-tokens=6", "--votes=2"]
    assert cli.main([*arguments, "--think=3.5", "--out=sums.json"]) == 0
    out = capsys.readouterr().out
    assert "3 questions" in out and "majority of 2" in out and "wrote sums.json and sums.md" in out
    saved = json.loads((home / "sums.json").read_text())
    assert [x["answer"] for x in saved["questions"]] == ["0", "2", "4"] and saved["asking"]["think"] == 3.5
    assert {x.name for x in home.iterdir()} == {"model", "sums.jsonl", "sums.json", "sums.md"}


def test_a_plain_model_is_asked_without_thoughts(home, capsys):
    options = ["--questions=sums.jsonl", "--limit=2", "--max-new-tokens=2"]
    assert cli.main(["ask", "--model=model", "--think=never", *options]) == 0
    want = json.loads((home / "ask.json").read_text())["questions"]
    (home / "model" / "quietstar.json").unlink()
    assert cli.main(["ask", "--model=model", *options]) == 0
    assert "asked without thoughts" in capsys.readouterr().out
    got = json.loads((home / "ask.json").read_text())
    assert got["questions"] == want and got["asking"]["think"] == "never"


def test_the_command_with_a_split_of_the_hub(home, monkeypatch):
    """A stand-in for the hub, which has other questions in each split."""
    answers = {"test": "1", "validation": "2"}

    def load_dataset(name, subset, split, streaming):
        return iter([{"question": f"{name} {subset}", "answer": answers[split]}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = ["--questions=a/b:c", "--questions-split=validation", "--max-new-tokens=2"]
    assert cli.main(["ask", "--model=model", *options]) == 0
    (asked,) = json.loads((home / "ask.json").read_text())["questions"]
    assert (asked["question"], asked["answer"]) == ("a/b c", "2")


def test_the_command_leaves_the_questions_alone(home, capsys):
    before = (home / "sums.jsonl").read_text()
    assert cli.main(["ask", "--model=model", "--questions=sums.jsonl", "--out=sums.jsonl"]) == cli.USAGE
    assert "--out must be another file than sums.jsonl" in capsys.readouterr().err
    assert (home / "sums.jsonl").read_text() == before
