"""The model in lm_eval, against lm_eval's own Hugging Face model and our scores, and in a whole run on local tasks."""

import json
import runpy
import sys
from importlib.metadata import entry_points

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quietstar import QuietStar
from quietstar.evaluation.lm_eval import QuietStarLM
from quietstar.evaluation.scoring import score_tokens
from tests.quietstar.common import wrap

pytestmark = pytest.mark.long
PAIRS = [("Q: one and one\nA:", " two"), ("Q: one and one\nA:", " seven"), ("", "abc"), ("trailing ", "space"), ("a", "b")]


@pytest.fixture
def folder(tiny, byte_tokenizer, tmp_path):
    """A checkpoint that thinks."""
    model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
    qs = wrap(model, byte_tokenizer, thought_tokens=3, lookahead=2)
    qs.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_without_thoughts_it_is_the_plain_model(folder):
    ours = QuietStarLM(folder, think="never", batch_size=3, max_length=40)
    theirs = HFLM(folder, device="cpu", batch_size=1, dtype="float32", max_length=ours.max_length)
    likelihood = requests("loglikelihood", PAIRS)
    for mine, plain in zip(ours.loglikelihood(likelihood, True), theirs.loglikelihood(likelihood, True), strict=True):
        assert mine == pytest.approx(plain, abs=1e-4)
    rolling = requests("loglikelihood_rolling", [("short",), ("a text that is longer than a window of " * 3,)])
    assert ours.loglikelihood_rolling(rolling, True) == pytest.approx(theirs.loglikelihood_rolling(rolling, True), rel=1e-5)
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    texts = requests("generate_until", [("Q: one?\nA:", until), ("more\n", until), ("x", {**until, "max_gen_toks": 2})])
    assert ours.generate_until(texts, True) == theirs.generate_until(texts, True)


@pytest.mark.parametrize("think", ["always", 3.5])
def test_with_thoughts_it_is_what_scores_say(folder, think):
    qs = QuietStar.from_pretrained(folder).eval()
    ours = QuietStarLM(folder, think=think, batch_size=2)
    context, continuation = PAIRS[0]
    ids = qs.tokenizer(context + continuation)["input_ids"]
    _, score = score_tokens(qs, [ids], [range(len(context), len(ids))], think)[0]
    (found,) = ours.loglikelihood(requests("loglikelihood", PAIRS[:1]), True)
    assert found == (pytest.approx(float(score.logprob.sum()), abs=1e-4), bool(score.likeliest.all()))
    plain = QuietStarLM(folder, think="never").loglikelihood(requests("loglikelihood", PAIRS[:1]), True)
    assert abs(found[0] - plain[0][0]) > 1e-3

    prompt = qs.tokenizer("Q: one?\nA:", return_tensors="pt")["input_ids"]
    out = qs.generate(prompt, max_new_tokens=5, think=think, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    texts = requests("generate_until", [("Q: one?\nA:", {"until": "never", "max_new_tokens": 5, "temperature": 0.0})])
    assert ours.generate_until(texts, True) == [qs.tokenizer.decode(out, skip_special_tokens=True)]


def test_long_texts_are_cut_on_the_left(folder, caplog):
    ours = QuietStarLM(folder, max_length=25)  # 20 for the text without its last token, and 5 for a thought
    cut, whole = ours.loglikelihood(requests("loglikelihood", [("y" * 30 + "x" * 19, "ab"), ("x" * 19, "ab")]), True)
    assert cut == pytest.approx(whole, abs=1e-5) and "51 tokens is cut on the left to the 21 that fit" in caplog.text
    with pytest.raises(ValueError, match="a continuation has 21 tokens, more than the 20 that fit"):
        ours.loglikelihood(requests("loglikelihood", [("x", "a" * 21)]), True)
    with pytest.raises(ValueError, match="new tokens must be from 1 to 19, the number that fit, got 20"):
        ours.generate_until(requests("generate_until", [("x", {"max_gen_toks": 20})]), True)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "Q: {{{{question}}}}\\nA:"
{more}
"""
GENERATION = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}'
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]'
TEXTS = 'doc_to_target: "{{choices[answer]}}"\nmetric_list: [{metric: exact_match}]\n' + GENERATION


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks on a .jsonl file: choosing an answer, and writing it."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i} and 1", "choices": [str(i), str(i + 1)], "answer": i % 2} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, kind, more in (("pick", "multiple_choice", CHOICES), ("write", "generate_until", TEXTS)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, more=more))
    return tmp_path / "tasks"


def test_local_tasks(folder, tasks):
    """Figures and samples of a run are those of our scores."""
    found = lm_eval.simple_evaluate(
        "quietstar",
        model_args={"pretrained": folder, "think": "always"},
        tasks=["pick", "write"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        bootstrap_iters=0,
    )
    qs = QuietStar.from_pretrained(folder).eval()
    right = []
    for sample in found["samples"]["pick"]:
        scores = []
        for choice in sample["doc"]["choices"]:
            head = f"Q: {sample['doc']['question']}\nA:"
            ids = qs.tokenizer(f"{head} {choice}")["input_ids"]
            scores.append(float(score_tokens(qs, [ids], [range(len(head), len(ids))])[0][1].logprob.sum()))
        assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
        right.append(scores.index(max(scores)) == sample["doc"]["answer"])
    assert found["results"]["pick"]["acc,none"] == sum(right) / 4
    assert found["results"]["write"]["exact_match,none"] == 0


def test_the_command(folder, tasks, monkeypatch, capsys):
    """``python -m quietstar.evaluation.lm_eval`` is lm_eval with one more model."""
    monkeypatch.delitem(model_registry._objs, "quietstar")  # as in a new process
    monkeypatch.delitem(sys.modules, "quietstar.evaluation.lm_eval")
    monkeypatch.setattr(TaskManager, "__init__", _own_tasks_only(TaskManager.__init__))
    arguments = ["--model", "quietstar", "--model_args", f"pretrained={folder},think=never", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--tasks", "pick", "--include_path", str(tasks)])
    runpy.run_module("quietstar.evaluation.lm_eval", run_name="__main__", alter_sys=False)
    assert "|pick |" in capsys.readouterr().out


def _own_tasks_only(init):
    """Without lm_eval's own tasks: listing those thousands takes seconds."""
    return lambda self, *rest, **options: init(self, *rest, **{**options, "include_defaults": False})


def test_the_entry_point():
    (found,) = [point for point in entry_points(group="lm_eval.models") if point.name == "quietstar"]
    assert found.load() is QuietStarLM
