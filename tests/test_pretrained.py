"""The experiment on a pretrained model: its problems, what it grades, its claim, and all of it at the smallest size."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from quietstar import QuietStar
from tests.quietstar.conftest import make_byte_tokenizer, make_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def qs(scripts):
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_model("llama", vocab_size=257, max_position_embeddings=256)
    qs = QuietStar(model, scripts("pretrained_training").THOUGHTS, tokenizer).eval()
    torch.nn.init.normal_(qs.mixing_head[-1].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    return qs


@pytest.mark.parametrize("table", ["ONE_DIGIT", "TWO_DIGITS"])
def test_problems_are_right_and_each_part_has_numbers_of_its_own(scripts, table):
    made = scripts("pretrained_problems")
    parts = {part: made.problems(200, 0, part, getattr(made, table)) for part in ("train", "valid", "test", "new")}
    for problem in sum(parts.values(), []):
        first, second = problem.chain.split(", ")
        for step in (first, second):
            asked, result = step.split("=")
            assert eval(asked) == int(result) >= 0
        assert second.endswith(f"={problem.answer}")
        assert all(number in problem.question for number in problem.restated.replace(",", "").replace("and ", "").split())
    numbers = {
        part: {tuple(sorted(x.restated.replace("and", "").replace(",", "").split())) for x in some}
        for part, some in parts.items()
    }
    train, valid, test, new = (numbers[part] for part in ("train", "valid", "test", "new"))
    assert train.isdisjoint(valid | test | new) and valid.isdisjoint(test | new)
    assert {problem.question.split()[0] for problem in parts["new"]} <= {*made.NAMES, "A", "In"}


@pytest.mark.parametrize("table", ["ONE_DIGIT", "TWO_DIGITS"])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_answers_of_held_out_numbers_are_distributed_as_in_training(scripts, part, table):
    """Of every problem that can be asked: each last digit, and the even ones, within 0.05."""
    made = scripts("pretrained_problems")
    numbers = getattr(made, table)

    def shares(some):
        kinds = [[made.steps(x, signs)[1] for x in found] for (part, signs), found in numbers.items() if part == some]
        return [sum(sum(x % 10 == digit for x in found) / len(found) for found in kinds) / len(kinds) for digit in range(10)]

    difference = [x - y for x, y in zip(shares(part), shares("train"), strict=True)]
    assert max(map(abs, difference)) < 0.05 and abs(sum(difference[::2])) < 0.05
    assert {problem.answer % 2 for problem in made.problems(40, 0, part, numbers)} == {0, 1}


def test_sums_are_practised_one_by_one(scripts):
    """No line has a chain, where the second sum goes on with the result of the first."""
    made = scripts("pretrained_problems")
    tokenizer = make_byte_tokenizer()
    kinds = Counter()
    for example in made.sum_lines(tokenizer, 400, 0):
        text = tokenizer.decode(example["input_ids"])
        steps = [step for step in text.replace("(", " ").replace(")", " ").replace(",", " ").split() if "=" in step]
        for step in steps:
            asked, result = step.split("=")
            assert eval(asked) == int(result) >= 0
        kinds[len(steps)] += 1
        if len(steps) == 2:
            assert steps[0].split("=")[1] != re.split("[+-]", steps[1])[0]
    assert min(kinds[n] for n in (0, 1, 2)) > 60 and sum(kinds.values()) == 400


def test_what_a_thought_is_worth_is_the_models_own_figure(scripts, qs):
    """Summed over the answer's tokens; each control has other thoughts."""
    made, measured = scripts("pretrained_problems"), scripts("pretrained_evaluation")
    some = made.problems(3, 0, "test")
    found = measured.worth(qs, qs.tokenizer, some)
    for i, problem in enumerate(some):
        one = {name: x[None] for name, x in made.line(qs.tokenizer, problem).items()}
        with torch.no_grad():
            out = qs(**one, seed=0)
        anchor = int(one["anchors"])
        assert found["none"][i] == pytest.approx(float(out.nll_base[0, anchor + 1 : anchor + 3].sum()), abs=1e-4)
        assert found["own"][i] == pytest.approx(float(out.nll_mix[0, 0, 0, 1:].sum()), abs=1e-4)
    assert found["own"] != found["another"] != found["random"]
    chosen = measured.sampled(qs, qs.tokenizer, some)
    assert not qs.training and len(chosen["thoughts"]) == len(chosen["rewards"]) == 12


