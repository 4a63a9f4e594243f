"""The experiment on a pretrained model: its problems, what it measures, its verdict, and all of it at the smallest size."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quietstar import QuietStar
from tests.quietstar.conftest import make_byte_tokenizer, make_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def qs(scripts):
    tokenizer = make_byte_tokenizer()
    model = make_model("llama", vocab_size=257, max_position_embeddings=256)
    qs = QuietStar(model, scripts("pretrained_training").THOUGHTS, tokenizer).eval()
    torch.nn.init.normal_(qs.mixing_head[-1].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    return qs


def test_problems_are_right_and_none_is_in_training_and_test(scripts):
    made = scripts("pretrained_problems")
    parts = {part: made.problems(200, 0, part) for part in ("train", "test", "new")}
    for problem in sum(parts.values(), []):
        first, second = problem.chain.split(", ")
        for step in (first, second):
            asked, result = step.split("=")
            assert eval(asked) == int(result) >= 0
        assert second.endswith(f"={problem.answer}")
        assert all(number in problem.question for number in problem.restated.replace(",", "").replace("and ", "").split())
    triples = [{tuple(problem.restated.split()) for problem in part} for part in parts.values()]
    assert triples[0].isdisjoint(triples[1] | triples[2])
    assert made.draw(random.Random(0), made.TEMPLATES[-1:], True).question.startswith("In the garden")


def test_answers_are_those_of_the_model(scripts, qs):
    """Without and with thoughts, summed over the answer's tokens; each control has other thoughts."""
    made, measured = scripts("pretrained_problems"), scripts("pretrained_evaluation")
    some = made.problems(3, 0, "test")
    found = measured.answers(qs, qs.tokenizer, some, thinks=True)
    for i, problem in enumerate(some):
        one = {name: x[None] for name, x in made.line(qs.tokenizer, problem).items()}
        with torch.no_grad():
            out = qs(**one, seed=0)
        anchor = int(one["anchors"])
        assert found["none"]["nats"][i] == pytest.approx(float(out.nll_base[0, anchor + 1 : anchor + 3].sum()), abs=1e-4)
        assert found["own"]["nats"][i] == pytest.approx(float(out.nll_mix[0, 0, 0, 1:].sum()), abs=1e-4)
    assert found["own"]["nats"] != found["another"]["nats"] != found["random"]["nats"]
    chosen = measured.sampled(qs, qs.tokenizer, some)
    assert not qs.training and chosen["right"] == chosen["mixed"] == 0 and isinstance(chosen["reward_other"], float)
    without = measured.answers(qs, qs.tokenizer, some, thinks=False)
    assert without.keys() == {"none"} and without["none"]["nats"] == pytest.approx(found["none"]["nats"], abs=1e-4)


def test_an_answer_may_stand_behind_an_aside(scripts):
    made, measured = scripts("pretrained_problems"), scripts("pretrained_evaluation")
    problem = made.Problem("", "8+7=15, 15-6=9", "8, 7 and 6", 9)
    assert measured.answered(" 9.", 9) and measured.answered(" (8+7=15, 15-6=9) 9.", 9)
    assert not any(measured.answered(text, 9) for text in (" 19.", " 9", " (8+7=15, 15-6=9) 8.", " (8+7=15, 9."))
    shares = measured.chains(["8+7=15, 15-6=9) 9", "8+7=16, 16-6=10)", "8, 7 and 6)"], [problem] * 3)
    assert shares == {"written": 2 / 3, "right": 1 / 3}


def test_the_claim_needs_every_control_in_every_seed(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr("quietstar.files.pictures.can_draw", lambda: False)
    report, made = scripts("pretrained_report"), scripts("pretrained_problems")
    problems = {part: made.problems(20, 0, part) for part in report.PARTS}

    def measured(nats, thoughts):
        ways = {way: {"nats": [x + 0.01 * i for i in range(20)], "right": [x < 1] * 20} for way, x in nats.items()}
        return {"answers": {part: {**ways, "thoughts": thoughts[part], "weight": [0.5] * 20} for part in report.PARTS}}

    def seed(head):
        chains = {part: [f"{x.chain})" for x in some] for part, some in problems.items()}
        written = {part: {"texts": [f" ({x}" for x in texts], "right": [True] * 20} for part, texts in chains.items()}
        rest = {"seconds": 60.0, "date": "2026-01-01", "torch": "2", "machine": "none"}
        rest |= {"metrics": {"reward": [0.0, 1.0]}}
        rest |= {"sampled": {"right": 0.4, "mixed": 0.5, "reward_right": 2.0, "reward_other": None}}
        own = measured({"none": 2.0, "own": 0.5, "another": 3.0, "constant": 3.0, "random": 4.0}, chains)
        control = measured({"none": 2.0, "own": head, "another": 3.0, "constant": 3.0, "random": 4.0}, chains)
        return {"warm": {**control, "written": written, **rest}, "quiet-star": own | rest, report.HEAD: control | rest}

    page, verdict = report.write([seed(1.5), seed(1.0)], None, problems, tmp_path)
    assert f"**{verdict}**" in page.read_text() and " the claim holds in 2 of 2 seeds" in verdict
    assert "| no thought | new numbers | +1.50 (+1.50 to +1.50) | +1.50" in page.read_text()
    second = seed(0.5) | {"signed": seed(1.5)["quiet-star"]}
    page, verdict = report.write([seed(1.5), second], None, problems, tmp_path)
    assert " the claim does not hold" in verdict and verdict.endswith("with a mixing head trained on them in seed 1.")
    assert "| signed advantages alone (seed 1) | 0.40 |" in page.read_text()


@pytest.mark.long
def test_all_of_it_at_the_smallest_size(tmp_path):
    """With its models; what is done is not done again."""
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    make_model("llama", vocab_size=257, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "experiments/pretrained.py", "--size=tiny", f"--model={tmp_path / 'model'}", f"--out={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    results = tmp_path / "tiny" / "seed-0"
    for known in (False, True):
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0 and "8 of 8 parts are done" in run.stdout, run.stderr[-2000:]
        assert ("begun" in run.stdout) != known
    measured = {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}
    assert len(measured) == 7 and set(measured["plain-4-times-the-text"]["answers"]["test"]) == {"none"}
    assert json.loads((tmp_path / "tiny" / "free-text.json").read_text())["losses"].keys() > {"base", "own", "constant"}
    assert (tmp_path / "tiny" / "pretrained.png").stat().st_size > 10_000
    assert measured["warm"]["sampled"]["right"] == 0 and measured["warm"]["sampled"]["reward_right"] is None
    assert "the claim does not hold" in (tmp_path / "tiny" / "pretrained.md").read_text()
