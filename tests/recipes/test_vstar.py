"""V-STaR: which pairs the verifier learns from, what DPO does to it, and what it chooses."""

import itertools
import json
import math

import pytest
import torch

from quietstar.cli import main as cli
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.saving import fingerprint, save_model
from quietstar_recipes.common.training import SFTConfig
from quietstar_recipes.tasks import Addition, Multiplication, WordProblems
from quietstar_recipes.vstar import run as recipe
from quietstar_recipes.vstar.run import Config, vstar
from quietstar_recipes.vstar.verifier import (
    DPO,
    as_trl_example,
    load_verifier,
    make_pairs,
    measure_pairs,
    train_verifier,
)
from tests.recipes.conftest import json_lines, seeded

SMALL = {"rounds": 2, "problems": 40, "samples": 4, "steps": 3, "test_problems": 20, "test_samples": 4, "max_new": 10}
SMALL |= {"batch_size": 80, "batch_tokens": 300, "pair_batch": 8, "updates": 4}


def solution(prompt, ids, right, split="train"):
    return {"prompt": prompt, "ids": ids, "right": right, "split": split}


def test_pairs_are_the_product_of_right_and_wrong_solutions_of_a_problem():
    solutions = [solution([1], [i], i < 2) for i in (0, 1, 1, 2, 3, 4)]  # two right ones, one of them twice, and three wrong
    solutions += [solution([2], [9], True), solution([3], [9], False)]  # no pair: only right, only wrong
    solutions += [solution([4], [5], True, "valid"), solution([4], [6], False, "valid")]
    pairs = make_pairs(solutions, "train", 16, 0)
    assert sorted(pairs) == [([1], [x], [y]) for x, y in itertools.product((0, 1), (2, 3, 4))]
    assert make_pairs(solutions, "valid", 16, 0) == [([4], [5], [6])]
    few = make_pairs(solutions, "train", 3, 0)
    assert 1 <= len(few) <= 3 and all(pair in pairs for pair in few)


def test_solutions_count_as_often_as_they_were_drawn():
    solutions = [solution([1], [2], True)] * 3 + [solution([1], [3], False), solution([1], [4], True, "valid")]
    assert recipe.right_solutions(solutions) == [([1], [2])] * 3
    problems = [[solution([i], [0], True)] * 15 + [solution([i], [1], True), solution([i], [2], False)] for i in range(200)]
    pairs = make_pairs([x for problem in problems for x in problem], "train", 1, 0)
    assert len(pairs) == 200 and 2 <= sum(right == [1] for _, right, _ in pairs) <= 30  # one in 16, where half would be 100


@pytest.mark.parametrize("task", [Multiplication(2), WordProblems(), "bytes"])
def test_trl_reads_the_tokens_that_we_wrote(task, byte_tokenizer):
    task = Multiplication(2, tokenizer=byte_tokenizer) if task == "bytes" else task
    rows = task.sample(20, "train", seeded(0))
    for row, other in zip(rows, rows[1:], strict=False):
        pair = (row.prompt_ids, task.completion_ids(row), task.completion_ids(other))
        text = as_trl_example(task, pair)
        assert task.tokenizer(text["prompt"])["input_ids"] == pair[0]
        assert task.tokenizer(text["prompt"] + text["chosen"])["input_ids"] == pair[0] + pair[1]
        assert task.tokenizer(text["prompt"] + text["rejected"])["input_ids"] == pair[0] + pair[2]


def solved(model, task, count, samples, seed):
    """Prompt and ids of the model's solutions, and whether they are right."""
    rows = task.sample(count, "train", seeded(seed))
    written = rollout(model, task, [row.prompt_ids for row in rows], samples, max_new=10)
    trimmed = [(row, task.trimmed(x.ids)) for row, several in zip(rows, written, strict=True) for x in several]
    return [(row.prompt_ids, ids, task.check(row, ids)) for row, ids in trimmed]


