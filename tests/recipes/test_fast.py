"""Fast Quiet-STaR: how stages start and end, what the plain model is trained on, and that it is an ordinary model."""

import copy
import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.evaluation.losses import evaluate
from quietstar.evaluation.scoring import score_tokens
from quietstar_recipes.common import plots
from quietstar_recipes.common.training import adamw, train
from quietstar_recipes.fast import plain
from quietstar_recipes.fast import run as recipe
from quietstar_recipes.fast.run import Config, fast, stages
from tests.recipes.conftest import json_lines, same, seeded

THOUGHTS = ThoughtConfig(policy_weight=3.0, embedding_scale=1.0)
QUICK = {"curriculum": "3-2,2-1", "steps": 4, "eval_every": 2, "save_every": 2, "batch_size": 4, "learning_rate": 1e-3}
PLAIN = {"plain_steps": 4, "plain_rate": 1e-3, "plain_weight": 1.0}


def texts(count, length=9, seed=0):
    generator = seeded(seed)
    return [{"input_ids": torch.randint(3, 61, (length + i % 2,), generator=generator)} for i in range(count)]


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    def start(out="run", resume=False, data=None, held_out=None, score=None, panels=lambda *_: None, **changes):
        monkeypatch.setattr(recipe, "panels", panels)  # a picture takes longer than a run
        model = tiny("llama")
        before = copy.deepcopy(model)
        config = Config(out=str(tmp_path / out), **{**QUICK, **PLAIN, **changes})
        held_out = texts(4, seed=1) if held_out is None else held_out
        student, report = fast(model, data or texts(10), held_out, THOUGHTS, config, score=score, resume=resume)
        assert same(model, before)
        return student, report

    return start


def test_the_curriculum_is_parsed():
    assert stages(Config().curriculum) == [(13, 8), (9, 4), (5, 4)]
    assert stages("8-4, 4-4") == [(8, 4), (4, 4)]


def test_the_plain_model_takes_twice_the_steps_of_a_stage_unless_asked_otherwise():
    assert (Config(steps=4).plain_updates, Config(steps=4, plain_steps=3).plain_updates) == (8, 3)


# The plain model


def likely(targets, nll, V=7):
    """Log-probabilities [tokens,V] that give the targets these losses."""
    p = torch.exp(-nll)[:, None]
    return ((1 - p) / (V - 1)).expand(-1, V).scatter(1, targets[:, None], p).log()


def test_the_published_loss_reinforces_a_sampled_token():
    logits = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    targets, teacher = torch.randint(7, (50,)), torch.rand(50, dtype=torch.float64) * 4
    config = Config(plain_weight=10.0, plain_temperature=3.0)
    torch.manual_seed(5)
    value, reward = plain.objective(logits.log_softmax(-1), targets, likely(targets, teacher), config)
    torch.manual_seed(5)
    actions = logits.detach().softmax(-1).multinomial(1)[:, 0].tolist()
    expected = 0.0
    for t in range(50):
        gain = max(0.0, float(teacher[t] + logits[t].detach().log_softmax(-1)[targets[t]]))
        assert float(reward[t]) == pytest.approx(gain)
        expected -= 10 * gain * (logits[t] / 3).log_softmax(-1)[actions[t]] / 50
    assert any(a != b for a, b in zip(actions, targets.tolist(), strict=True)) and 0 < int((reward > 0).sum()) < 50
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (value, expected)))


def test_other_objectives():
    logprob = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64).log().requires_grad_()
    targets, teacher = torch.tensor([0, 1]), torch.tensor([[0.2, 0.4, 0.4], [0.3, 0.7, 0.0]], dtype=torch.float64)
    observed, reward = plain.objective(logprob, targets, teacher.log(), Config(objective="observed", plain_weight=1.0))
    gain = torch.tensor(0.5 / 0.2).log().double()  # the second token is the teacher's: nothing is earned there
    torch.testing.assert_close(reward, torch.stack([gain, gain * 0]))
    chosen = (logprob / 3).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(observed, -(gain * chosen[0]) / 2)
    options = {"objective": "observed", "plain_weight": 1.0, "clamp_reward": False}
    unclamped, reward = plain.objective(logprob, targets, teacher.log(), Config(**options))
    torch.testing.assert_close(reward, torch.stack([gain, torch.tensor(0.1 / 0.7).log().double()]))
    torch.testing.assert_close(unclamped, -(reward * chosen).mean())
    likelihood, _ = plain.objective(logprob, targets, teacher.log(), Config(objective="likelihood"))
    torch.testing.assert_close(likelihood, -(logprob[0, 0] + logprob[1, 1]) / 2)
    distil, _ = plain.objective(logprob, targets, teacher.log(), Config(objective="distil", plain_weight=5.0))
    torch.testing.assert_close(distil, -(teacher * logprob).sum() / 2)


