"""SCoRe: what each attempt earns, which gradient each stage has, and how a run resumes."""

import copy
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from quietstar.cli import main as cli
from quietstar_recipes.common.logprobs import logprob
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import Completion, rollout
from quietstar_recipes.score import attempts as score_attempts
from quietstar_recipes.score import baselines
from quietstar_recipes.score import run as recipe
from quietstar_recipes.score.attempts import Attempts, accuracy_by_attempt, attempt, votes
from quietstar_recipes.score.baselines import corrected, paired
from quietstar_recipes.score.objective import Objective, advantages, by_turn, divergence, log_ratios, loss
from quietstar_recipes.score.run import Config, evaluate, score
from quietstar_recipes.tasks import Addition
from tests.recipes.conftest import json_lines, same, seeded

SAMPLING = {"temperature": 1.0, "max_new": 8, "batch_size": 256}
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
FIRST, SECOND = [[3, 4], [5, 6, 7], [8]], [[9], [3, 4], [5, 6, 7, 8]]


def tiny(seed=0, dtype=torch.float64):
    return small_model(Addition(1), layers=2, width=32, heads=2, positions=64, seed=seed).to(dtype).eval()


def moved(model, by=0.05):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += by * torch.randn(p.shape, generator=seeded(i), dtype=p.dtype)
    return other


@pytest.fixture
def run(solver, tmp_path):
    def start(out="run", resume=False, model=None, task=None, base=None, **changes):
        numbers = {"first_steps": 3, "second_steps": 3, "problems": 8, "samples": 2, "max_new": 8, "held_out": 10}
        fixed = {"save_every": 100, "chains": 0, "attempts": 2}
        config = Config(out=str(tmp_path / out), **{**numbers, **fixed, **changes})
        model, report = score(copy.deepcopy(model or solver[0]), task or Addition(1), config, resume=resume, base=base)
        return model, report, json_lines(tmp_path / out / "metrics.jsonl")

    return start


def made(first, second, rewards=None, own=None, prompts=None):
    """Attempts at problems of which only the prompts are there; all right by default, and the model's own."""
    R = len(first)
    prompts = prompts or [[5]] * R
    rows, requests = [SimpleNamespace(prompt_ids=prompt) for prompt in prompts], [prompt + [4] for prompt in prompts]
    rewards = torch.ones(2, R) if rewards is None else rewards
    own = torch.ones(R, dtype=torch.bool) if own is None else own
    revised = torch.tensor([x != y for x, y in zip(first, second, strict=True)], dtype=torch.bool)
    return Attempts(rows, first, requests, second, rewards, torch.zeros(2, R), own, revised)