@pytest.fixture(scope="module")
def pairs(solver):
    """Pairs of the solver's own solutions."""
    return make_pairs([solution(*x) for x in solved(*solver, 80, 8, 7)], "train", 8, 0)


def test_dpo_loss_is_that_of_the_paper(solver, pairs):
    """It begins at the reference model; after one pass, and no more than one, it is the formula's with the new weights."""
    (model, task), some, before = solver, pairs[:8], fingerprint(solver[0])
    verifier, losses = train_verifier(model, task, some * 2, DPO(pair_batch=8, updates=100, verifier_rate=1e-3, beta=0.3), 0)
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert fingerprint(model) == before != fingerprint(verifier)
    prompts, right, wrong = map(list, zip(*some, strict=True))
    margin = torch.tensor([likelihoods(x, prompts, ids) for x in (verifier, model) for ids in (right, wrong)])
    expected = -torch.nn.functional.logsigmoid(0.3 * ((margin[0] - margin[1]) - (margin[2] - margin[3]))).mean()
    assert measure_pairs(verifier, model, some, 0.3, 64)["held_out_loss"] == pytest.approx(float(expected), abs=1e-5)
    assert float(expected) < math.log(2) - 0.01
    assert measure_pairs(verifier, model, [], 0.3, 64) == {"held_out_loss": None, "held_out_order": None}


@pytest.fixture(scope="module")
def graded(solver):
    """The solver's solutions, each of them once as of a training problem and once as of a held-out one."""
    return [solution(*x, split) for split in ("train", "valid") for x in solved(*solver, 30, 6, 3)]


@pytest.mark.long
def test_a_verifier_of_verdicts_is_the_best_on_held_out_problems(scripts, solver, graded):
    verdicts, (model, task) = scripts("verdicts"), solver
    config = SFTConfig(learning_rate=5e-3, batch_tokens=500)
    verifier = verdicts.train_outcome(model, task, graded, 60, config, 0)
    train, held_out = ([x for x in graded if x["split"] == split] for split in ("train", "valid"))
    assert verdicts.outcome_auc(verifier, task, held_out) > max(0.8, verdicts.outcome_auc(model, task, held_out))
    worse = [{**x, "right": not x["right"]} if x["split"] == "valid" else x for x in graded]
    first = verdicts.train_outcome(model, task, worse, 40, config, 0)  # the more it learns, the worse it is at these
    assert verdicts.outcome_auc(first, task, train) < verdicts.outcome_auc(verifier, task, train) - 0.1


def test_the_loss_and_the_score_of_verdicts(scripts, solver, graded):
    verdicts, (model, task) = scripts("verdicts"), solver
    yes, no = (verdicts.verdict(task, right) for right in (True, False))
    assert [task.tokenizer.decode(ids) for ids in (yes, no)] == ["1", "0"]
    right, wrong = (next(x for x in graded if x["right"] == flag) for flag in (True, False))
    of_verdicts = [likelihoods(model, [x["prompt"] + x["ids"]], [end])[0] for x, end in ((right, yes), (wrong, no))]
    of_text = likelihoods(model, [right["prompt"]], [right["ids"]])[0] / len(right["ids"])  # of the right one alone
    for batch, expected in (([right, wrong], -sum(of_verdicts) / 2 - of_text), ([wrong], -of_verdicts[1])):
        assert float(verdicts.outcome_loss(model, task, batch).detach()) == pytest.approx(expected, abs=1e-5)
    row = task.sample(1, "train", seeded(3))[0]
    score = likelihoods(model, [row.prompt_ids + right["ids"]], [yes])[0]
    assert verdicts.verdict_scorer(model, task, 100)([row], [right["ids"]]) == [pytest.approx(score, abs=1e-5)]


def test_a_round_draws_new_samples_of_the_same_problems(solver, tmp_path):
    model, task = solver
    config = Config(out=str(tmp_path), **SMALL)
    first, second = (recipe.draw(model, task, config, number) for number in (1, 2))
    prompts = [[x["prompt"] for x in several] for several in (first, second)]
    assert prompts[0] == prompts[1]
    assert [x["ids"] for x in first] != [x["ids"] for x in second]


