"""What holds for every task of generated problems: checked answers, splits without overlap or repetition, seeds."""

import logging

import pytest
import torch

from quietstar_recipes.tasks import SPLITS, Addition, DigitSums, Multiplication, Scratchpad, WordProblems
from quietstar_recipes.tasks.base import split_of

GENERATED = {
    "multiplication": lambda: Multiplication(2),
    "addition": lambda: Addition(3),
    "scratchpad": Scratchpad,
    "sums": DigitSums,
    "stories": WordProblems,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", GENERATED)
def test_solved_rows_are_right_and_others_are_not(name):
    task = GENERATED[name]()
    rows = task.sample(50, "train", generator())
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
    asked = {split: {row.problem.prompt for row in task.sample(400, split, generator(i))} for i, split in enumerate(SPLITS)}
    assert not asked["train"] & asked["valid"] and not asked["train"] & asked["test"] and not asked["valid"] & asked["test"]


def test_the_seed_fixes_the_problems():
    task = Multiplication(3)
    first, again, other = (task.sample(5, "test", generator(seed)) for seed in (1, 1, 2))
    assert first == again != other


def prompts(rows):
    return [row.problem.prompt for row in rows]


@pytest.mark.parametrize("split, there", [("test", 8), ("valid", 3)])
def test_measured_problems_are_distinct_and_a_line_says_that_there_are_few(caplog, split, there):
    task, all_prompts = Addition(1), {Addition(1).problem(a, b).prompt for a in range(10) for b in range(10)}
    with caplog.at_level(logging.INFO, "quietstar"):
        found, again = (prompts(task.sample(500, split, generator(seed))) for seed in (0, 1))
    assert len(found) == there and set(found) == set(again) == {x for x in all_prompts if split_of(x) == split}
    assert caplog.messages == [f"1-digit addition: {there} distinct {split} problems, 500 asked"]
    assert len(set(prompts(Multiplication(2).sample(800, "test", generator())))) == 800


def test_training_problems_repeat_as_they_are_drawn(caplog):
    """A line says so where there are fewer than asked, not where some are drawn twice by chance."""
    for task, asked, messages in (
        (Addition(1), 500, ["1-digit addition: 89 distinct train problems, 500 asked"]),
        (Multiplication(2), 1000, []),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "quietstar"):
            found = task.sample(asked, "train", generator())
        drawing = generator()
        drawn = [problem for problem in (task.draw(drawing) for _ in range(2 * asked)) if split_of(problem.prompt) == "train"]
        assert [row.problem for row in found] == drawn[:asked] and len(set(prompts(found))) < asked
        assert caplog.messages == messages


def test_bad_input(byte_tokenizer):
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        Multiplication(2).sample(1, "dev", generator())
    with pytest.raises(ValueError, match="digits must be from 1 to 18, got 0"):
        Addition(0)
    byte_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Multiplication: the tokenizer has no end-of-text token"):
        Multiplication(2, tokenizer=byte_tokenizer)
