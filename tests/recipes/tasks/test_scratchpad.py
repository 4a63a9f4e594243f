"""Addition with a scratchpad: how a problem is written, and which problems there are."""

from collections import Counter

import torch

from quietstar_recipes.common.evaluation import grade
from quietstar_recipes.common.sampling import Completion
from quietstar_recipes.tasks import Scratchpad


def test_the_scratchpad_adds_from_the_right_and_carries():
    problem = Scratchpad().problem(964, 289)
    assert problem.prompt == "9 6 4 + 2 8 9 ||" and problem.hinted == "Target: 1 2 5 3 || 9 6 4 + 2 8 9 ||"
    assert problem.chain == " 4 9 3 1 6 8 5 1 9 2 2 1" and problem.answer == " 1 2 5 3"  # 13, 6+8+1 = 15, 9+2+1 = 12
    assert problem.right == "1253" and problem.kind == "3 digits"


def test_every_length_is_as_likely_and_both_operands_have_it():
    generator = torch.Generator().manual_seed(0)
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
    rows = task.sample(40, "train", torch.Generator().manual_seed(0))
    short = [row.problem.kind == "1 digit" for row in rows]
    written = [
        Completion(task.completion_ids(row if one or i % 2 else other), [0.0])
        for i, (row, one, other) in enumerate(zip(rows, short, rows[1:] + rows[:1], strict=True))
    ]
    found = grade(task, rows, written)
    long_right = [i % 2 for i, one in enumerate(short) if not one]
    assert 0 < sum(short) < 40 and found["by_kind"] == {"1 digit": 1.0, "2 digits": sum(long_right) / len(long_right)}
