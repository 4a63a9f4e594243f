"""Multiplication and addition, digit by digit, with the chain of the written method."""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.generated import Generated
from quietstar.recipes.tasks.marks import CHAIN_MARK, MARK, TARGET


class Arithmetic(Generated):
    """Two operands of ``digits`` digits each. All numbers have the least significant digit first; spaces separate characters.

    Raises:
        ValueError: ``digits`` outside 1 to 18.
    """

    sign: str
    symbols = [*"0123456789+*()"]

    def __init__(self, digits: int, tokenizer: PreTrainedTokenizerBase | None = None):
        self.digits = self.other = self._checked("digits", digits)  # of the first and the second operand
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"{self.digits}-digit {type(self).__name__.lower()}"

    def draw(self, generator: torch.Generator) -> Problem:
        a, b = (_number(digits, generator) for digits in (self.digits, self.other))
        return self.problem(a, b)

    def problem(self, a: int, b: int) -> Problem:
        """The problem with these operands."""
        chain, answer = self.solve(a, b)
        asked = f"{reversed_digits(a, self.digits)} {self.sign} {reversed_digits(b, self.other)}"
        hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
        return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {chain}", f" {answer}", "".join(answer.split()))

    @abstractmethod
    def solve(self, a: int, b: int) -> tuple[str, str]:
        """Chain and answer."""

    def _checked(self, name: str, digits: int) -> int:
        if not isinstance(digits, int) or not 1 <= digits <= 18:
            raise ValueError(f"{type(self).__name__}: {name} must be from 1 to 18, got {digits!r}")
        return digits


class Multiplication(Arithmetic):
    """``digits`` x ``other`` multiplication as in the published files of Internalize_CoT_Step_by_Step (arXiv 2405.14838).

    The chain has the partial products, the k-th of them with k leading zeros, and in brackets the running sums, except the
    first and the last. The answer has ``digits`` + ``other`` digits.

    Args:
        digits, other: of the first and the second operand; ``other`` is by default as large.

    Raises:
        ValueError: ``digits`` or ``other`` outside 1 to 18.
    """

    sign = "*"
    step_marks = ("+", "(", MARK)  # each partial product and each running sum is a step

    def __init__(self, digits: int, other: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__(digits, tokenizer)
        self.other = digits if other is None else self._checked("other", other)

    @property
    def name(self) -> str:
        shape = f"{self.digits}" if self.other == self.digits else f"{self.digits} x {self.other}"
        return f"{shape}-digit multiplication"

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


def _number(digits: int, generator: torch.Generator) -> int:
    least = 10 ** (digits - 1) if digits > 1 else 0
    return int(torch.randint(least, 10**digits, (1,), generator=generator))
