"""Problems made up one at a time: arithmetic and short stories."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.data.rows import MARK
from quietstar.data.sources import CHAIN_MARK
from quietstar_recipes.tasks.base import TARGET, Problem, Task, split_of

PATIENCE = 20  # draws in vain for each known problem until there are no others: one is missed with probability exp(-20)


class Generated(Task):
    """Problems made up one at a time. Those to train on are drawn with replacement, all others are distinct."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Problem:
        """A problem of any split."""

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        found: list[Problem] = []
        seen: set[str] = set()  # of any split
        in_vain = 0  # draws since the last one of use; after many of them there are no more problems
        while len(found) < n and in_vain < 100 + PATIENCE * len(seen):
            problem = self.draw(generator)
            new = problem.prompt not in seen
            wanted = split_of(problem.prompt) == split and (new or split == "train")
            seen.add(problem.prompt)
            if wanted:
                found.append(problem)
            in_vain = 0 if new or wanted else in_vain + 1
        return found

    def _checked(self, digits: int, least: int = 1, name: str = "digits") -> int:
        if not isinstance(digits, int) or not least <= digits <= 18:
            raise ValueError(f"{type(self).__name__}: {name} must be from {least} to 18, got {digits!r}")
        return digits


class Arithmetic(Generated):
    """Two operands of ``digits`` digits each. Numbers have the least significant digit first; spaces separate characters."""

    sign: str
    symbols = [*"0123456789+*()"]

    def __init__(self, digits: int, tokenizer: PreTrainedTokenizerBase | None = None):
        self.digits = self.other = self._checked(digits)  # of the first and the second operand
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        shape = f"{self.digits}" if self.other == self.digits else f"{self.digits} x {self.other}"
        return f"{shape}-digit {type(self).__name__.lower()}"

    def draw(self, generator: torch.Generator) -> Problem:
        return self.problem(*(int(numbers(digits, 1, generator)) for digits in (self.digits, self.other)))

    def problem(self, a: int, b: int) -> Problem:
        """The problem with these operands."""
        chain, answer = self.solve(a, b)
        asked = f"{reversed_digits(a, self.digits)} {self.sign} {reversed_digits(b, self.other)}"
        return written(asked, chain, answer)

    @abstractmethod
    def solve(self, a: int, b: int) -> tuple[str, str]:
        """Chain and answer."""


class Multiplication(Arithmetic):
    """``digits`` x ``other`` multiplication as in the published files of Internalize_CoT_Step_by_Step (arXiv 2405.14838).

    The chain has the partial products, the k-th of them with k leading zeros, and in brackets the running sums, except the
    first and the last. The answer has ``digits`` + ``other`` digits.

    Args:
        digits, other: of the first and the second operand; ``other`` is by default as large.
    """

    sign = "*"
    step_marks = ("+", "(", MARK)  # each partial product and each running sum is a step

    def __init__(self, digits: int, other: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__(digits, tokenizer)
        self.other = digits if other is None else self._checked(other, name="other")

    def solve(self, a: int, b: int) -> tuple[str, str]:
        pieces, total = [], 0
        for k in range(self.other):
            partial = a * (b // 10**k % 10) * 10**k
            total += partial
            width = self.digits + 1 + k
            inside = f" ( {reversed_digits(total, width)} )" if 0 < k < self.other - 1 else ""
            pieces.append(reversed_digits(partial, width) + inside)
        return " + ".join(pieces), reversed_digits(total, self.digits + self.other)


class Addition(Arithmetic):
    """Addition. The chain has the digit of the sum and the carry for each place; the answer has ``digits`` + 1 digits."""

    sign = "+"

    def solve(self, a: int, b: int) -> tuple[str, str]:
        steps, carry = [], 0
        for k in range(self.digits):
            carry, digit = divmod(a // 10**k % 10 + b // 10**k % 10 + carry, 10)
            steps.append(f"{digit} {carry}")
        return " ".join(steps), reversed_digits(a + b, self.digits + 1)


def reversed_digits(value: int, width: int) -> str:
    """The digits, least significant first, separated by spaces and padded with zeros to ``width``."""
    return " ".join(f"{value:0{width}d}"[::-1])


def numbers(digits: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of so many digits, [count]."""
    return torch.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits, (count,), generator=generator)


def written(asked: str, chain: str, answer: str) -> Problem:
    """The problem of these parts, whose hint is the answer behind the question."""
    hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
    return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {chain}", f" {answer}", "".join(answer.split()))


class Scratchpad(Generated):
    """Addition of two numbers of the same length, from one digit to ``digits``, all lengths equally often.

    STaR's problems (arXiv 2203.14465, section 4.1), whose form is that of arXiv 2112.00114. Numbers have their most significant
    digit first, so that an answer without a scratchpad must begin with the digit that depends on all carries. The scratchpad
    adds from the right. Each step has the two digits, the digit of their sum and the carry. The hint is the sum, and stands
    before the problem, so that problem and scratchpad are as far apart as without it.
    """

    symbols = [*"0123456789+"]

    def __init__(self, digits: int = 5, tokenizer: PreTrainedTokenizerBase | None = None):
        self.digits = self._checked(digits)
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"addition of 1 to {self.digits} digits with a scratchpad"

    def draw(self, generator: torch.Generator) -> Problem:
        length = int(torch.randint(1, self.digits + 1, (), generator=generator))
        return self.problem(*numbers(length, 2, generator).tolist())

    def problem(self, a: int, b: int) -> Problem:
        """The problem with these operands, which must have the same number of digits."""
        steps, carry = [], 0
        for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
            carry, digit = divmod(int(x) + int(y) + carry, 10)
            steps.append(f"{x} {y} {digit} {carry}")
        asked, answer = f"{spaced_digits(a)} + {spaced_digits(b)}", spaced_digits(a + b)
        hinted = f"{TARGET} {answer} {CHAIN_MARK} {asked} {CHAIN_MARK}"
        kind = "1 digit" if len(str(a)) == 1 else f"{len(str(a))} digits"
        return replace(written(asked, " ".join(steps), answer), hinted=hinted, kind=kind)


class DigitSums(Generated):
    """The last digit of the sum of ``digits`` digits: "7 5 8 6 2" has the answer 8.

    The chain has the last digits of the running sums, from that of the first two digits to that of all, which is the answer.
    """

    symbols = [*"0123456789"]

    def __init__(self, digits: int = 5, tokenizer: PreTrainedTokenizerBase | None = None):
        self.digits = self._checked(digits, least=2)
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"sums of {self.digits} digits"

    def draw(self, generator: torch.Generator) -> Problem:
        return self.problem(torch.randint(10, (self.digits,), generator=generator).tolist())

    def problem(self, digits: list[int]) -> Problem:
        """The problem with these digits."""
        sums = [total % 10 for total in accumulate(digits)][1:]
        return written(" ".join(map(str, digits)), " ".join(map(str, sums)), str(sums[-1]))


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
        return written(f"{' '.join(story)} . how many {thing} ?", " ; ".join(steps), spaced_digits(value))


def spaced_digits(value: int) -> str:
    """The digits in the usual order, separated by spaces."""
    return " ".join(str(value))