@pytest.mark.long
def test_a_run_and_resuming_it(solver, tmp_path, monkeypatch):
    model, task = solver
    config = Config(out=str(tmp_path / "run"), **SMALL)
    trained = []
    sft = recipe.sft
    monkeypatch.setattr(recipe, "sft", lambda model, *rest: trained.append(fingerprint(model)) or sft(model, *rest))
    generator, verifier, report = vstar(model, task, config)
    base = fingerprint(model)
    assert trained == [base, base]  # a fresh copy each round
    files = [tmp_path / f"run/round-0{number}/solutions.jsonl" for number in (1, 2)]
    rows = [json_lines(file) for file in files]
    assert [len(x) for x in rows] == [(40 + 3) * 4] * 2  # there are only three validation problems
    assert report["rounds"][2]["drawn_right"] == sum(x["right"] for x in rows[1])
    distinct = {(*x["prompt"], *x["ids"]) for several in rows for x in several if x["right"] and x["split"] == "train"}
    assert report["rounds"][2]["distinct"] == len(distinct)  # those of round 1 too
    assert report["verifier"]["pairs"] == len(make_pairs(rows[0] + rows[1], "train", 16, 0)) > 20
    answers = evaluate(verifier, task, task.sample(20, "test", seeded(mix_seed(0, 0))), 10)
    assert report["verifier"]["accuracy"] == answers["accuracy"]
    assert set(report["curves"]) >= {"verifier", "verifier, ratio", "majority", "generator", "oracle", "one sample"}
    for name, values in report["curves"].items():
        assert len(values) == len(report["k"]) == 3, name
        assert values[-1] <= report["curves"]["oracle"][-1], name  # for all samples; votes over fewer are of random subsets
        if name not in ("majority", "weighted vote"):
            assert values[0] == pytest.approx(report["curves"]["one sample"][0]), name

    lines = json_lines(tmp_path / "run/metrics.jsonl")
    losses = [line["loss"] for line in lines if line["recipe"] == "vstar, verifier"]
    assert len(losses) == report["verifier"]["updates"] and losses[-1] == report["verifier"]["last_loss"]
    assert [line["step"] for line in lines] == list(range(1, 7 + len(losses)))
    assert json.loads((tmp_path / "run/vstar.json").read_text())["curves"] == report["curves"]
    assert (tmp_path / "run/vstar.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a run is there already"):
        vstar(model, task, config)
    other = small_model(task, width=64, heads=2, positions=128, seed=5)
    with pytest.raises(ValueError, match="the run there started with another model"):
        vstar(other, task, config, resume=True)
    monkeypatch.setattr(recipe, "sft", None)
    monkeypatch.setattr(recipe, "train_verifier", None)  # nothing is left to train
    again_generator, again_verifier, again = vstar(model, task, config, resume=True)
    assert fingerprint(again_generator) == fingerprint(generator) and fingerprint(again_verifier) == fingerprint(verifier)
    assert again["curves"] == report["curves"]


def test_the_datas_own_chains_are_right_solutions(solver, tmp_path, monkeypatch):
    model, task = solver
    taught, judged = [], []
    monkeypatch.setattr(recipe, "sft", lambda model, examples, *rest: taught.append(examples) or model)
    monkeypatch.setattr(
        recipe, "train_or_load_verifier", lambda run, model, task, config, solutions: judged.extend(solutions) or (model, {})
    )
    vstar(model, task, Config(out=str(tmp_path / "run"), **{**SMALL, "rounds": 1, "sft_steps": 2, "sft_problems": 30}))
    start, first = taught
    assert start == first[: len(start)] and 1 < len(start) <= 30
    assert all((x["prompt"], x["ids"]) in start and x["right"] for x in judged[-30:])
    drawn = [(x["prompt"], x["ids"]) for x in judged[:-30] if x["right"] and x["split"] == "train"]
    assert all(example in first for example in drawn) and len(judged) == (40 + 3) * 4 + 30


