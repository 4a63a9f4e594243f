"""Test-time compute: equal budgets, chains of revisions, and what a reviser learns from."""

import json
import random

import pytest
import torch

from quietstar.recipes import solve as recipe
from quietstar.recipes.common.sampling import Completion
from quietstar.recipes.common.selectors import Sample, majority
from quietstar.recipes.common.solutions import revision_prompt
from quietstar.recipes.solve import Config, revisions, solve
from quietstar.recipes.tasks import Addition


def test_revisions_end_in_the_right_solution_after_wrong_ones(solver):
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
        assert len(shown) == 1  # with both, the more similar one comes last
        counts.add(len(shown[0]))
    assert counts == {0, 1, 2}
    assert revisions(task, row, written[1:], random.Random(0)) == []


@pytest.mark.parametrize("valid_problems, until", [(0, [8]), (5, [8, 4, 2, 2, 1, 1, 1, 1])])
def test_an_attempt_sees_the_last_four_of_its_own_chain(solver, monkeypatch, valid_problems, until):
    model, task = solver
    rows = task.sample(2, "test", torch.Generator().manual_seed(1))
    asked, prompt_of = [], {}

    def rollout(model, task, prompts, **rest):
        asked.append(len(prompts))
        written = []
        for number, prompt in enumerate(prompts):
            attempt = [3 + len(asked), 3 + number, task.end_id]
            prompt_of[tuple(attempt)] = prompt
            written.append([Completion(attempt, [-1.0] * 3)])
        return written

    answers = []

    def to_samples(task, owners, chains, scorer):
        answers.extend(zip(owners, chains, strict=True))
        return [[Sample(str(x.ids), False, 3, -1.0) for x in chain] for chain in chains]

    monkeypatch.setattr(recipe, "rollout", rollout)
    monkeypatch.setattr(recipe, "to_samples", to_samples)
    chains = recipe.revise(model, task, rows, Config(samples=8, attempts=9, valid_problems=valid_problems))
    assert [[len(chain) for chain in several] for several in chains] == [until, until]
    assert asked == [2 * sum(n > number for n in until) for number in range(8)]
    assert [chain for several in chains for chain in several] == to_samples(
        task, *zip(*answers[: 2 * len(until)], strict=True), None
    )
    for row, chain in answers:
        for number, x in enumerate(chain):
            before = [id_ for y in chain[max(0, number - 4) : number] for id_ in y.ids + task.again_ids]
            assert prompt_of[tuple(x.ids)] == row.prompt_ids + before


def test_solve_measures_everything_at_equal_budgets(solver, tmp_path):
    model, task = solver
    config = Config(out=str(tmp_path), problems=8, samples=8, attempts=4, revise_steps=5, revise_problems=30, max_new=10)
    report = solve(model, task, config)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(x) for x in samples] == [8] * 8
    unit = sum(x["tokens"] for each in samples for x in each) / 64
    chains = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert [[len(chain) for chain in each] for each in chains] == [[4, 4]] * 8  # as many attempts as samples
    longest = max(x["tokens"] for each in samples + [sum(each, []) for each in chains] for x in each)
    for name, points in report["curves"].items():
        assert [point["budget"] for point in points] == pytest.approx([unit, 2 * unit, 4 * unit, 8 * unit]), name
        assert all(point["tokens"] <= max(point["budget"], longest) + 1e-9 for point in points)
    mean = sum(x["right"] for each in samples for x in each) / 64
    oracle = [point["accuracy"] for point in report["curves"]["oracle"]]
    assert oracle[0] == pytest.approx(mean) and oracle == sorted(oracle)
    assert oracle[-1] == sum(any(x["right"] for x in each) for each in samples) / 8
    votes = [majority([Sample(**x) for x in each]).right for each in samples]
    bought_all = [sum(x["tokens"] for x in each) <= 8 * unit for each in samples]
    assert any(bought_all) and abs(report["curves"]["majority"][-1]["accuracy"] - sum(votes) / 8) < 0.2
    assert json.loads((tmp_path / "test_time.json").read_text())["greedy"] == report["greedy"]
    assert set(report["greedy"]) == {"accuracy", "low", "high", "tokens"}
    assert "splits" not in report


