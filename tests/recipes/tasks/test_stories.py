"""Word problems of two steps."""

import re

import torch

from quietstar_recipes.tasks import WordProblems


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_stories_add_up():
    for row in WordProblems().sample(200, "train", generator()):
        steps = row.problem.chain.replace(" ", "").split(";")
        for step in steps:
            a, sign, b, c = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
            assert int(a) + int(b) * (1 if sign == "+" else -1) == int(c) >= 0
        assert steps[1].startswith(steps[0].split("=")[1]) and row.problem.right == steps[1].split("=")[1]