def test_what_is_graded_is_what_generate_writes(scripts, qs):
    """Whatever else is in the batch; an aside may be asked for, or kept from a token."""
    made, measured = scripts("pretrained_problems"), scripts("pretrained_evaluation")
    some = made.problems(3, 0, "test")
    for think in ("once", "always"):
        found = measured.thinking(qs, qs.tokenizer, some, think)
        for problem, text, thought in zip(some, found["texts"], found["thoughts"], strict=True):
            ids = torch.tensor([made.ids(qs.tokenizer, problem.asked)])
            out = qs.generate(ids, max_new_tokens=measured.NEW_TOKENS, think=think, do_sample=False)
            assert qs.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).startswith(text)
            with torch.no_grad():
                ids = qs.think(ids, anchors=torch.tensor([[ids.shape[1] - 1]])).thought_ids[0, 0, 0]
            assert qs.tokenizer.decode(ids) == thought
    plain = measured.writing(qs.model, qs.tokenizer, some, begin=" (")["texts"]
    first = plain[0][2]
    forced = measured.writing(qs.model, qs.tokenizer, some, begin=" (", forced=measured.Unless.of(qs.tokenizer, first, ("~",)))
    assert forced["texts"][0][2] != first and all(text.startswith(" (") for text in plain + forced["texts"])
    assert len(measured.writing(qs.model, qs.tokenizer, some, times=4)["texts"]) == 12


def test_the_claim_is_against_the_best_rival(scripts, tmp_path):
    report, made = scripts("pretrained_report"), scripts("pretrained_problems")
    problems = {part: made.problems(20, 0, part, made.TWO_DIGITS) for part in ("test", "new", "valid")}
    setting = report.SETTINGS["steps"]

    def answers(right, part, thoughts=False):
        texts = [f" {x.answer if i < right else x.answer + 1}." for i, x in enumerate(problems[part])]
        return {"texts": texts} | ({"thoughts": [f"{x.chain})" for x in problems[part]]} if thoughts else {})

    def seed(number, vote=4, **right):
        """Results in which so many of 20 answers are right, of arms that are not named 5."""
        rest = {"seconds": 60.0, "date": "2026-01-01", "torch": "2", "machine": "none"}
        rest |= {"start": str(number), "metrics": {"weight": [0.5]}}
        parts = ("test", "new")
        arms = {"warm": rest | {"practice": [[20, 0.2], [40, 0.45]]}}
        for arm, kind in [row for row in report.ROWS if row[0] in ("warm", *setting.arms) and row[1] != "forced"]:
            n = right.get(arm.replace("-", "_"), 5) if kind == "answers" else 5
            thinks = (arm, kind) == report.OURS
            arms.setdefault(arm, rest | {})[kind] = {part: answers(n, part, thinks) for part in parts}
        four = {part: [(f" (1, 2) {x.answer}.", " 1.", " 0", f" {x.answer}.") for x in problems[part]] for part in parts}
        arms["warm"]["vote"] = {
            part: {"texts": [text for each in four[part][:vote] for text in each] + [""] * 4 * (20 - vote)} for part in parts
        }
        folder = tmp_path / "out" / "steps" / str(number)
        folder.mkdir(parents=True)
        for arm, found in arms.items():
            (folder / f"{arm}.json").write_text(json.dumps(found))

    def write():
        page, verdict = report.write(tmp_path / "out", {"steps": problems}, tmp_path / "docs")
        assert f"**{verdict}**" in page.read_text()
        return page.read_text(), verdict

    for number in (100, 101, 102, 103):
        seed(number, quiet_star=18 - number % 2, grpo=16 - number % 2, chains=20)
    assert write()[1].startswith("The claim is not tested yet, for lack of Quiet-STaR, thinking, seed 104; ")
    # Results that were made elsewhere are added; four texts about a problem are a vote.
    shutil.rmtree(tmp_path / "out")
    seed(104, quiet_star=18, grpo=16)
    page, verdict = write()
    assert verdict.startswith(
        "The claim holds. Quiet-STaR's right answers: +0.10 (+0.10 to +0.10) over those of the best rival"
    )
    assert verdict.endswith("GRPO, writing an aside; above every rival in 5 of 5 seeds.")
    assert "Practice ended after 40 updates (0.45), 40 updates" in page
    assert "| **Quiet-STaR, thinking** | 0.90 | 0.85 | 0.90 | 0.85 | 0.90 | 0.88 ± 0.03 |" in page
    # A script that shares no code with the report finds the same, and what doesn't agree.
    command = [sys.executable, "experiments/recompute_pretrained.py", str(tmp_path / "docs")]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and ", 0 faults" in again.stdout, again.stdout + again.stderr
    (tmp_path / "docs/pretrained.md").write_text(page.replace("| 0.88 ± 0.03 |", "| 0.89 ± 0.03 |"))
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
    # Each seed counts, and no other than those that were claimed.
    seed(102, vote=19, quiet_star=18, grpo=16)
    page, verdict = write()
    assert verdict.startswith("The claim is open.") and verdict.endswith("above every rival in 4 of 5 seeds.")
    assert "| a vote of four of its asides | 0.20 | 0.20 | 0.95 | 0.20 | 0.20 |" in page
    seed(105, quiet_star=18)
    assert write()[1].startswith("The claim is not tested yet, for lack of a claim on seed 105. ")
    with pytest.raises(ValueError, match="has results for other problems"):
        report.write(tmp_path / "out", {"steps": {part: some[:-1] for part, some in problems.items()}}, tmp_path / "docs")
    other = tmp_path / "out/steps/105/head.json"
    other.write_text(other.read_text().replace('"start": "105"', '"start": "another"'))
    with pytest.raises(ValueError, match="steps, seed 105: arms of different starts"):
        write()


