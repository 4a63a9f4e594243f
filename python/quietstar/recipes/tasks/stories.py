"""Word problems of two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.generated import Generated
from quietstar.recipes.tasks.marks import CHAIN_MARK, MARK, TARGET


class WordProblems(Generated):
    """Stories of two steps: "tom has 1 2 pens and buys 5 . then tom loses 4 ."

    Numbers are in the usual order, with spaces between digits.
    """

    people = ("tom", "ann", "kim", "sam", "eva", "leo")
    things = ("pens", "books", "coins", "apples", "cards", "shells")
    gains = ("buys", "finds", "gets")
    losses = ("loses", "sells", "eats")
    step_marks = (";", MARK)
    symbols = [*"0123456789+-=;.?", "has", "and", "then", "how", "many", *people, *things, *gains, *losses]

    def draw(self, generator: torch.Generator) -> Problem:
        def one(words: Sequence[str]) -> str:
            return words[int(torch.randint(len(words), (), generator=generator))]

        def number(least: int, most: int) -> int:
            return int(torch.randint(least, most + 1, (), generator=generator))

        name, thing, value = one(self.people), one(self.things), number(2, 30)
        story, steps = [f"{name} has {spaced_digits(value)} {thing}"], []
        for word in ("and", f". then {name}"):
            loses = value > 1 and number(0, 1) == 1
            change = number(1, min(20, value)) if loses else number(1, 20)
            story.append(f"{word} {one(self.losses if loses else self.gains)} {spaced_digits(change)}")
            after = value - change if loses else value + change
            steps.append(f"{spaced_digits(value)} {'-' if loses else '+'} {spaced_digits(change)} = {spaced_digits(after)}")
            value = after
        asked, answer = f"{' '.join(story)} . how many {thing} ?", spaced_digits(value)
        hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
        return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {' ; '.join(steps)}", f" {answer}", str(value))


def spaced_digits(value: int) -> str:
    """The digits in the usual order, separated by spaces."""
    return " ".join(str(value))