def test_packed_texts_are_split_into_documents():
    ids, documents = torch.arange(10), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    found = plain.split_documents([{"input_ids": ids, "document_ids": documents}, {"input_ids": torch.arange(20, 24)}])
    assert [x["input_ids"].tolist() for x in found] == [[0, 1, 2, 3], [6, 7, 8, 9], [20, 21, 22, 23]]
    found = plain.split_documents([{"input_ids": ids, "document_ids": documents, "anchors": torch.tensor([0, 2, 7, -1])}])
    assert [x["anchors"].tolist() for x in found] == [[0, 2], [1]]
    (last,) = plain.split_documents([{"input_ids": ids, "document_ids": documents, "anchors": torch.tensor([7])}])[:1]
    assert last["anchors"] == 1


@pytest.mark.parametrize("rows", [8192, 12], ids=["at once", "in parts"])
@pytest.mark.parametrize("mixing", ["logits", "logprobs"])
def test_what_the_teacher_predicts_after_its_greedy_thoughts(tiny, monkeypatch, mixing, rows):
    monkeypatch.setattr(plain, "ROWS", rows)
    config = ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, mixing=mixing)
    qs = QuietStar(tiny("llama"), config, verify=False).eval()
    torch.nn.init.normal_(qs.mixing_head[4].weight)
    data = texts(5)
    data[2]["anchors"] = torch.tensor([1, 4, 6, -1])
    found = plain.next_token_logprobs(qs, data)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
    targets = [text["input_ids"][1:][plain.target_mask(text)] for text in data]
    own = found.gather(1, torch.cat(targets)[:, None])[:, 0].split([len(x) for x in targets])
    for text, logprob in zip(data, own, strict=True):
        places = (plain.target_mask(text).nonzero()[:, 0] + 1).tolist()
        ((_, mixed),) = score_tokens(qs, [text["input_ids"].tolist()], [places])
        torch.testing.assert_close(logprob, mixed.logprob)


def test_which_tokens_are_targets():
    text = {"input_ids": torch.arange(6), "attention_mask": torch.tensor([1, 1, 1, 1, 1, 0])}
    assert plain.target_mask(text).tolist() == [True, True, True, True, False]
    labels = torch.tensor([-100, -100, 2, 3, -100, 5])
    assert plain.target_mask({**text, "labels": labels}).tolist() == [False, True, True, False, False]
    thinks = torch.tensor([1, 3, 4, -1])
    assert plain.target_mask({**text, "anchors": thinks}).tolist() == [False, True, False, True, False]


def test_the_plain_loss_is_measured_like_the_loss_with_thoughts(tiny):
    model = tiny("llama")
    found = plain.loss(model, texts(5), 2)
    qs = QuietStar(model, ThoughtConfig(thoughts=1, thought_tokens=1, lookahead=1), verify=False).eval()
    assert found == pytest.approx(evaluate(qs, texts(5), 2)["base"], rel=1e-5)


def test_speeds_are_of_the_same_texts_and_the_right_lengths(tiny, monkeypatch):
    qs, seen, forwards = QuietStar(tiny("llama"), THOUGHTS, verify=False).eval(), [], []
    original = QuietStar.generate
    qs.model.model.register_forward_hook(lambda *_: forwards.append(len(seen)))

    def generate(self, ids, mask, **options):
        seen.append((options["think"], self.thought_config.thought_tokens, ids.tolist(), options["max_new_tokens"]))
        return original(self, ids, mask, **options)

    monkeypatch.setattr(QuietStar, "generate", generate)
    held_out = texts(3, length=7)
    found = recipe.speeds(qs, held_out, [5, 2])
    assert [x["thought_tokens"] for x in found] == [5, 2, 0] and found[-1]["times_plain"] == 1
    order = [("always", 5), ("always", 2), ("never", 1)]
    assert seen[:3] == [(think, T, [x["input_ids"][:3].tolist() for x in held_out], 4) for think, T in order]
    assert all(x["times_plain"] > 0 for x in found) and qs.thought_config == THOUGHTS
    assert forwards.count(1) > forwards.count(2) > forwards.count(3) > 0


# The run