def test_the_rates_of_an_arm_are_tried_from_one_start(scripts, tmp_path):
    report, made = scripts("pretrained_report"), scripts("pretrained_problems")
    some, folder = made.problems(2, 0, "valid"), tmp_path / "tuning" / "99"
    folder.mkdir(parents=True)
    for name, start in {"warm": "a", "head 0.1": "a", "plain 0.1": "b", "plain 0.3": "b", "head 0.3": "b"}.items():
        found = {"answers": {"valid": {"texts": [f" {some[0].answer}.", ""]}}, "start": start, "seconds": 60.0}
        (folder / f"{name}.json").write_text(json.dumps(found | {"date": "2026-01-01", "torch": "2", "machine": "none"}))
        if name == "plain 0.3":
            page, _ = report.write(tmp_path, {"form": {"valid": some}}, tmp_path / "docs")
            assert "| plain | 0.3 | 0.50 |" in page.read_text()
    with pytest.raises(ValueError, match="tuning, seed 99: arms of different starts"):
        report.write(tmp_path, {"form": {"valid": some}}, tmp_path / "docs")


@pytest.mark.long
def test_all_of_it_at_the_smallest_size(tmp_path):
    """With its models; what is done is not done again."""
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    make_model("llama", vocab_size=257, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "experiments/pretrained.py", "--size=tiny", f"--model={tmp_path / 'model'}", f"--out={tmp_path}"]
    rows = [{"question": f"What is {i} and 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(30)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command += ["--parts", "steps", "sums", "tuning", "gsm8k", f"--gsm8k={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for known in (False, True):
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0 and "32 of 32 parts are done" in run.stdout, run.stderr[-2000:]
        assert ("begun" in run.stdout) != known
    measured = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "tiny/steps/100").glob("*.json")}
    assert len(measured) == 8 and measured["quiet-star"].keys() > {"answers", "without", "worth", "sampled"}
    assert measured["warm"]["practice"][-1][0] == 2
    assert (tmp_path / "tiny" / "pretrained_steps.png").stat().st_size > 10_000
    page = (tmp_path / "tiny" / "pretrained.md").read_text()
    assert (
        "The claim is not tested yet" in page
        and "0 of 16 sampled thoughts are right chains: the gate of 0.05 is not met." in page
    )
    again = subprocess.run(
        [sys.executable, "experiments/recompute_pretrained.py", str(tmp_path / "tiny")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and ", 0 faults" in again.stdout, again.stdout + again.stderr
    assert "mean over 4 questions" in page and "| random tokens |" in page
