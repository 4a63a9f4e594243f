"""Stepwise internalisation: what is removed when, at which positions, with which optimizer, and how a run resumes."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from quietstar.cli import main as cli
from quietstar_recipes.common import plots
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.internalize import stepwise as icot
from quietstar_recipes.internalize.stepwise import Config, internalize, removals, shortened, stages
from quietstar_recipes.tasks import Addition, Multiplication, WordProblems
from tests.recipes.conftest import json_lines, same, seeded

QUICK = {"explicit_steps": 0, "steps_per_token": 3, "final_steps": 4, "eval_every": 2, "save_every": 100}
SMALL = {"batch_size": 8, "rows": 60, "held_out": 10}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(out, ...)`` on one-digit additions, whose chains have two tokens: model, report and metrics without times."""

    def start(out="run", task=None, resume=False, panels=lambda *_: None, **changes):
        monkeypatch.setattr(icot, "panels", panels)  # a picture takes longer than a run
        task = task or Addition(1)
        config = Config(out=str(tmp_path / out), **{**QUICK, **SMALL, **changes})
        model, report = internalize(small_model(task, width=32, heads=2, positions=64), task, config, resume=resume)
        return model, report, json_lines(tmp_path / out / "metrics.jsonl")

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
    assert stages(config, longest=3) == plan


