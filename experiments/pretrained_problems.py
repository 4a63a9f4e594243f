"""Word problems of two steps for pretrained.py: "Q: Anna has 8 pens. She buys 7 more and gives 6 away. ... A: 9."

Numbers are below 10, so that a model of 135 million weights can learn the sums in minutes. Four of the twenty templates and a
tenth of the triples of numbers are held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quietstar.run.batches import Example

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Martin")
THINGS = ("pens", "books", "coins", "apples", "cards", "shells", "stamps", "balls", "eggs", "keys", "cups", "hats")
# The signs of the two steps, and the story.
TEMPLATES = (
    ("+-", "{name} has {a} {things}, buys {b} more and gives {c} away. How many {things} are left?"),
    ("+-", "{name} puts {b} {things} into a box that holds {a}, then takes {c} out. How many {things} are in the box?"),
    ("-+", "{name} had {a} {things}, lost {b} and found {c}. How many {things} does {name} have now?"),
    ("--", "{name} picks {a} {things}, sells {b} and breaks {c}. How many {things} are left?"),
    ("++", "{name} has {a} {things}. A friend brings {b}, and another brings {c}. How many {things} are there?"),
    ("+-", "A bus has {a} people in it. At the stop {b} get on and {c} get off. How many people are in the bus?"),
    ("--", "A shop has {a} {things}. {name} buys {b} of them, and then {c} more. How many {things} does the shop have?"),
    ("++", "{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} is that?"),
    ("-+", "Of {a} {things}, {name} throws {b} away. Then {name} makes {c} new ones. How many {things} are there now?"),
    ("+-", "A lift at floor {a} takes {name} up {b} floors and then down {c}. At which floor does {name} get out?"),
    ("-+", "{a} birds sit in a tree. {b} fly off and {c} come back. How many birds sit in the tree?"),
    ("++", "A red bag holds {a} {things}, a blue bag {b} and a green bag {c}. How many {things} do the bags hold?"),
    ("+-", "{name} scores {a} points, then {b}, and loses {c}. How many points does {name} have?"),
    ("--", "{name} has {a} {things} to wash. Before lunch {b} are done, after lunch {c}. How many {things} are not washed?"),
    ("-+", "{name} pays {b} of {a} dollars for {things} and is paid {c} for work. How many dollars does {name} have?"),
    ("++", "{name} walks {a} miles, rests, walks {b} miles and then {c} miles home. How many miles does {name} walk?"),
    # Held out.
    ("+-", "{name} baked {a} cakes in the morning and {b} at night. Guests ate {c}. How many cakes remain?"),
    ("-+", "A train leaves with {a} cars. It drops {b} at the first station and takes {c}. How many cars has the train?"),
    ("--", "{name} reads a book of {a} pages: {b} pages today, {c} tomorrow. How many pages are left after that?"),
    ("++", "In the garden are {a} roses. {name} plants {b} tulips and {c} lilies. How many flowers are in the garden?"),
)
NEW = 4  # the last templates are held out
MARK = " ("  # what an aside begins with


@dataclass(frozen=True)
class Problem:
    """A question with its chain of two sums, and an aside that only says the numbers again."""

    question: str
    chain: str
    restated: str
    answer: int

    @property
    def asked(self) -> str:
        return f"Q: {self.question} A:"


def draw(rng: random.Random, templates: Sequence[tuple[str, str]], held_out: bool) -> Problem:
    """A problem of one of the templates, with numbers that are, or are not, held out; no step goes below zero."""
    while True:
        signs, story = rng.choice(templates)
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        first = a + b if signs[0] == "+" else a - b
        answer = first + c if signs[1] == "+" else first - c
        if min(first, answer) >= 0 and ((a + 3 * b + 7 * c) % 10 == 0) == held_out:
            question = story.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b, c=c)
            chain = f"{a}{signs[0]}{b}={first}, {first}{signs[1]}{c}={answer}"
            return Problem(question, chain, f"{a}, {b} and {c}", answer)


def problems(count: int, seed: int, part: str) -> list[Problem]:
    """So many problems "train", "test" (numbers that are held out) or "new" (held-out templates as well), all different."""
    rng = random.Random(f"{part} {seed}")
    templates = TEMPLATES[-NEW:] if part == "new" else TEMPLATES[:-NEW]
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw(rng, templates, held_out=part != "train")
        found[problem.question] = problem
    return list(found.values())


def line(tokenizer: Any, problem: Problem, aside: str = "") -> Example:
    """The tokens of a problem with its answer, and between them an aside in brackets; the anchor is the colon after A.

    Each part has tokens of its own, so that the answer's are the same with and without an aside.
    """
    asked = ids(tokenizer, problem.asked)
    between = ids(tokenizer, f"{MARK}{aside})") if aside else []
    text = asked + between + ids(tokenizer, f" {problem.answer}.") + [tokenizer.eos_token_id]
    return {"input_ids": torch.tensor(text), "anchors": torch.tensor([len(asked) - 1])}


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def warm_lines(tokenizer: Any, some: Sequence[Problem], seed: int) -> list[Example]:
    """Of 16 lines, 6 have the right chain, 6 an aside that restates the question, and 4 the answer at once."""
    rng = random.Random(f"warm {seed}")
    kinds = ["chain"] * 6 + ["restated"] * 6 + [""] * 4
    return [line(tokenizer, problem, getattr(problem, kind) if (kind := rng.choice(kinds)) else "") for problem in some]
