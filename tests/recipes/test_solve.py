"""Test-time compute: all methods at equal budgets."""

import json
from dataclasses import replace

import pytest

from quietstar.run.batches import mix_seed
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.saving import load_model
from quietstar_recipes.common.selectors import Sample, majority
from quietstar_recipes.solve import run as recipe
from quietstar_recipes.solve.budgets import DIFFICULTIES, PREDICTED, compute_optimal
from quietstar_recipes.solve.run import Config, Methods, draw, solve
from quietstar_recipes.tasks import Addition
from tests.recipes.conftest import json_lines, seeded


def test_solve_measures_everything_at_equal_budgets(solver, tmp_path):
    model, task = solver
    training = {"revise_steps": 5, "revise_problems": 30, "revise_samples": 8, "judge_steps": 2}
    config = Config(out=str(tmp_path), problems=8, samples=8, attempts=4, max_new=10, **training)
    report = solve(model, task, config)
    samples = json_lines(tmp_path / "samples.jsonl")
    assert [len(x) for x in samples] == [8] * 8
    unit = sum(x["tokens"] for each in samples for x in each) / 64
    chains = json_lines(tmp_path / "chains.jsonl")
    assert [[len(chain) for chain in each] for each in chains] == [[4, 4]] * 8  # as many attempts as samples
    longest = max(x["tokens"] for each in samples + [sum(each, []) for each in chains] for x in each)
    for name, points in report["curves"].items():
        assert [point["budget"] for point in points] == pytest.approx([unit, 2 * unit, 4 * unit, 8 * unit]), name
        assert all(point["tokens"] <= max(point["budget"] + longest / 2, longest) + 1e-9 for point in points)
    mean = sum(x["right"] for each in samples for x in each) / 64
    oracle = [point["accuracy"] for point in report["curves"]["oracle"]]
    assert oracle[0] == pytest.approx(mean) and oracle == sorted(oracle)
    assert oracle[-1] == sum(any(x["right"] for x in each) for each in samples) / 8
    votes = [majority([Sample(**x) for x in each]).right for each in samples]
    bought_all = [sum(x["tokens"] for x in each) <= 8 * unit for each in samples]
    assert any(bought_all) and abs(report["curves"]["majority"][-1]["accuracy"] - sum(votes) / 8) < 0.2
    assert json.loads((tmp_path / "test_time.json").read_text())["greedy"] == report["greedy"]
    assert set(report["greedy"]) == {"accuracy", "low", "high", "tokens"}
    assert not {"chosen", "larger"} & set(report) and "sequential, verifier" in report["curves"]


@pytest.mark.long
def test_ways_are_chosen_on_validation_problems(solver, tmp_path, monkeypatch):
    model, task = solver[0], Addition(2)  # there are only three validation problems with one digit
    asked = []
    sample = Addition.sample
    monkeypatch.setattr(Addition, "sample", lambda self, n, split, x: asked.append((n, split)) or sample(self, n, split, x))
    spent = []
    spend = Methods.spend
    monkeypatch.setattr(Methods, "spend", lambda *x: spent.append(spend(*x)) or spent[-1])
    chosen = []
    monkeypatch.setattr(recipe, "compute_optimal", lambda *x: chosen.append(x) or compute_optimal(*x))
    options = {"problems": 12, "samples": 2, "attempts": 2, "valid_problems": 10, "max_new": 10, "beam_width": 2}
    scorer = lambda rows, solutions: [-float(sum(ids)) for ids in solutions]  # noqa: E731
    report = solve(model, task, Config(out=str(tmp_path), **options), scorer, process=model)
    assert asked == [(12, "test"), (10, "valid")]
    [(test, chains), (valid, valid_chains)] = spent
    assert [len(chains), len(valid_chains)] == [12, 10]
    assert all([len(chain) for chain in each] == [2, 1] for each in [*chains, *valid_chains])
    assert list(test) == list(valid) == ["parallel", "search", "sequential", "splits"]
    assert [x[2:] for x in chosen] == [(valid[kind], test[kind]) for kind in ("search", "splits")]
    samples = [[Sample(**x) for x in line] for line in json_lines(tmp_path / "samples.jsonl")]
    assert all(len(x[1]) == 12 and x[1] != samples for x in chosen)  # difficulty is not measured on what is spent
    assert set(report["curves"]) == {
        *("one sample", "majority", "likeliest", "best of k", "weighted vote", "oracle", "beam search", "look-ahead search"),
        *("best of k, process verifier", "weighted vote, process verifier"),
        *("sequential, majority", "sequential, last", "sequential, verifier", "chains of 1", "chains of 2"),
        *(f"{name}, {kind}" for name in DIFFICULTIES for kind in ("search", "splits")),
    }
    assert sum(row["problems"] for row in report["chosen"] if row["bins"] == PREDICTED and row["kind"] == "splits") == 12
    shown = []
    monkeypatch.setattr(recipe.plots, "panels", lambda path, title, panels: shown.extend(panels))
    recipe.plot(report, tmp_path / "test_time.png")
    assert set(shown[0].curves) | set(shown[1].curves) == {*report["curves"], "greedy"}
    assert "beam search" in shown[0].curves and "chains of 2" in shown[1].curves