def test_smoothing_is_geometric():
    n = 200_000
    counts = (removals(n, 2, 1.0, seeded(0)) - 2).bincount()[:5].double() / n
    expected = torch.tensor([(1 - math.exp(-1)) * math.exp(-o) for o in range(5)])
    assert (counts - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert removals(1000, 5, math.inf, seeded(0)).unique().tolist() == [5]


def test_which_end_is_removed():
    task = Multiplication(2)
    (row,) = task.sample(1, "train", seeded(0))
    tail = [*task.separator_ids, *row.answer_ids, task.end_id]
    assert shortened(task, row, 0) == task.completion_ids(row)
    assert shortened(task, row, 3) == row.cot_ids[3:] + tail
    assert shortened(task, row, 3, "right") == row.cot_ids[:-3] + tail
    for side in ("left", "right"):
        assert shortened(task, row, len(row.cot_ids), side) == tail == shortened(task, row, 99, side)


def test_the_loss_is_that_of_what_remains(run, monkeypatch):
    """Computed row by row, without padding."""
    task, seen = Addition(1), []

    def logprob(model, prompts, completions, shift):
        seen.append((prompts, completions))
        return original(model, prompts, completions, shift)

    original = icot.logprob
    monkeypatch.setattr(icot, "logprob", logprob)
    _, _, lines = run(smoothing=0.7)
    prompts, completions = seen[0]
    assert {len(x) for x in completions} == {4, 5}  # one token is gone, and more in some rows
    model, total, first = small_model(task, width=32, heads=2, positions=64), 0.0, 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0]
        loss = cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(completion), reduction="none")
        total, first = total + float(loss.detach().sum()), first + float(loss[0].detach())
    assert lines[0]["loss"] == pytest.approx(total / sum(map(len, completions)), rel=1e-5)
    assert lines[0]["first_token_loss"] == pytest.approx(first / len(prompts), rel=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_what_follows_a_removed_token_keeps_its_position_or_moves(run, monkeypatch, keep):
    """In training and in the evaluations."""
    shifts, original = {"logprob": [], "rollout": []}, {name: getattr(icot, name) for name in ("logprob", "rollout")}

    def logprob(model, prompts, completions, shift):
        shifts["logprob"].append(shift.unique().tolist() if keep else shift)
        return original["logprob"](model, prompts, completions, shift)

    def rollout(*arguments, shift, **options):
        shifts["rollout"].append(shift)
        return original["rollout"](*arguments, shift=shift, **options)

    monkeypatch.setattr(icot, "logprob", logprob)
    monkeypatch.setattr(icot, "rollout", rollout)
    run(keep_position=keep, smoothing=math.inf)
    assert shifts["logprob"] == ([[1]] * 3 + [[2]] * 4 if keep else [0] * 7)
    assert shifts["rollout"] == ([0, 1, 2, 2, 0, 2] if keep else [0] * 6)  # the last two are on test problems


def test_cached_answers_at_kept_positions_are_those_of_whole_forwards():
    task = Addition(1)
    model = small_model(task, width=32, heads=2, positions=64).eval()
    prompts = [row.prompt_ids for row in task.sample(3, "test", seeded(0))] + [[5, 2]]
    for prompt, (one,) in zip(prompts, rollout(model, task, prompts, temperature=0.0, max_new=5, shift=3), strict=True):
        logprob, _ = icot.logprob(model, [prompt], [one.ids], 3)
        torch.testing.assert_close(logprob[0], torch.tensor(one.logprob))
        plain, _ = icot.logprob(model, [prompt], [one.ids])
        assert (logprob - plain).abs().max() > 1e-3


@pytest.mark.parametrize("reset, smoothing, steps", [(True, 4.0, 4), (False, 4.0, 7), (True, 1e-3, 7)])
def test_each_stage_has_a_new_optimizer(run, tmp_path, reset, smoothing, steps):
    """Except after a batch without chains; with the last smoothing no row ever has one."""
    run(reset_optimizer=reset, smoothing=smoothing)
    moments = load_file(tmp_path / "run" / "progress" / "optimizer.safetensors")
    assert {float(x) for name, x in moments.items() if name.endswith(".step")} == {steps}


@pytest.mark.long
def test_stages_and_what_is_written(run, tmp_path):
    model, report, lines = run(compare=True, explicit_steps=0, panels=plots.panels)
    assert [(stage["removed"], stage["steps"]) for stage in report["stages"]] == [(0, 0), (1, 3), (2, 4)]
    assert [line["removed"] for line in lines] == [1] * 3 + [2] * 4
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 5, 7]
    assert {"full chain", "internalized", "no chain", "stages", "training"} == set(report)
    assert [(part["step"], part["loss"]) for part in report["training"]] == [(line["step"], line["loss"]) for line in lines]
    out = tmp_path / "run"
    for folder in ("stages/removed-000", "stages/removed-001", "stages/removed-002", "model", "direct/model"):
        AutoModelForCausalLM.from_pretrained(out / folder)
    direct = json_lines(out / "direct" / "metrics.jsonl")
    assert len(direct) == len(lines) and {line["removed"] for line in direct} == {2}
    assert same(model, AutoModelForCausalLM.from_pretrained(out / "model"))
    assert json.loads((out / "internalize.json").read_text()) == report
    assert (out / "internalize.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_model_has_no_chain(run, monkeypatch):
    """The scores are best while there is a chain, and then in the middle of the last stage."""
    scores = iter([0.9, 0.8, 0.3, 0.5, 0.4])
    original, seen = icot.evaluate, []

    def evaluate(model, task, rows, removed, config):
        seen.append(copy.deepcopy(model))
        return original(model, task, rows, removed, config) | {"accuracy": next(scores, 0.1)}

    monkeypatch.setattr(icot, "evaluate", evaluate)
    model, report, _ = run(final_steps=6)
    assert [stage["accuracy"] for stage in report["stages"]] == [0.9, 0.8, 0.5]
    assert same(model, seen[3])


def test_the_training_loss_is_averaged_within_stages(tmp_path, monkeypatch):
    lines = [{"step": n, "removed": int(n > 100), "loss": n, "first_token_loss": 2 * n} for n in range(1, 451)]
    found = icot.losses(lines)
    assert found[0] == {"step": 3, "removed": 0, "loss": 2, "first_token_loss": 4}
    assert [(x["step"], x["loss"]) for x in found[33:35]] == [(100, 100), (102, 101.5)] and len(found) == 151
    drawn = []
    monkeypatch.setattr(icot, "panels", lambda path, title, several: drawn.extend(several))
    stages = [{"removed": n, "accuracy": n / 9, "problems_per_second": 10.0 * n} for n in (0, 1)]
    ends = {"accuracy": 0.5, "problems_per_second": 30.0}
    icot.plot(tmp_path / "x.png", {"stages": stages, "training": found, "internalized": ends}, "")
    removed, speed, loss = drawn
    assert list(removed.curves.values()) == [[[(0, 0.0), (1, 1 / 9)]]]
    assert list(speed.curves.values()) == [[[(0.0, 0.0), (10.0, 1 / 9)]], [[(30.0, 0.5)]]]
    assert loss.marks == [100] and loss.curves["loss"][0][0] == (3, 2)


@pytest.mark.parametrize("step, reset", [(2, True), (4, False)])
def test_a_resumed_run_gives_the_same_numbers(run, continues, ended, step, reset):
    continues(run, ended(icot, "removals", step), reset_optimizer=reset)


def test_a_line_of_metrics_without_a_figure_is_named(run, tmp_path):
    run()
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text().replace("first_token_loss", "first", 1))
    with pytest.raises(ValueError, match=f"^{path}: line 1: .*first_token_loss"):
        run(resume=True)