@pytest.mark.parametrize(
    "stage, changes, first, second",
    [
        (1, {}, [0, 0, 0, 0], [0, 1, 0, 1]),
        (2, {"bonus": 0.0}, [0, 0, 1, 1], [0, 1, 0, 1]),
        (2, {"bonus": 10.0}, [0, 0, 1, 1], [0, 11, 0, 11]),
        (2, {"bonus": 10.0, "credit": "joint"}, [0, 11, -9, 2], [0, 11, 0, 11]),
        (1, {"credit": "joint"}, [0, 1, 0, 1], [0, 1, 0, 1]),
        (2, {"single_turn": True}, [0, 0, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_what_attempts_earn(stage, changes, first, second):
    """Wrong twice, wrong then right, right then wrong, right twice."""
    right = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    objective = Objective(**changes)
    assert objective.returns(right, stage, torch.zeros(2, 4)).tolist() == [first, second]
    penalty = torch.tensor([[0.5], [0.25]]).expand(2, 4)
    both = 0.75 if objective.credit == "joint" else 0.5
    assert objective.returns(right, stage, penalty).tolist() == [[x - both for x in first], [x - 0.25 for x in second]]


def test_advantages_compare_with_the_others():
    earned = torch.tensor([[0.0, 1.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    over_batch = [[x - (sum(row) - x) / 3 for x in row] for row in earned.tolist()]
    torch.testing.assert_close(advantages(earned, 1), torch.tensor(over_batch))
    torch.testing.assert_close(advantages(earned, 2), torch.tensor([[-1.0, 1.0, 1.0, -1.0], [4.0, -4.0, 0.0, 0.0]]))


def test_figures_count_what_was_fixed_and_broken():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    first, second = [[1], [1, 2], [3], [4], [5]], [[1], [1, 3], [7], [4], [6]]
    found = made(first, second, rewards).figures()
    names = ("accuracy_first", "accuracy_second", "fixed", "broken", "revised", "edited")
    assert [found[name] for name in names] == [0.4, 0.6, 0.4, 0.2, 0.6, 0.6]
    assert found["delta"] == pytest.approx(found["fixed"] - found["broken"])
    assert found["low"] < found["delta"] < found["high"]
    assert made(first, second, rewards).part([1, 2]).figures()["accuracy_second"] == 0.5
    same_answers = dataclasses.replace(made(first, second), revised=torch.zeros(5)).figures()
    assert (same_answers["revised"], same_answers["edited"]) == (0, 0.6)  # another chain is an edit


def test_the_second_attempt_sees_the_first_but_not_the_answer(monkeypatch):
    """Of first attempts the base writes its share, of second ones none."""
    task = Addition(1)
    rows = task.sample(10, "train", seeded(3))
    asked = []

    def rollout(writer, task, prompts, **rest):
        asked.append((writer, prompts))
        alike = [task.completion_ids(rows[0])] * len(prompts)
        if len(asked) % 3:  # a first attempt
            alike = [[3 if writer == "base" else 4, task.end_id] for _ in prompts]
        return [[Completion(ids, [-1.0] * len(ids))] for ids in alike]

    monkeypatch.setattr(score_attempts, "rollout", rollout)
    found = attempt("model", task, rows, SAMPLING, 0, "base", share=0.35)
    assert found.own.tolist().count(False) == 3
    for row, own, first, request in zip(rows, found.own.tolist(), found.first, found.requests, strict=True):
        assert first == [4 if own else 3, task.end_id] and request == row.prompt_ids + first + task.again_ids
    assert [(writer, len(prompts)) for writer, prompts in asked] == [("model", 7), ("base", 3), ("model", 10)]
    assert asked[2][1] == found.requests
    right = [row.problem.right == rows[0].problem.right for row in rows]
    assert found.rewards.tolist() == [[0.0] * 10, right] and 1 <= sum(right) < 10
    other = attempt("model", task, rows, SAMPLING, 1, "base", share=0.35)
    assert other.own.sum() == 7 and not torch.equal(other.own, found.own)
    assert attempt("model", task, rows, SAMPLING, 0).own.all()


def test_the_divergence_is_the_row_by_row_result():
    model, base_model = tiny(), moved(tiny())
    for prompt, ids, found in zip(PROMPTS, FIRST, divergence(model, base_model, PROMPTS, FIRST), strict=True):
        p, q = (m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, base_model))
        torch.testing.assert_close(found, kl_div(q, p, log_target=True, reduction="sum").float(), rtol=1e-5, atol=0)
        assert found > 1e-4


def gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, model.parameters(), strict=True)]
    )


def attempts(first=FIRST, second=SECOND, own=None):
    return made(first, second, own=own, prompts=PROMPTS)


def test_the_loss_is_reinforce():
    model = tiny()
    advantage = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, -0.25]])
    p1, p2 = (logprob(model, *turn)[0].sum(1) for turn in attempts().turns())
    policy = -advantage[0] * p1 - advantage[1] * p2
    torch.testing.assert_close(loss(model, attempts(), advantage, False), policy)
    found = loss(model, attempts(own=torch.tensor([True, False, True])), advantage, False)
    torch.testing.assert_close(found, policy + torch.tensor([0, -1, 0]) * p1)  # the base's first attempts aren't reinforced
    torch.testing.assert_close(loss(model, attempts(), advantage, True), -advantage[0] * p1)