@pytest.mark.long
def test_each_stage_has_its_thoughts_and_the_plain_model_has_none(run, tmp_path):
    student, report = run(panels=plots.panels)
    assert [(x["thought_tokens"], x["lookahead"]) for x in report["stages"]] == [(3, 2), (2, 1)]
    for name, T, J in (("stage-1-3-2", 3, 2), ("stage-2-2-1", 2, 1)):
        config = QuietStar.from_pretrained(tmp_path / "run" / name / "best", verify=False).thought_config
        assert (config.thought_tokens, config.lookahead, config.policy_weight) == (T, J, 3.0)
    lines = [json_lines(tmp_path / "run" / name / "metrics.jsonl") for name in ("stage-1-3-2", "stage-2-2-1")]
    rates, later = ([line["learning_rate"] for line in several] for several in lines)
    assert later == pytest.approx([rate / 2 for rate in rates])

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(exported).__name__ == "LlamaForCausalLM" and same(exported, student)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(x.name for x in (tmp_path / "run" / "model").iterdir()) == files
    assert plain.loss(exported, texts(4, seed=1), 4) == pytest.approx(report["plain"])
    assert json.loads((tmp_path / "run" / "fast.json").read_text()) == report
    assert [x["thought_tokens"] for x in report["speeds"]] == [3, 2, 0]
    assert (tmp_path / "run" / "fast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("start", ["base", "curriculum"])
def test_the_plain_model_is_not_worse_than_its_start(run, start):
    """At this learning rate an update makes it worse, so the start is kept."""
    one = {"curriculum": "2-1", "steps": 1, "eval_every": 1, "plain_steps": 1}
    _, report = run(plain_rate=0.5, objective="likelihood", plain_start=start, **one)
    ended = report["stages"][-1]["base"]
    assert report["base"] != pytest.approx(ended)
    assert report["plain"] == report["start"] == (report["base"] if start == "base" else pytest.approx(ended))


def test_the_weight_of_the_plain_loss_is_not_in_the_figures(tiny, monkeypatch):
    """Nor does AdamW see it, beyond rounding: there is nothing that it could be too large for."""

    def bad_teacher(_, some):  # worse than the model, so all is rewarded
        targets = torch.cat([text["input_ids"][1:] for text in some])
        return likely(targets, torch.full((len(targets),), 10.0), V=61)

    monkeypatch.setattr(plain, "next_token_logprobs", bad_teacher)
    found = []
    for weight in (1.0, 1e6):
        student, config, lines = tiny("llama"), Config(plain_weight=weight, batch_size=4), []
        gradient = partial(plain.plain_gradient, student, None, texts(4), config)
        train(student, adamw(student, 1e-4, 0.01), 4, gradient, name="fast", after=lines.append)
        found.append([line["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and 1 < found[0][0] < 100


@pytest.mark.long
def test_a_stage_continues_from_the_best_checkpoint(run, monkeypatch):
    """The scores make the first of two evaluations the better one."""
    began, judged, original = [], [], recipe.train

    def train(qs, *args, **kwargs):
        began.append(copy.deepcopy(qs))
        return original(qs, *args, **kwargs)

    def score(qs):
        judged.append(copy.deepcopy(qs))
        return {1: 5.0, 2: 4.0, 3: 1.0, 4: 2.0}[len(judged)]

    monkeypatch.setattr(recipe, "train", train)
    _, report = run(score=score)
    assert [stage["score"] for stage in report["stages"]] == [5.0, 2.0]
    assert same(began[1], judged[0])


@pytest.mark.long
def test_a_resumed_run_gives_the_same_numbers(run, continues, ended, tmp_path):
    """Stopped in the first stage, in its last step, in the second stage and while the plain model is trained."""

    @contextmanager
    def ending(update, later):
        with ended(torch.optim.AdamW, "step", update):
            yield
        assert not (tmp_path / "ended" / later).exists()

    def and_lines(out, **options):
        return *run(out, **options), json_lines(tmp_path / out / "plain/metrics.jsonl")

    endings = [ending(1, "stage-2-2-1"), ending(1, "stage-2-2-1"), ending(2, "plain"), ending(2, "fast.json")]
    continues(and_lines, *endings, objective="distil")  # whose gradient is never 0


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="at least 2 texts must be held out, to choose checkpoints by, got 1"):
        run(held_out=texts(1))
    assert not (tmp_path / "run").exists()
    run()
    (chosen := tmp_path / "run/stage-2-2-1/chosen.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{chosen}: Object missing required field thought_tokens"):
        run(resume=True)


@pytest.mark.long
def test_command(tiny, byte_tokenizer, tmp_path, capsys):
    tiny("llama", vocab_size=257).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    options = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'run'}", "--length=16"]
    options += ["--held-out=4", "--curriculum=3-2,2-1", "--steps=2", "--eval-every=2", "--plain-steps=2", "--batch-size=2"]
    options += ["--plain-rate=0.5", "--objective=likelihood"]  # which makes it worse
    assert cli.main(["fast", *options]) == 0
    shown, progress = capsys.readouterr()
    assert f"{tmp_path / 'run/plain'}: 2 updates of a model without thoughts\n" in progress
    assert "held-out loss without thoughts" in shown and "times\n" in shown and "plain\n" in shown  # a column of two lines
    assert "no update of the model without thoughts lowered its held-out loss, so it is saved as it was before" in shown
    assert (tmp_path / "run" / "model" / "tokenizer_config.json").exists()