def test_splits_are_chosen_on_validation_problems(solver, tmp_path, monkeypatch):
    model, task = solver[0], Addition(2)  # there are only three validation problems with one digit
    asked = []
    sample = Addition.sample
    monkeypatch.setattr(Addition, "sample", lambda self, n, split, x: asked.append((n, split)) or sample(self, n, split, x))
    drawn = []
    chosen = recipe.compute_optimal
    monkeypatch.setattr(recipe, "compute_optimal", lambda *x: drawn.extend(x[:2]) or chosen(*x))
    config = Config(out=str(tmp_path), problems=20, samples=4, attempts=4, valid_problems=10, max_new=10)
    report = solve(model, task, config, lambda rows, solutions: [-float(sum(ids)) for ids in solutions])
    assert asked == [(20, "test"), (10, "valid")]
    assert [(len(x.samples), len(x.chains)) for x in drawn] == [(10, 10), (20, 20)]
    assert all([len(chain) for chain in each] == [4, 2, 1, 1] for x in drawn for each in x.chains)
    first = [[chain[0] for chain in each] for each in drawn[1].chains]
    assert first != [list(each) for each in drawn[1].samples]  # the samples that measure difficulty are not the chains
    names = {"parallel, by the reviser", "sequential, verifier", "one split for all", "compute-optimal"}
    assert names | {"compute-optimal, oracle bins"} <= set(report["curves"])
    assert sum(row["problems"] for row in report["splits"] if row["bins"] == "compute-optimal") == 20
    for name, points in report["curves"].items():
        assert len(points) == 3, name
    shown = []
    monkeypatch.setattr(recipe.plots, "panels", lambda path, title, panels: shown.extend(panels))
    recipe.plot(report, tmp_path / "test_time.png")
    assert set(shown[0].curves) == {*recipe.selectors(True), "oracle", "greedy"}
    assert set(shown[0].curves) | set(shown[1].curves) == {*report["curves"], "greedy"}
    for panel, row in zip(shown[2:], [x for x in report["splits"] if "oracle" in x["bins"]], strict=True):
        assert list(panel.bars) == ["chains of 1", "chains of 2", "chains of 4"]
        assert [x for [x] in panel.bars.values()] == list(row["accuracy"].values())


def test_a_chain_that_grows_too_long_keeps_the_samples(solver, tmp_path):
    model, task = solver
    config = Config(out=str(tmp_path), problems=5, samples=4, attempts=4, max_new=115)
    with pytest.raises(ValueError, match="has 128 positions, and prompt and completion need"):
        solve(model, task, config)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 5


def test_nothing_to_choose_from(solver, tmp_path, monkeypatch):
    model, task = solver
    monkeypatch.setattr(Addition, "answer", lambda *_: None)
    with pytest.raises(ValueError, match="solve: no solution of 5 problems has an answer that can be read"):
        solve(model, task, Config(out=str(tmp_path / "out"), problems=5, samples=2, max_new=10))
    assert not (tmp_path / "out").exists()


def test_bad_options(solver, monkeypatch):
    model, task = solver
    monkeypatch.setattr(recipe, "rollout", None)  # refused before anything is sampled
    with pytest.raises(ValueError, match="valid_problems=4 must be 5 or more, and the data must have as many: got 4"):
        solve(model, Addition(2), Config(valid_problems=4))
    monkeypatch.setattr(Addition, "problems", lambda self, n, split, generator: [self.problem(1, 2)] * (3 if n == 20 else n))
    with pytest.raises(ValueError, match="valid_problems=20 must be 5 or more, and the data must have as many: got 3"):
        solve(model, task, Config(valid_problems=20))
    with pytest.raises(ValueError, match="solve: valid_problems must be 0 or more, got -1"):
        Config(valid_problems=-1)
    with pytest.raises(ValueError, match="temperature must be above 0, or all samples are one, got 0"):
        Config(temperature=0)
    with pytest.raises(ValueError, match="solve: samples must be 1 or more, got 0"):
        Config(samples=0)