@pytest.mark.parametrize("single_turn", [False, True])
def test_the_loss_is_the_same_with_trees(both, single_turn):
    """Two attempts at each of two problems, of which the second goes on from the first without its end."""
    model, base_model = tiny(dtype=torch.float32), moved(tiny(dtype=torch.float32))
    prompts = [[5, 6, 7]] * 2 + [[5, 9]] * 2
    first, second = [[3, 4, 2], [5, 2], [8, 2], [8, 2]], [[9], [3, 4], [5, 6, 7, 8], [5]]
    found = made(first, second, prompts=prompts)
    found = dataclasses.replace(found, requests=[prompt + ids[:-1] + [4] for prompt, ids in zip(prompts, first, strict=True)])
    advantage = torch.tensor([[0.5, -1.0, 2.0, 0.25], [3.0, 0.0, -0.25, 1.0]])

    def step():
        value = loss(model, found, advantage, single_turn)
        apart = by_turn(model, list(found.turns()), partial(divergence, model, base_model))
        return value.detach(), gradient(value.sum(), model), log_ratios(base_model, found, 256), torch.stack(apart).detach()

    plain, shared = both(step)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)


def test_the_divergence_in_the_reward_is_that_of_whole_attempts():
    """Over all attempts of two tokens: in expectation its gradient is the divergence's."""
    model, base_model = tiny(), moved(tiny(), 0.2)
    V = model.config.vocab_size
    both = [[i, j] for i in range(V) for j in range(V)]
    every = made(both, both, prompts=[[5]] * len(both))
    own, other = (logprob(x, [[5]] * len(both), both)[0].sum(1) for x in (model, base_model))
    p = own.exp()
    exact = gradient((p * (own - other.detach())).sum(), model)
    every.logprob[:] = own.detach()
    ratio = log_ratios(base_model, every, 100)[0]
    torch.testing.assert_close(ratio, (own - other).detach().float(), atol=1e-5, rtol=1e-4)
    weighted = gradient((p.detach() * loss(model, every, torch.stack([-ratio, 0 * ratio]), False)).sum(), model)
    torch.testing.assert_close(weighted, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_the_batch_size_changes_only_rounding(run, monkeypatch):
    """On the same attempts. Gradients are compared, since AdamW turns the rounding of zero gradients into large steps."""
    original = recipe.attempt
    monkeypatch.setattr(
        recipe, "attempt", lambda model, task, rows, sampling, *args: original(model, task, rows, SAMPLING, *args)
    )
    numbers = {"first_steps": 0, "second_steps": 1}
    (whole, _, _), (parts, _, lines) = (run(out, batch_size=n, **numbers) for out, n in (("whole", 8), ("parts", 3)))
    assert lines[0]["grad_norm"] > 0.1
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_a_run(run, tmp_path):
    model, report, lines = run(chains=2, attempts=3)
    assert list(report) == ["base", "stage I", "stage II"]
    assert [line["stage"] for line in lines] == [1, 1, 1, 2, 2, 2]
    for line in lines[:3]:
        assert line["return_first"] == pytest.approx(-0.1 * line["divergence_first"] * line["tokens_first"] / 16, abs=1e-5)
        assert line["reward"] == line["accuracy_second"]
    assert lines[3]["reward"] == lines[3]["accuracy_first"] + lines[3]["accuracy_second"]
    assert abs(lines[0]["divergence_first"]) < 1e-5 < abs(lines[-1]["divergence_first"])  # a mean of samples has any sign
    for name in ("first-stage", "model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert same(model, saved)
    assert json.loads((tmp_path / "run" / "score.json").read_text()) == report
    assert (tmp_path / "run" / "score.png").read_bytes().startswith(b"\x89PNG")
    for figures in report.values():
        assert figures["problems"] == 8  # there are no more
        assert [point["chains"] for point in figures["votes"]] == [1, 2]
        both = [figures["accuracy_first"], figures["accuracy_second"]]
        assert figures["accuracy_by_attempt"][:2] == both and len(figures["accuracy_by_attempt"]) == 3
    assert report["base"]["divergence_second"] == pytest.approx(0, abs=1e-6)
    assert report["stage II"]["divergence_second"] > 1e-4


@pytest.mark.long
def test_the_warm_up_teaches_to_answer_again(run, tmp_path, caplog):
    """What the divergence is measured from is the model after the warm-up, also in a continued run."""
    warm = {"two_turn_steps": 60, "two_turn_problems": 200, "two_turn_rate": 2e-3}
    task = Addition(1)
    task.problems = lambda n, split, generator: Addition.problems(task, n, "train", generator)  # there are few others
    short = {"task": task, "first_steps": 0, "second_steps": 1}
    cold, warmed = (run(out, **short, **changes)[1]["base"] for out, changes in (("cold", {}), ("warm", warm)))
    assert cold["accuracy_second"] == 0 < warmed["accuracy_second"]
    assert warmed["divergence_first"] == pytest.approx(0, abs=1e-6)
    assert caplog.messages == [recipe.NO_SECOND_ATTEMPT] and "two_turn_steps=200" in recipe.NO_SECOND_ATTEMPT
    AutoModelForCausalLM.from_pretrained(tmp_path / "warm/two-turns")


def test_the_warm_up_is_on_the_models_own_attempts(solver, monkeypatch):
    """Each is followed by another one, drawn independently of it."""
    model, task = solver
    taught = []
    monkeypatch.setattr(recipe, "sft", lambda model, examples, *rest: taught.extend(examples))
    recipe.learn_two_turns(model, task, Config(two_turn_problems=40, two_turn_steps=1, max_new=8))
    once, again = taught[::2], taught[1::2]
    assert len(once) == len(again) == 40 and len({len(prompt) for prompt, _ in once}) == 1
    assert all(request == prompt + first + task.again_ids for (prompt, first), (request, _) in zip(once, again, strict=True))
    drawn = rollout(model, task, [prompt for prompt, _ in once], 2, max_new=8, temperature=1.0, seed=0)
    assert [[first, second] for (_, first), (_, second) in zip(once, again, strict=True)] == [[x.ids for x in k] for k in drawn]
    assert any(first != second for (_, first), (_, second) in zip(once, again, strict=True))


def test_the_base_and_the_optimizer_of_each_stage(run, solver, monkeypatch):
    made, original = [], recipe.adamw
    monkeypatch.setattr(recipe, "adamw", lambda *arguments: made.append(original(*arguments)) or made[-1])
    monkeypatch.setattr(recipe, "plot", lambda *_: None)
    short = {"first_steps": 1, "second_steps": 1, "held_out": 4}
    _, report, _ = run(base=moved(solver[0]), **short)
    assert report["base"]["divergence_first"] > 1e-3 and len(made) == 2


def test_first_attempts_of_the_base_are_not_in_the_figures(run, monkeypatch):
    seen = []
    original = recipe.attempt
    monkeypatch.setattr(recipe, "attempt", lambda *args: seen.append(original(*args)) or seen[-1])
    _, report, lines = run(from_base=0.5, first_steps=0, second_steps=2)
    assert [int(x.own.sum()) for x in seen] == [8, 8, 8, 8]  # at test time all are the model's
    for line, found in zip(lines, seen[1:3], strict=True):
        assert line["accuracy_first"] == float(found.rewards[0][found.own].mean())
    assert report["stage II"]["votes"] == []


def test_votes_compare_at_equal_budgets(solver, monkeypatch):
    """First attempts are right one time in four, second ones always."""
    model, task = solver
    rows = task.sample(6, "test", seeded(1))

    def rollout(model, task, prompts, k=1, **rest):
        found = []
        for prompt in prompts:
            row = next(row for row in rows if prompt[: len(row.prompt_ids)] == row.prompt_ids)
            right, wrong = task.completion_ids(row), [row.cot_ids[0], task.end_id]
            again = len(prompt) > len(row.prompt_ids)
            written = [right if again or i % 4 == 0 else wrong for i in range(k)]
            found.append([Completion(ids, [-0.1] * len(ids)) for ids in written])
        return found

    monkeypatch.setattr(score_attempts, "rollout", rollout)
    points = votes(model, task, rows, 4, SAMPLING, seed=0)
    assert [point["chains"] for point in points] == [1, 2, 4]
    long = len(task.completion_ids(rows[0]))
    # In the first pair both attempts are right; in later pairs the first one is short. Only right answers vote.
    assert [point["tokens"] for point in points] == [2 * long, 3 * long + 2, 5 * long + 6]
    for point in points[:2]:
        assert point["tokens"] <= point["tokens_parallel"] < point["tokens"] + long
    assert all(point["corrected"] == point["parallel"] == 1 for point in points)


def test_evaluate_is_of_greedy_attempts(solver):
    model, task = copy.deepcopy(solver[0]), solver[1]
    test = task.sample(30, "test", seeded(1))
    config = Config(max_new=8, batch_size=7, chains=0)
    found = evaluate(moved(model, 0.02), model, task, test, config)
    greedy = attempt(moved(model, 0.02), task, test, config.sampling(0.0), config.seed)
    assert found.items() >= greedy.figures().items()
    assert len(found["accuracy_by_attempt"]) == config.attempts
    nats = divergence(moved(model, 0.02), model, greedy.requests, greedy.second)
    assert found["divergence_second"] == pytest.approx(float(nats.sum().detach()) / sum(map(len, greedy.second)), rel=1e-4)


def test_every_attempt_sees_the_one_before(solver, monkeypatch):
    """The third and the fifth are right here, all others wrong."""
    model, task = solver
    rows = task.sample(4, "test", seeded(1))
    asked = []

    def rollout(model, task, prompts, **rest):
        asked.append(prompts)
        right = len(asked) in (3, 5)
        return [[Completion(task.completion_ids(row) if right else [3, task.end_id], [-1.0])] for row in rows]

    monkeypatch.setattr(score_attempts, "rollout", rollout)
    both = attempt(model, task, rows, SAMPLING, 0)
    assert accuracy_by_attempt(model, task, both, 6, SAMPLING, 0) == [0, 0, 1, 0, 1, 0]
    for row, *prompts in zip(rows, *asked[2:], strict=True):
        wrong, right = [3, task.end_id], task.completion_ids(row)
        assert prompts == [row.prompt_ids + ids + task.again_ids for ids in (wrong, right, wrong, right)]


@pytest.mark.parametrize(
    "rewards, save_every, kept",
    [([0.1, 0.9, 0.5, 0.2], 2, 4), ([0.1, 0.2, 0.5, 0.9], 2, 8), ([0.5, 0.5, 0.5, 0.5], 2, 2), ([0.1, 0.9, 0.5, 0.2], 3, 4)],
)
def test_the_checkpoint_of_the_highest_training_reward_is_kept(run, solver, tmp_path, monkeypatch, rewards, save_every, kept):
    """The reward is that since the checkpoint before; the first stage's, however high, does not count in the second."""

    def gradient(model, base, task, config, step):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        reward = 5.0 if step < 2 else rewards[(step - 2) // 2] + 0.01 * (-1) ** step
        return {"loss": 0.0, "stage": 1 if step < 2 else 2, "reward": reward}

    monkeypatch.setattr(recipe, "attempt_gradient", gradient)
    monkeypatch.setattr(recipe, "evaluate", lambda *_: {"accuracy_second": 1.0})
    monkeypatch.setattr(recipe, "plot", lambda *_: None)
    numbers = {"first_steps": 2, "second_steps": 8, "save_every": save_every}
    begin = next(solver[0].parameters())
    for keep, updates in (("best", 2 + kept), ("last", 10)):
        model, _, _ = run(keep, keep=keep, **numbers)
        for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path / keep / "model")):
            torch.testing.assert_close(next(found.parameters()), begin + updates)
    assert (tmp_path / "best/best").exists() and not (tmp_path / "last/best").exists()


@pytest.mark.long
def test_a_resumed_run_gives_the_same_numbers(run, continues, ended):
    """Stopped in the first update of each stage: the moments matter for the figures of the third."""
    continues(run, ended(recipe, "attempt_gradient", 0), ended(recipe, "attempt_gradient", 2), save_every=2)


@pytest.mark.parametrize("saves", [0, 1, 2, 3])
def test_a_run_killed_after_its_best_checkpoint_and_before_its_state(run, continues, ended, monkeypatch, saves):
    """Each stage's first checkpoint is its best; the kill is as the state is saved, after as many saves."""

    def gradient(model, base, task, config, step):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        figures = dict.fromkeys(recipe.Update.__struct_fields__[1:], 0.0)
        return figures | {"loss": 0.0, "stage": 1 if step < 3 else 2, "reward": 1 / (step + 1)}

    warmed = []
    monkeypatch.setattr(recipe, "learn_two_turns", lambda *_: warmed.append(1))
    monkeypatch.setattr(recipe, "attempt_gradient", gradient)
    monkeypatch.setattr(recipe, "plot", lambda *_: None)
    continues(run, ended(recipe.Progress, "save", saves, killed=True), save_every=2, two_turn_steps=1)
    assert len(warmed) == (2 if saves else 3)  # once a run, and again where nothing was saved


def test_a_line_of_metrics_without_a_figure_is_named(run, tmp_path):
    run()
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text().replace("divergence_second", "divergence", 1))
    with pytest.raises(ValueError, match=f"^{path}: line 1: .*divergence_second"):
        run(resume=True)


