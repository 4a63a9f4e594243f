"""Test-time compute: equal budgets, chains of revisions, and what a reviser learns from."""

import json
import random

import pytest
import torch

from quietstar.recipes import test_time as recipe
from quietstar.recipes.sampling import Completion
from quietstar.recipes.selectors import Sample, majority
from quietstar.recipes.test_time import Config, affordable, curve, revision_prompt, revisions, solve
from quietstar.tasks import Addition


def several(*parts):
    return [Sample(answer, answer == "8", tokens, -1.0) for answer, tokens in parts]


def test_a_budget_buys_whole_solutions_and_one_at_least():
    samples = several(("3", 4), ("8", 6), ("8", 5))
    assert [len(affordable(samples, budget)) for budget in (1, 4, 9.9, 10, 14, 15, 99)] == [1, 1, 1, 2, 2, 3, 3]


def test_curves_are_means_over_problems_at_the_tokens_that_were_used():
    problems = [several(("3", 4), ("8", 6), ("8", 5)), several(("8", 2), ("8", 2), ("3", 2))]
    points = curve(problems, majority, [4, 15], shuffles=1)
    assert [point["accuracy"] for point in points] == [0.5, 1.0]
    assert [point["tokens"] for point in points] == [(4 + 4) / 2, (15 + 6) / 2]
    first = curve(problems, lambda x: x[0], [4], shuffles=400)[0]
    assert first["accuracy"] == pytest.approx(2 / 3, abs=0.06)  # a random one of each problem


def test_revisions_end_in_the_right_solution_behind_wrong_ones(solver):
    _, task = solver
    row, other, third = task.sample(3, "train", torch.Generator().manual_seed(1))
    right = task.completion_ids(row)
    near = right[:-2] + [x for x in other.answer_ids if x != right[-2]][:1] + [task.end_id]
    far = [task.separator_ids[0], third.prompt_ids[0], task.end_id]
    written = [Completion(ids, [0.0] * len(ids)) for ids in (right, far, near)]
    if task.check(row, near):
        pytest.skip("the other answer is the same one")
    counts = set()
    for seed in range(40):
        [(prompt, target)] = revisions(task, row, written, random.Random(seed))
        assert target == right
        shown = [ids for ids in ([], [far], [near], [far, near]) if revision_prompt(task, row, ids) == prompt]
        assert len(shown) == 1  # with both, the nearer one comes last
        counts.add(len(shown[0]))
    assert counts == {0, 1, 2}
    assert revisions(task, row, written[1:], random.Random(0)) == []


def test_an_attempt_sees_the_last_four_before_it(solver, monkeypatch):
    model, task = solver
    rows = task.sample(2, "test", torch.Generator().manual_seed(1))
    asked = []

    def rollout(model, task, prompts, **rest):
        asked.append(prompts)
        return [[Completion([3 + len(asked), task.end_id], [-1.0, -1.0])] for _ in prompts]

    monkeypatch.setattr(recipe, "rollout", rollout)
    chains = recipe.revise(model, task, rows, Config(attempts=6))
    assert [len(chain) for chain in chains] == [6, 6]
    attempt = [[3 + number, task.end_id] + task.again_ids for number in range(1, 6)]
    assert asked[0][1] == rows[1].prompt_ids
    assert asked[2][1] == rows[1].prompt_ids + attempt[0] + attempt[1]
    assert asked[5][1] == rows[1].prompt_ids + [x for ids in attempt[1:5] for x in ids]


def test_solve_measures_everything_at_equal_budgets(solver, tmp_path):
    model, task = solver
    config = Config(out=str(tmp_path), problems=40, samples=8, attempts=3, revise_steps=5, revise_problems=30, max_new=10)
    report = solve(model, task, config)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(x) for x in samples] == [8] * 40
    unit = sum(x["tokens"] for each in samples for x in each) / 320
    for name, points in report["curves"].items():
        assert [point["budget"] for point in points] == pytest.approx([unit, 2 * unit, 4 * unit, 8 * unit]), name
        longest = max(x["tokens"] for each in samples for x in each)
        assert all(point["tokens"] <= max(point["budget"], longest) + 1e-9 for point in points)
    mean = sum(x["right"] for each in samples for x in each) / 320
    oracle = [point["accuracy"] for point in report["curves"]["oracle"]]
    assert oracle[0] == pytest.approx(mean) and oracle == sorted(oracle)
    assert oracle[-1] == sum(any(x["right"] for x in each) for each in samples) / 40
    votes = [majority([Sample(**x) for x in each]).right for each in samples]
    bought_all = [sum(x["tokens"] for x in each) <= 8 * unit for each in samples]
    assert any(bought_all) and abs(report["curves"]["majority"][-1]["accuracy"] - sum(votes) / 40) < 0.2
    assert json.loads((tmp_path / "test_time.json").read_text())["greedy"] == report["greedy"]


def test_nothing_to_choose_from(solver, tmp_path, monkeypatch):
    model, task = solver
    monkeypatch.setattr(Addition, "answer", lambda *_: None)
    with pytest.raises(ValueError, match="solve: no solution of 5 problems has an answer that can be read"):
        solve(model, task, Config(out=str(tmp_path / "out"), problems=5, samples=2, max_new=10))
    assert not (tmp_path / "out").exists()


def test_bad_options():
    with pytest.raises(ValueError, match="temperature must be above 0, or all samples are one, got 0"):
        Config(temperature=0)
    with pytest.raises(ValueError, match="solve: samples must be 1 or more, got 0"):
        Config(samples=0)
