"""SCoRe: what each attempt earns, which gradient each stage has, and how a run goes on."""

import copy
import json
import os
import signal
from statistics import fmean

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quietstar import cli
from quietstar.recipes import score as recipe
from quietstar.recipes.models import small_model
from quietstar.recipes.score import Attempts, Config, advantages, attempt, loss, read, returns, score
from quietstar.recipes.sft import SFTConfig, sft
from quietstar.tasks import Addition
from quietstar.train import Interrupted

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
FIRST, SECOND = [[3, 4], [5, 6, 7], [8]], [[9], [3, 4], [5, 6, 7, 8]]


def tiny(seed=0, dtype=torch.float64):
    return small_model(Addition(1), layers=2, width=32, heads=2, positions=64, seed=seed).to(dtype).eval()


def moved(model, by=0.05):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    return other


@pytest.fixture
def run(solver, tmp_path):
    def start(out="run", resume=False, model=None, task=None, **changes):
        numbers = {"first_steps": 3, "second_steps": 3, "problems": 8, "max_new": 8, "held_out": 10, "save_every": 100}
        config = Config(out=str(tmp_path / out), **{**numbers, **changes})
        model, report = score(copy.deepcopy(model or solver[0]), task or Addition(1), config, resume=resume)
        lines = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return model, report, [{name: x for name, x in line.items() if name != "seconds"} for line in lines]

    return start