def test_a_model_that_solves_nothing_is_reported_at_once(run, tmp_path):
    with pytest.raises(ValueError, match="score: none of the first 16 problems is solved, so there is nothing to learn from"):
        run(model=small_model(Addition(1), width=32, heads=2))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.long
def test_command(solver_folder, tmp_path, capsys):
    options = [f"--model={solver_folder}", f"--out={tmp_path / 'run'}", "--task=addition", "--digits=1", "--max-new=8"]
    options += ["--first-steps=1", "--second-steps=1", "--problems=8", "--held-out=4", "--chains=1", "--attempts=3"]
    assert cli.main(["score", *options]) == 0
    printed = capsys.readouterr().out
    assert "stage II" in printed and "attempt 3" in printed


# The baselines learn from right attempts after wrong ones, of the model's own.


@pytest.fixture
def rows(solver):
    return solver[1].sample(20, "train", seeded(3))


def test_pairs_are_a_wrong_and_a_right_attempt_at_one_problem(solver, rows):
    model, task = solver
    found = paired(model, task, rows, 4, SAMPLING, seed=0)
    drawn = rollout(model, task, [row.prompt_ids for row in rows], 4, **SAMPLING, seed=0)
    expected, numbers = [], []
    for row, completions in zip(rows, drawn, strict=True):
        right = [x.ids for x in completions if task.check(row, x.ids)]
        wrong = [x.ids for x in completions if not task.check(row, x.ids)]
        numbers.append(min(len(right), len(wrong)))
        for first, second in list(zip(wrong, right, strict=False)):
            expected.append((row.prompt_ids + task.trimmed(first) + task.again_ids, second))
    assert found == expected and len(found) == sum(numbers) > 3


def test_corrections_are_second_attempts_that_are_right_after_a_wrong_one(monkeypatch):
    """Of four attempts: wrong twice, wrong then right, right then wrong, right twice."""
    rewards, asked = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]), []
    drawn = made([[5], [6], [7], [8]], [[9], [10], [11], [12]], rewards)
    monkeypatch.setattr(baselines, "attempt", lambda model, task, rows, *rest: asked.append(rows) or drawn)
    assert corrected(None, Addition(1), ["a", "b"], 2, SAMPLING, seed=0) == [(drawn.requests[1], [10])]
    assert asked == [["a", "a", "b", "b"]]
