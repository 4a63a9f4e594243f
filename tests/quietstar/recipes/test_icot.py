"""Stepwise internalisation: what goes when, under which positions, with which optimizer, and how a run goes on."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from quietstar import cli
from quietstar.recipes import icot
from quietstar.recipes.icot import Config, Stage, internalize, removals, shortened, stages
from quietstar.recipes.models import small_model
from quietstar.tasks import Addition, Multiplication, WordProblems
from quietstar.train import Interrupted

QUICK = {"explicit_steps": 0, "steps_per_token": 3, "final_steps": 4, "eval_every": 2, "save_every": 100}
SMALL = {"batch_size": 8, "rows": 60, "held_out": 10}


@pytest.fixture
def run(tmp_path):
    """``run(out, ...)`` on one-digit additions, whose chains have two tokens: model, report and metrics without times."""

    def start(out="run", task=None, resume=False, **changes):
        task = task or Addition(1)
        config = Config(out=str(tmp_path / out), **{**QUICK, **SMALL, **changes})
        model, report = internalize(small_model(task, width=32, heads=2, positions=64), task, config, resume=resume)
        lines = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return model, report, [{name: x for name, x in line.items() if name != "seconds"} for line in lines]

    return start


@pytest.mark.parametrize(
    "beyond, plan",
    [
        (None, [(0, 10), (1, 3), (2, 3), (3, 7)]),
        (9, [(0, 10), (1, 3), (2, 3), (3, 7)]),
        (2, [(0, 10), (1, 3), (3, 7)]),
        (1, [(0, 10), (3, 7)]),
        (0, [(3, 7)]),
    ],
)
def test_schedule(beyond, plan):
    config = Config(explicit_steps=10, steps_per_token=3, final_steps=7, remove_all_beyond=beyond)
    assert stages(config, longest=3) == [Stage(*one) for one in plan]


def test_smoothing_is_geometric():
    n = 200_000
    counts = (removals(n, 2, 1.0, torch.Generator().manual_seed(0)) - 2).bincount()[:5].double() / n
    expected = torch.tensor([(1 - math.exp(-1)) * math.exp(-o) for o in range(5)])
    assert (counts - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert removals(1000, 5, math.inf, torch.Generator().manual_seed(0)).unique().tolist() == [5]


def test_which_end_goes():
    task = Multiplication(2)
    (row,) = task.sample(1, "train", torch.Generator().manual_seed(0))
    tail = [*task.separator_ids, *row.answer_ids, task.end_id]
    assert shortened(task, row, 0) == task.completion_ids(row)
    assert shortened(task, row, 3) == row.cot_ids[3:] + tail
    assert shortened(task, row, 3, "right") == row.cot_ids[:-3] + tail
    for side in ("left", "right"):
        assert shortened(task, row, len(row.cot_ids), side) == tail == shortened(task, row, 99, side)


def test_the_loss_is_that_of_what_remains(run, monkeypatch):
    """Written out row by row, without padding."""
    task, seen = Addition(1), []

    def logprob(model, prompts, completions, shift):
        seen.append((prompts, completions))
        return original(model, prompts, completions, shift)

    original = icot.logprob
    monkeypatch.setattr(icot, "logprob", logprob)
    _, _, lines = run(smoothing=0.7)
    prompts, completions = seen[0]
    assert {len(x) for x in completions} == {4, 5}  # one token gone, and in some rows more
    model, total, first = small_model(task, width=32, heads=2, positions=64), 0.0, 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0]
        loss = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(completion), reduction="none")
        total, first = total + float(loss.detach().sum()), first + float(loss[0].detach())
    assert lines[0]["loss"] == pytest.approx(total / sum(map(len, completions)), rel=1e-5)
    assert lines[0]["first_token_loss"] == pytest.approx(first / len(prompts), rel=1e-5)


def positions_of_answers(task, calls):
    """Of each row of the calls, the positions of the separator and what follows it."""
    found = []
    for ids, positions in calls:
        for row, place in zip(ids.tolist(), positions.tolist(), strict=True):
            if task.separator_ids[0] in row:
                found.append(place[row.index(task.separator_ids[0])])
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_positions(tmp_path, keep):
    """In training and in cached generation the answer stays where the chain had put it, or moves to the left."""
    task = Addition(1)
    model = small_model(task, width=32, heads=2, positions=64)
    calls = {True: [], False: []}

    def note(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls[module.training].append((ids, kwargs["position_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    config = Config(out=str(tmp_path), keep_position=keep, smoothing=math.inf, **QUICK, **SMALL)
    plan, rows = stages(config, 2), task.sample(60, "train", torch.Generator().manual_seed(0))
    icot.Training(model, task, config, plan, rows, rows[:10], "", False).run()
    handle.remove()
    prompt = len(rows[0].prompt_ids)
    trained = positions_of_answers(task, calls[True])
    assert set(trained) == ({prompt + 2} if keep else {prompt + 1, prompt})
    assert trained[0] == (prompt + 2 if keep else prompt + 1)
    # The prompt's last token and the first generated one are neighbours, in each of the stages 0, 1 and 2.
    last = [int(positions[0, -1]) for ids, positions in calls[False] if ids.shape[1] == prompt]
    assert last == ([prompt - 1, prompt, prompt + 1, prompt + 1] if keep else [prompt - 1] * 4)
    following = [int(positions[0, -1]) for ids, positions in calls[False] if ids.shape[1] == 1]
    assert following[0] == prompt and following[-1] > last[-1]


@pytest.mark.parametrize("reset, steps", [(True, 4), (False, 7)])
def test_the_optimizer_begins_anew_with_each_stage(run, tmp_path, reset, steps):
    run(reset_optimizer=reset)
    moments = load_file(tmp_path / "run" / "progress" / "optimizer.safetensors")
    assert {float(x) for name, x in moments.items() if name.endswith(".step")} == {steps}


def test_stages_and_what_is_written(run, tmp_path):
    model, report, lines = run(compare=True, explicit_steps=0)
    assert [(stage["removed"], stage["steps"]) for stage in report["stages"]] == [(0, 0), (1, 3), (2, 4)]
    assert [line["removed"] for line in lines] == [1] * 3 + [2] * 4
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 5, 7]
    assert {"full chain", "internalized", "no chain", "stages"} == set(report)
    out = tmp_path / "run"
    for folder in ("stages/removed-000", "stages/removed-001", "stages/removed-002", "model", "direct/model"):
        AutoModelForCausalLM.from_pretrained(out / folder)
    direct = [json.loads(line) for line in (out / "direct" / "metrics.jsonl").read_text().splitlines()]
    assert len(direct) == len(lines) and {line["removed"] for line in direct} == {2}
    best = AutoModelForCausalLM.from_pretrained(out / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), best.parameters(), strict=True))
    assert json.loads((out / "internalize.json").read_text()) == report


def test_the_best_model_has_no_chain(run, monkeypatch):
    """Scores that are best while there is a chain, then best in the middle of the last stage."""
    scores = iter([0.9, 0.8, 0.3, 0.5, 0.4])
    original, seen = icot.evaluate, []

    def evaluate(model, task, rows, removed, config):
        seen.append([p.detach().clone() for p in model.parameters()])
        return original(model, task, rows, removed, config) | {"accuracy": next(scores, 0.1)}

    monkeypatch.setattr(icot, "evaluate", evaluate)
    model, report, _ = run(final_steps=6)
    assert [stage["accuracy"] for stage in report["stages"]] == [0.9, 0.8, 0.5]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[3], strict=True))


def test_a_gate_keeps_a_stage_until_it_is_learnt(run, monkeypatch):
    scores = iter([0.0, 0.2, 0.9, 0.1, 0.1, 0.1])
    original = icot.evaluate
    monkeypatch.setattr(icot, "evaluate", lambda *args: original(*args) | {"accuracy": next(scores, 0.1)})
    _, report, _ = run(task=Multiplication(1), gate=0.5, gate_rounds=3, explicit_steps=0)
    assert [(stage["removed"], stage["steps"]) for stage in report["stages"]] == [(0, 0), (1, 6), (2, 4)]


def stop_at(monkeypatch, step):
    """A signal in the middle of an update."""
    original = icot.Training._update

    def update(self, stage):
        if self.progress.state["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, stage)

    monkeypatch.setattr(icot.Training, "_update", update)


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("reset", [True, False])
def test_a_stopped_run_goes_on_with_the_same_numbers(run, monkeypatch, step, reset):
    whole, report, lines = run("whole", reset_optimizer=reset)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, step)
        run("stopped", reset_optimizer=reset)
    model, again, resumed = run("stopped", reset_optimizer=reset, resume=True)
    assert resumed == lines
    assert [x["right"] for x in again["stages"]] == [x["right"] for x in report["stages"]]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_run_that_is_there(run):
    run()
    with pytest.raises(ValueError, match="a run is there already"):
        run()
    with pytest.raises(ValueError, match="the run there has smoothing=4.0, not 2.0"):
        run(resume=True, smoothing=2.0)


class NoChain(Addition):
    def solve(self, a, b):
        return "", super().solve(a, b)[1]


class NeverRight(Addition):
    def check(self, row, ids):
        return False


@pytest.mark.parametrize(
    "task, changes, message",
    [
        (NoChain(1), {}, "none of the 80 problems has a chain of thought"),
        (NeverRight(1), {}, "NeverRight calls its own answers wrong"),
        (WordProblems(), {"keep_position": True}, "keep_position needs chains of one length"),
        (Multiplication(6), {}, "has 64 positions"),
    ],
)
def test_problems_that_have_nothing_to_internalise(run, tmp_path, task, changes, message):
    with pytest.raises(ValueError, match=message):
        run(task=task, **changes)
    assert not (tmp_path / "run" / "progress").exists()


def test_nothing_learnt_in_the_explicit_stage_is_said_at_once(run, tmp_path):
    with pytest.raises(ValueError, match="after 1 updates with the whole chain no held-out answer is right"):
        run(explicit_steps=1)
    assert (tmp_path / "run" / "stages" / "removed-000").is_dir()
    run(explicit_steps=1, resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"smoothing": 0.0}, "smoothing must be above 0, got 0.0"),
        ({"final_steps": 0}, "final_steps must be 1 or more, got 0"),
        ({"gate": 1.5}, "gate must be from 0 to 1, got 1.5"),
        ({"remove_all_beyond": -1}, "remove_all_beyond must be None, or 0 or more, got -1"),
        ({"keep_position": True, "side": "right"}, "side must be left where keep_position is on, got 'right'"),
    ],
)
def test_bad_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_command(tmp_path, capsys):
    options = [f"--out={tmp_path / 'run'}", "--task=addition", "--digits=1", "--explicit-steps=0", "--steps-per-token=2"]
    options += ["--final-steps=2", "--batch-size=4", "--rows=20", "--held-out=4"]
    assert cli.main(["internalize", *options]) == 0
    assert "full chain" in capsys.readouterr().out
    assert cli.main(["internalize", *options]) == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["internalize", *options, "--resume"]) == 0


@pytest.mark.slow
def test_a_model_that_writes_chains_answers_with_fewer_and_fewer_tokens(tmp_path):
    """What is removed is not written any more, and the answer without its chain is still a rule and not a guess."""
    task = Addition(2)
    config = Config(str(tmp_path), explicit_steps=400, steps_per_token=60, final_steps=150, learning_rate=2e-3, held_out=50)
    _, report = internalize(small_model(task, width=64, positions=32), task, config)
    assert [stage["tokens"] for stage in report["stages"]] == [9, 8, 7, 6, 5]
    assert report["full chain"]["tokens"] == 9 and report["internalized"]["tokens"] == 5
    assert report["stages"][0]["accuracy"] >= 0.9 and report["stages"][-1]["accuracy"] >= 0.5
