"""Generated problems: how each kind is written, and what holds for all: checked answers, splits without overlap, seeds."""

import logging
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from quietstar_recipes.common.evaluation import grade
from quietstar_recipes.common.sampling import Completion
from quietstar_recipes.tasks import SPLITS, Addition, DigitSums, Multiplication, Scratchpad, WordProblems, small_tokenizer
from quietstar_recipes.tasks.base import split_of
from tests.recipes.conftest import seeded

GENERATED = {
    "multiplication": lambda: Multiplication(2),
    "addition": lambda: Addition(3),
    "scratchpad": Scratchpad,
    "sums": DigitSums,
    "stories": WordProblems,
}


@pytest.mark.parametrize("name", GENERATED)
def test_solved_rows_are_right_and_others_are_not(name):
    task = GENERATED[name]()
    rows = task.sample(50, "train", seeded())
    for row, other in zip(rows, rows[1:], strict=False):
        written = task.completion_ids(row)
        assert task.check(row, written) and task.check_chain(row, written)
        assert row.prompt_ids + written == task.tokenizer(task.tokenizer.decode(row.prompt_ids + written))["input_ids"]
        assert row.answer_ids not in (row.prompt_ids, row.hinted_ids) and row.hinted_ids != row.prompt_ids
        if other.problem.right != row.problem.right:
            assert not task.check(row, task.completion_ids(other))
        assert task.answer(row, row.cot_ids + [task.end_id]) is None  # no mark before the answer
        assert task.answer(row, written[:-1]) is None  # not finished
        assert task.check(row, row.answer_ids[:0] + task.separator_ids + row.answer_ids + [task.end_id, 7])
        assert not task.check_chain(row, task.separator_ids + row.answer_ids + [task.end_id])


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_problem(name):
    task = GENERATED[name]()
    asked = {split: {row.problem.prompt for row in task.sample(400, split, seeded(i))} for i, split in enumerate(SPLITS)}
    assert not asked["train"] & asked["valid"] and not asked["train"] & asked["test"] and not asked["valid"] & asked["test"]


def test_the_seed_fixes_the_problems():
    task = Multiplication(3)
    first, again, other = (task.sample(5, "test", seeded(seed)) for seed in (1, 1, 2))
    assert first == again != other


def prompts(rows):
    return [row.problem.prompt for row in rows]


@pytest.mark.parametrize("split, there", [("test", 8), ("valid", 3)])
def test_measured_problems_are_distinct_and_a_line_says_that_there_are_few(caplog, split, there):
    task, all_prompts = Addition(1), {Addition(1).problem(a, b).prompt for a in range(10) for b in range(10)}
    with caplog.at_level(logging.INFO, "quietstar"):
        found, again = (prompts(task.sample(500, split, seeded(seed))) for seed in (0, 1))
    assert len(found) == there and set(found) == set(again) == {x for x in all_prompts if split_of(x) == split}
    assert caplog.messages == [f"1-digit addition: {there} distinct {split} problems, 500 asked"]
    assert len(set(prompts(Multiplication(2).sample(800, "test", seeded())))) == 800


def test_training_problems_repeat_as_they_are_drawn(caplog):
    """A line says so where there are fewer than asked, not where some are drawn twice by chance."""
    for task, asked, messages in (
        (Addition(1), 500, ["1-digit addition: 89 distinct train problems, 500 asked"]),
        (Multiplication(2), 1000, []),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "quietstar"):
            found = task.sample(asked, "train", seeded())
        drawing = seeded()
        drawn = [problem for problem in (task.draw(drawing) for _ in range(2 * asked)) if split_of(problem.prompt) == "train"]
        assert [row.problem for row in found] == drawn[:asked] and len(set(prompts(found))) < asked
        assert caplog.messages == messages


def test_bad_input(byte_tokenizer):
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        Multiplication(2).sample(1, "dev", seeded())
    with pytest.raises(ValueError, match="digits must be from 1 to 18, got 0"):
        Addition(0)
    with pytest.raises(ValueError, match="DigitSums: digits must be from 2 to 18, got 1"):
        DigitSums(1)
    byte_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Multiplication: the tokenizer has no end-of-text token"):
        Multiplication(2, tokenizer=byte_tokenizer)