def test_search_spends_as_much_as_independent_solutions(solver, tmp_path):
    """At every budget the solutions have one length here; a look ahead costs about as much as a step."""
    model, task = solver
    options = {"process_steps": 2, "process_problems": 20, "process_samples": 1, "rollouts": 1, "learning_rate": 1e-3}
    config = Config(out=str(tmp_path), problems=6, samples=4, attempts=0, max_new=10, beam_width=2, **options)
    report = solve(model, task, config)
    curves = report["curves"]
    for name in ("beam search", "look-ahead search", "weighted vote, process verifier"):
        assert all(x["tokens"] <= 1.3 * x["budget"] for x in curves[name]), name
    again = load_model(tmp_path / "process", model)
    reused = solve(model, task, replace(config, out=str(tmp_path / "again"), process_steps=0), process=again)
    assert reused["curves"] == curves
    assert not (tmp_path / "again" / "process").exists()


def test_a_larger_model_gets_fewer_solutions(solver, tmp_path):
    model, task = solver
    larger = small_model(task, width=128, heads=2, positions=128)
    times = larger.num_parameters() / model.num_parameters()
    config = Config(out=str(tmp_path), problems=6, samples=8, attempts=0, max_new=10)
    report = solve(model, task, config, larger=(larger, task))
    assert report["larger"]["times"] == times and 3 < times < 4
    points = report["curves"]["larger model, majority"]
    assert points[-1]["tokens"] <= points[-1]["budget"] or points[-1]["tokens"] == points[0]["tokens"]
    alone = draw(larger, task, task.sample(6, "test", seeded(mix_seed(0, 0))), config, None)
    assert points[0]["tokens"] == pytest.approx(times * sum(x.tokens for each in alone for x in each) / 48, rel=0.1)
    same = solve(model, task, replace(config, out=str(tmp_path / "same")), larger=(model, task))
    assert same["larger"]["greedy"] == same["greedy"]
    assert same["curves"]["larger model, majority"] == same["curves"]["majority"]


def test_bad_options(solver, monkeypatch):
    model, task = solver
    monkeypatch.setattr(recipe, "write", None)  # refused before anything is sampled
    with pytest.raises(ValueError, match="valid_problems=4 must be 5 or more, and the data must have as many: got 4"):
        solve(model, Addition(2), Config(valid_problems=4))
    monkeypatch.setattr(Addition, "problems", lambda self, n, split, generator: [self.problem(1, 2)] * (3 if n == 20 else n))
    with pytest.raises(ValueError, match="valid_problems=20 must be 5 or more, and the data must have as many: got 3"):
        solve(model, task, Config(valid_problems=20))
