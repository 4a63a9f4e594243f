"""Multiplication and addition: how a problem, its chain and its answer are written."""

import pytest
import torch

from quietstar_recipes.tasks import Addition, Multiplication

# Lines of 4_by_4_valid.txt of Internalize_CoT_Step_by_Step (MIT).
PUBLISHED = [
    "5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0 "
    "#### 5 5 6 0 8 2 0 1",
    "6 7 3 9 * 8 9 1 7||8 0 0 5 7 + 0 4 8 3 4 8 ( 8 4 8 8 1 9 ) + 0 0 6 7 3 9 0 ( 8 4 4 6 5 8 1 ) + 0 0 0 2 3 6 5 6 "
    "#### 8 4 4 8 8 4 7 6",
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("line", PUBLISHED)
def test_multiplication_is_written_as_in_the_published_files(line):
    operands = [int("".join(x.split())[::-1]) for x in line.split("||")[0].split("*")]
    problem = Multiplication(4).problem(*operands)
    assert problem.prompt.replace(" ||", "||") + problem.chain.strip() + " ####" + problem.answer == line


@pytest.mark.parametrize("digits, tokens", [(2, 8), (4, 46), (5, 74), (7, 148), (9, 246)])
def test_chain_lengths_are_the_published_ones(digits, tokens):
    row = Multiplication(digits).sample(1, "train", generator())[0]
    assert len(row.cot_ids) == tokens and len(row.answer_ids) == 2 * digits


def test_operands_of_different_lengths():
    task = Multiplication(3, 2)
    problem = task.problem(407, 86)  # 407 * 6 = 2442, 407 * 80 = 32560, together 35002
    assert problem.prompt == "7 0 4 * 6 8 ||"
    assert (problem.chain, problem.right) == (" 2 4 4 2 + 0 6 5 2 3", "20053")
    assert {(len(row.prompt_ids), len(row.cot_ids)) for row in task.sample(50, "train", generator())} == {(7, 10)}
    assert task.name == "3 x 2-digit multiplication" and Multiplication(2, 2).name == "2-digit multiplication"
    one = Multiplication(2, 3).problem(11, 999)
    assert one.chain.split(" + ") == [" 9 9 0", "0 9 9 0 ( 9 8 0 1 )", "0 0 9 9 0"]


def test_addition_carries():
    problem = Addition(3).problem(964, 289)  # 4+9 = 13, 6+8+1 = 15, 9+2+1 = 12
    assert problem.chain.split() == ["3", "1", "5", "1", "2", "1"]
    assert problem.right == "3521"