# Lines of 4_by_4_valid.txt of Internalize_CoT_Step_by_Step (MIT).
PUBLISHED = [
    "5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0 "
    "#### 5 5 6 0 8 2 0 1",
    "6 7 3 9 * 8 9 1 7||8 0 0 5 7 + 0 4 8 3 4 8 ( 8 4 8 8 1 9 ) + 0 0 6 7 3 9 0 ( 8 4 4 6 5 8 1 ) + 0 0 0 2 3 6 5 6 "
    "#### 8 4 4 8 8 4 7 6",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_multiplication_is_written_as_in_the_published_files(line):
    operands = [int("".join(x.split())[::-1]) for x in line.split("||")[0].split("*")]
    problem = Multiplication(4).problem(*operands)
    assert problem.prompt.replace(" ||", "||") + problem.chain.strip() + " ####" + problem.answer == line


@pytest.mark.parametrize("digits, tokens", [(2, 8), (4, 46), (5, 74), (7, 148), (9, 246)])
def test_chain_lengths_are_the_published_ones(digits, tokens):
    row = Multiplication(digits).sample(1, "train", seeded())[0]
    assert len(row.cot_ids) == tokens and len(row.answer_ids) == 2 * digits


def test_operands_of_different_lengths():
    task = Multiplication(3, 2)
    problem = task.problem(407, 86)  # 407 * 6 = 2442, 407 * 80 = 32560, together 35002
    assert problem.prompt == "7 0 4 * 6 8 ||"
    assert (problem.chain, problem.right) == (" 2 4 4 2 + 0 6 5 2 3", "20053")
    assert {(len(row.prompt_ids), len(row.cot_ids)) for row in task.sample(50, "train", seeded())} == {(7, 10)}
    assert task.name == "3 x 2-digit multiplication" and Multiplication(2, 2).name == "2-digit multiplication"
    one = Multiplication(2, 3).problem(11, 999)
    assert one.chain.split(" + ") == [" 9 9 0", "0 9 9 0 ( 9 8 0 1 )", "0 0 9 9 0"]


def test_addition_carries():
    problem = Addition(3).problem(964, 289)  # 4+9 = 13, 6+8+1 = 15, 9+2+1 = 12
    assert problem.chain.split() == ["3", "1", "5", "1", "2", "1"]
    assert problem.right == "3521"


def test_the_chain_is_the_running_sums():
    problem = DigitSums(5).problem([7, 5, 8, 6, 2])  # 7, 12, 20, 26, 28
    assert (problem.prompt, problem.chain, problem.answer) == ("7 5 8 6 2 ||", " 2 0 6 8", " 8")
    assert problem.hinted == "7 5 8 6 2 Target: 8 ||"


def test_the_scratchpad_adds_from_the_right_and_carries():
    problem = Scratchpad().problem(964, 289)
    assert problem.prompt == "9 6 4 + 2 8 9 ||" and problem.hinted == "Target: 1 2 5 3 || 9 6 4 + 2 8 9 ||"
    assert problem.chain == " 4 9 3 1 6 8 5 1 9 2 2 1" and problem.answer == " 1 2 5 3"  # 13, 6+8+1 = 15, 9+2+1 = 12
    assert problem.right == "1253" and problem.kind == "3 digits"


def test_every_length_is_as_likely_and_both_operands_have_it():
    generator = seeded()
    drawn = [Scratchpad(5).draw(generator) for _ in range(2000)]
    found = Counter(problem.kind for problem in drawn)
    assert sorted(found) == ["1 digit", "2 digits", "3 digits", "4 digits", "5 digits"]
    assert max(abs(count - 400) for count in found.values()) < 72  # four standard deviations
    for problem in drawn:
        a, b = (x.split() for x in problem.prompt.removesuffix("||").split("+"))
        assert len(a) == len(b) == int(problem.kind[0])
        assert int("".join(a)) + int("".join(b)) == int(problem.right)


def test_accuracy_is_also_reported_by_length():
    task = Scratchpad(2)
    rows = task.sample(40, "train", seeded(0))
    short = [row.problem.kind == "1 digit" for row in rows]
    written = [
        Completion(task.completion_ids(row if one or i % 2 else other), [0.0])
        for i, (row, one, other) in enumerate(zip(rows, short, rows[1:] + rows[:1], strict=True))
    ]
    found = grade(task, rows, written)
    long_right = [i % 2 for i, one in enumerate(short) if not one]
    assert 0 < sum(short) < 40 and found["by_kind"] == {"1 digit": 1.0, "2 digits": sum(long_right) / len(long_right)}


def test_stories_add_up():
    for row in WordProblems().sample(200, "train", seeded()):
        steps = row.problem.chain.replace(" ", "").split(";")
        for step in steps:
            a, sign, b, c = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
            assert int(a) + int(b) * (1 if sign == "+" else -1) == int(c) >= 0
        assert steps[1].startswith(steps[0].split("=")[1]) and row.problem.right == steps[1].split("=")[1]


def test_a_saved_small_tokenizer_loads(tmp_path):
    tokenizer = small_tokenizer("0123")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("3 1 #### 2 <end>")["input_ids"] == tokenizer("3 1 #### 2 <end>")["input_ids"]
    assert again.eos_token_id == 1 and again.pad_token_id == 0