class NoChain(Addition):
    def solve(self, a, b):
        return "", super().solve(a, b)[1]


class NeverRight(Addition):
    def check(self, row, ids):
        return False


@pytest.mark.parametrize(
    "task, changes, message",
    [
        (NoChain(1), {}, "none of the 71 problems has a chain of thought"),
        (NeverRight(1), {}, "NeverRight rejects its own answers"),
        (WordProblems(), {"keep_position": True}, "keep_position needs chains of one length"),
        (Multiplication(6), {}, "has 64 positions"),
    ],
)
def test_problems_that_have_nothing_to_internalise(run, tmp_path, task, changes, message):
    with pytest.raises(ValueError, match=message):
        run(task=task, **changes)
    assert not (tmp_path / "run" / "progress").exists()


def test_an_explicit_stage_that_learns_nothing_is_reported_at_once(run, tmp_path):
    with pytest.raises(ValueError, match="after 1 updates with the whole chain no held-out answer is right"):
        run(explicit_steps=1)
    assert (tmp_path / "run" / "stages" / "removed-000").is_dir()
    run(explicit_steps=1, resume=True)


KD = ["--method=kd", "--explicit-steps=2", "--student-steps=2", "--emulator-steps=2", "--coupled-steps=2"]


@pytest.mark.long
@pytest.mark.parametrize(
    "method, shown", [(["--explicit-steps=0", "--steps-per-token=2", "--final-steps=2"], "full chain"), (KD, "emulated states")]
)
def test_command(tmp_path, capsys, method, shown):
    options = [f"--out={tmp_path / 'run'}", "--task=addition", "--digits=1", "--batch-size=4", "--rows=20", "--held-out=3"]
    assert cli.main(["internalize", *method, *options]) == 0
    assert shown in capsys.readouterr().out
    assert cli.main(["internalize", *method, *options]) == cli.DATA
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["internalize", *method, *options, "--resume"]) == 0


@pytest.mark.long
def test_a_model_that_writes_chains_answers_with_fewer_and_fewer_tokens(tmp_path):
    """Removed tokens are no longer written, and answers without a chain are still much better than a guess."""
    task = Addition(2)
    steps = {"explicit_steps": 250, "steps_per_token": 60, "final_steps": 100}
    config = Config(str(tmp_path), **steps, learning_rate=3e-3, batch_size=48, held_out=50)
    _, report = internalize(small_model(task, width=64, positions=32), task, config)
    for stage, left in zip(report["stages"], [9, 8, 7, 6, 5], strict=True):
        assert left - 0.5 < stage["tokens"] <= left  # a chain may be a token short, never longer than what is left
    assert report["full chain"]["tokens"] > 8.5 and report["internalized"]["tokens"] == 5
    assert report["stages"][0]["accuracy"] >= 0.9 and report["stages"][-1]["accuracy"] >= 0.5