def test_plots_leave_out_subsets_that_are_nearly_the_same():
    curves = {"verifier": [0.1, 0.2, 0.3, 0.4, 0.5], "majority": [0.5, 0.4, 0.3, 0.2, 0.1]}
    assert recipe.reliable_points([1, 2, 4, 8, 16], curves) == {
        "verifier": [(1, 0.1), (2, 0.2), (4, 0.3), (8, 0.4)],
        "majority": [(1, 0.5), (2, 0.4), (4, 0.3)],
    }
    assert recipe.reliable_points([1, 2], {"verifier": [0.1, 0.2], "majority": [0.3, 0.4]}) == {
        "verifier": [(1, 0.1)],
        "majority": [(1, 0.3)],
    }


@pytest.mark.parametrize(
    "right, message",
    [(True, "no problem has both right and wrong solutions"), (False, "none of the first 40 problems is solved")],
)
def test_solutions_that_are_all_right_or_all_wrong(solver, tmp_path, monkeypatch, right, message):
    model, task = solver
    monkeypatch.setattr(Addition, "check", lambda *_: right)
    with pytest.raises(ValueError, match=f"vstar: {message}"):
        vstar(model, task, Config(out=str(tmp_path / "run"), **{**SMALL, "rounds": 1}))
    assert (tmp_path / "run/round-01/model.safetensors").exists() is right


def test_a_verifier_of_another_base_model_is_refused(solver, tmp_path):
    model, task = solver
    for name, base in (("verifier", "one"), ("same", "one"), ("other", "two")):
        save_model(tmp_path / name, model, task, {"base": base})
    verifier = load_verifier(str(tmp_path / "verifier"), str(tmp_path / "same"), model, task)
    assert fingerprint(verifier) == fingerprint(model)
    with pytest.raises(ValueError, match="the verifier is of another base model, one; .*other started with two"):
        load_verifier(str(tmp_path / "verifier"), str(tmp_path / "other"), model, task)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best").symlink_to("../other")
    with pytest.raises(ValueError, match="the verifier is of another base model, one; .*run started with two"):
        load_verifier(str(tmp_path / "verifier"), str(tmp_path / "run"), model, task)
    with pytest.raises(ValueError, match="the verifier is of another base model: its tokens differ"):
        load_verifier(str(tmp_path / "verifier"), str(tmp_path / "same"), model, WordProblems())
    smaller = small_model(task, width=32, heads=2, positions=128)
    with pytest.raises(ValueError, match="the verifier is of another base model: its weights have other shapes than the model"):
        load_verifier(str(tmp_path / "verifier"), "", smaller, task)
    with pytest.raises(ValueError, match="nothing: there is no such folder"):
        load_verifier(str(tmp_path / "nothing"), "", model, task)


@pytest.mark.long
def test_commands(solver_folder, tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "rounds": 1}.items()]
    chosen = ["--task=addition", "--digits=1"]
    assert cli.main(["vstar", *chosen, f"--model={solver_folder}", f"--out={tmp_path / 'run'}", *options]) == 0
    shown = capsys.readouterr().out
    assert "best of k by" in shown and f"saved {tmp_path / 'run/best'}, which is round-0" in shown
    solve = [f"--model={tmp_path / 'run/round-01'}", f"--verifier={tmp_path / 'run/verifier'}", f"--out={tmp_path / 'solve'}"]
    solve += ["--problems=10", "--samples=4", "--attempts=2", "--max-new=10", "--valid-problems=5"]
    assert cli.main(["solve", "--task=addition", "--digits=2", *solve]) == 0  # numbers of one digit fill no five bins
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("greedy", "majority", "best of k", "weighted vote", "sequential, verifier", "oracle"))
    assert "chains of 2" in shown and "compute-optimal, oracle bins, splits" in shown
    assert (tmp_path / "solve/test_time.png").read_bytes().startswith(b"\x89PNG")