@pytest.mark.parametrize(
    "stage, changes, first, second",
    [
        (1, {}, [0, 0, 0, 0], [0, 1, 0, 1]),
        (2, {"bonus": 0.0}, [0, 0, 1, 1], [0, 1, 0, 1]),
        (2, {"bonus": 10.0}, [0, 0, 1, 1], [0, 11, -10, 1]),
        (2, {"bonus": 10.0, "credit": "joint"}, [0, 11, -9, 2], [0, 11, -10, 1]),
        (1, {"credit": "joint"}, [0, 1, 0, 1], [0, 1, 0, 1]),
    ],
)
def test_what_attempts_earn(stage, changes, first, second):
    """Wrong twice, wrong then right, right then wrong, right twice."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    assert returns(rewards, stage, Config(**changes)).tolist() == [first, second]


def test_advantages_compare_with_the_others():
    earned = torch.tensor([[0.0, 1.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    over_batch = [[x - (sum(row) - x) / 3 for x in row] for row in earned.tolist()]
    torch.testing.assert_close(advantages(earned, 1), torch.tensor(over_batch))
    torch.testing.assert_close(advantages(earned, 2), torch.tensor([[-1.0, 1.0, 1.0, -1.0], [4.0, -4.0, 0.0, 0.0]]))


def test_figures_count_what_was_fixed_and_broken():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    first, second = [[1], [1, 2], [3], [4], [5]], [[1], [1, 3], [7], [4], [6]]
    found = Attempts([], [], first, [], second, rewards).figures()
    assert {name: found[name] for name in ("accuracy_first", "accuracy_second", "fixed", "broken", "edited")} == {
        "accuracy_first": 0.4,
        "accuracy_second": 0.6,
        "fixed": 0.4,
        "broken": 0.2,
        "edited": 0.6,
    }
    assert found["delta"] == pytest.approx(found["fixed"] - found["broken"])
    assert found["low"] < found["delta"] < found["high"]
    assert found["change"] == pytest.approx((0.5 + 1 + 1) / 5)


def test_the_second_attempt_sees_the_first_and_nothing_of_the_answer(solver):
    (model, task), config = solver, Config(max_new=8)
    rows = task.sample(20, "train", torch.Generator().manual_seed(3))
    found = attempt(model, task, rows, config, 1.0, seed=0)
    for row, first, request in zip(rows, found.first, found.requests, strict=True):
        assert request == row.prompt_ids + task.trimmed(first) + task.again_ids
    assert found.rewards[0].tolist() == [float(task.check(row, ids)) for row, ids in zip(rows, found.first, strict=True)]
    assert 0 < found.rewards.sum() < 40


def test_read_is_the_row_by_row_result():
    model, reference = tiny(), moved(tiny())
    logprob, divergence = read(model, reference, PROMPTS, FIRST)
    for i, (prompt, ids) in enumerate(zip(PROMPTS, FIRST, strict=True)):
        p, q = (m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in (model, reference))
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        assert float(logprob[i].detach()) == pytest.approx(
            sum(float(p[t, x].detach()) for t, x in zip(places, ids, strict=True)), rel=1e-5
        )
        kl = sum(float(nn.functional.kl_div(q[t], p[t], log_target=True, reduction="sum").detach()) for t in places)
        assert float(divergence[i].detach()) == pytest.approx(kl, rel=1e-5) and kl > 1e-4


def gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, model.parameters(), strict=True)]
    )


def attempts(first=FIRST, second=SECOND):
    requests = [prompt + [4] for prompt in PROMPTS]
    return Attempts([None] * 3, PROMPTS, first, requests, second, torch.zeros(2, 3))


def test_the_loss_is_reinforce_and_the_divergence():
    model, reference = tiny(), moved(tiny())
    advantage = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, -0.25]])
    config = Config(kl=0.3, first_kl=0.7)
    (p1, kl1), (p2, kl2) = read(model, reference, PROMPTS, FIRST), read(model, reference, attempts().requests, SECOND)
    policy = -advantage[0] * p1 - advantage[1] * p2
    for stage, held in ((1, 0.7 * kl1), (2, 0.3 * (kl1 + kl2))):
        found, divergence = loss(model, reference, attempts(), advantage, stage, config)
        torch.testing.assert_close(found, policy + held)
        torch.testing.assert_close(divergence, torch.stack([kl1, kl2]))
        assert not divergence.requires_grad


def test_in_stage_one_only_the_second_attempt_is_reinforced():
    """And at the base model itself nothing holds the first attempt yet."""
    model, reference = tiny(), tiny()
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    config = Config(first_kl=0.1)
    first_stage, second_stage = (advantages(returns(rewards, stage, config), 1) for stage in (1, 2))
    assert first_stage[0].abs().max() == 0 < second_stage[0].abs().max()

    def of_stage(stage, advantage, first):
        return gradient(loss(model, reference, attempts(first), advantage, stage, config)[0].sum(), model)

    other = [[9, 9], [9], [9, 9, 9]]
    same, changed = (of_stage(1, first_stage, first) for first in (FIRST, other))
    torch.testing.assert_close(same, changed, atol=1e-7, rtol=1e-5)
    assert (of_stage(2, second_stage, FIRST) - of_stage(2, second_stage, other)).abs().max() > 1e-2


def test_the_divergence_pulls_the_first_attempt_back():
    reference = tiny()
    model = moved(reference)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    nothing, found = torch.zeros(2, 3), []
    for _ in range(20):
        value, divergence = loss(model, reference, attempts(), nothing, 1, Config(first_kl=1.0))
        optimizer.zero_grad()
        value.sum().backward()
        optimizer.step()
        found.append(float(divergence[0].sum()))
    assert found[-1] < 0.5 * found[0]


def test_parts_of_a_batch_change_rounding_only(run, monkeypatch):
    """On the same attempts; gradients, for AdamW makes much of the rounding of those that are nothing."""
    original = recipe.attempt
    monkeypatch.setattr(
        recipe, "attempt", lambda model, task, rows, config, *args: original(model, task, rows, Config(max_new=8), *args)
    )
    numbers = {"first_steps": 0, "second_steps": 1}
    (whole, _, _), (parts, _, lines) = (run(out, batch_size=n, **numbers) for out, n in (("whole", 8), ("parts", 3)))
    assert lines[0]["grad_norm"] > 0.1
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_a_run(run, tmp_path):
    model, report, lines = run(samples=2)
    assert list(report) == ["base", "stage I", "stage II"]
    assert [line["stage"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert all(line["return_first"] == 0 for line in lines[:3])
    assert lines[0]["divergence_first"] == pytest.approx(0, abs=1e-6) and lines[-1]["divergence_first"] > 0
    for name in ("first-stage", "model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert json.loads((tmp_path / "run" / "score.json").read_text()) == report


def test_without_stage_one(run):
    _, report, lines = run(first_steps=0)
    assert list(report) == ["base", "stage II"] and {line["stage"] for line in lines} == {2}


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_stopped_run_goes_on_with_the_same_numbers(run, monkeypatch, step):
    whole, report, lines = run("whole")
    original = recipe.update

    def update(*args):
        if args[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(recipe, "update", update)
        run("stopped")
    model, again, resumed = run("stopped", resume=True)
    assert resumed == lines and again == report
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_run_that_is_there(run):
    run()
    with pytest.raises(ValueError, match="a run is there already"):
        run()
    with pytest.raises(ValueError, match="the run there has bonus=10.0, not 0.0"):
        run(resume=True, bonus=0.0)


def test_a_model_that_solves_nothing_is_said_at_once(run, tmp_path):
    with pytest.raises(ValueError, match="score: none of the first 8 problems is solved, so there is nothing to learn from"):
        run(model=small_model(Addition(1), width=32, heads=2))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"problems": 1}, "problems must be 2 or more where samples is 1"),
        ({"bonus": -1.0}, "bonus must be 0 or more, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"max_new": 0}, "max_new must be 1 or more, got 0"),
    ],
)
def test_bad_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_command(solver, tmp_path, capsys):
    model, task = solver
    model.save_pretrained(tmp_path / "base")
    task.tokenizer.save_pretrained(tmp_path / "base")
    options = [f"--model={tmp_path / 'base'}", f"--out={tmp_path / 'run'}", "--task=addition", "--digits=1", "--max-new=8"]
    options += ["--first-steps=1", "--second-steps=1", "--problems=8", "--held-out=4"]
    assert cli.main(["score", *options]) == 0
    assert "stage II" in capsys.readouterr().out
    assert cli.main(["score", *options]) == 3
    assert cli.main(["score", *options, "--model=nothing/there"]) == 3
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.slow
def test_in_stage_one_the_divergence_keeps_the_first_attempt(solver, tmp_path):
    """At a learning rate at which the policy is lost without: the first attempt goes astray, and the second with it."""
    model, task = copy.deepcopy(solver[0]), solver[1]
    rows = task.sample(300, "train", torch.Generator().manual_seed(5))
    once = [(row.prompt_ids, task.completion_ids(row)) for row in rows]
    # Half of the second attempts that it is shown answer another problem.
    again = [(once[i][0] + once[i][1] + task.again_ids, once[i - i % 2][1]) for i in range(len(once))]
    sft(model, once + again, 40, SFTConfig(learning_rate=1e-3, batch_tokens=600))
    divergence, second = [], []
    for hold in (0.1, 0.0):
        shared = {"first_kl": hold, "learning_rate": 2e-3, "max_new": 8, "held_out": 10}
        config = Config(out=str(tmp_path / str(hold)), first_steps=40, second_steps=0, **shared)
        score(copy.deepcopy(model), task, config)
        lines = [json.loads(line) for line in (tmp_path / str(hold) / "metrics.jsonl").read_text().splitlines()]
        divergence.append(fmean(line["divergence_first"] for line in lines[-10:]))
        second.append(fmean(line["accuracy_second"] for line in lines[-10:]))
    assert divergence[0] < 0.3 * divergence[1]
    assert second[0] > second[1] + 0.1
