"""Options that a recipe refuses, and how the commands say so."""

import pytest

from quietstar.cli import main as cli
from quietstar.cli.common import table
from quietstar_recipes import fast, internalize, score, solve, star, vstar
from quietstar_recipes.common.models import TaskConfig, make_task
from quietstar_recipes.internalize.command import COLUMNS as INTERNALIZE
from quietstar_recipes.score.command import COLUMNS as SCORE
from quietstar_recipes.star.command import COLUMNS as STAR
from quietstar_recipes.vstar.command import COLUMNS as VSTAR


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (TaskConfig, {"task": "gsm8k"}, "data must be a file where task is 'gsm8k'"),
        (TaskConfig, {"task": "addition", "data": "x.jsonl"}, "data must be empty where task is 'addition'"),
        (star.Config, {"hint_rehearsal": 1.5}, "star: hint_rehearsal must be from 0 to 1, got 1.5"),
        (vstar.Config, {"temperature": 0.0}, "temperature must be above 0, or all samples are one"),
        (solve.Config, {"valid_problems": -1}, "solve: valid_problems must be 0 or more, got -1"),
        (solve.Config, {"beam_width": 3}, "solve: beam_width must be a power of 2, got 3"),
        (solve.Config, {"rollouts": 0}, "solve: rollouts must be 1 or more, got 0"),
        (solve.Config, {"lookahead": -1}, "solve: lookahead must be 0 or more, got -1"),
        (solve.Config, {"temperature": 0}, "temperature must be above 0, or all samples are one, got 0"),
        (solve.Config, {"samples": 0}, "solve: samples must be 1 or more, got 0"),
        (internalize.Config, {"remove_all_beyond": -1}, "remove_all_beyond must be None, or 0 or more, got -1"),
        (internalize.Config, {"keep_position": True, "side": "right"}, "side must be left where keep_position is on, got"),
        (score.Config, {"problems": 1, "samples": 1}, "problems must be 2 or more where samples is 1"),
        (score.Config, {"from_base": 1.1}, "from_base must be from 0 to 1, got 1.1"),
        (score.Config, {"credit": "both"}, "credit must be 'turn' or 'joint', got 'both'"),
        (score.Config, {"single_turn": True}, "first_steps must be 0 with single_turn, since stage I .*, got 150"),
        (fast.Config, {"plain_steps": 0}, "plain_steps must be None, or 1 or more, got 0"),
        (fast.Config, {"later_rate": 0.0}, "later_rate must be above 0, got 0.0"),
        (fast.Config, {"objective": "imitate"}, "objective must be"),
        (fast.Config, {"curriculum": "8-4,12-4"}, "curriculum must not have thoughts that grow longer"),
        *(
            (fast.Config, {"curriculum": x}, "curriculum must be stages like")
            for x in ("", "8", "8-4-2", "8-x", "0-4", "8-4,,4")
        ),
    ],
)
def test_bad_options(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_file_of_questions_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        make_task(TaskConfig(task="gsm8k", data="x.jsonl"))


@pytest.mark.parametrize(
    "options, code, sentence",
    [
        (["--rounds=0"], cli.USAGE, "star: rounds must be 1 or more, got 0"),
        ([], cli.DATA, "a model from scratch solves nothing: --sft-steps teaches it the data's chains, or name a --model"),
        (["--model=nowhere/nothing", "--sft-steps=1"], cli.DATA, "nowhere/nothing: cannot load a tokenizer"),
    ],
)
def test_a_command_says_so_in_one_sentence(capsys, tmp_path, options, code, sentence):
    assert cli.main(["star", f"--out={tmp_path / 'run'}", *options]) == code
    shown = capsys.readouterr().err.strip()
    assert sentence in shown and "\n" not in shown
    assert not (tmp_path / "run").exists()


TABLES = {
    "star": STAR,
    "vstar": VSTAR,
    "score": ("test_problems", *SCORE),
    "internalize": ("test_problems", *INTERNALIZE),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_80_columns(name):
    lines = table([dict.fromkeys(TABLES[name], 0.1234)], TABLES[name]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
    assert "_" not in "".join(lines) and lines[-1].split() == ["0.123"] * len(TABLES[name])
