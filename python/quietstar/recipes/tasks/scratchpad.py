"""Addition of numbers with one to several digits, with the scratchpad of the written method."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.generated import Generated
from quietstar.recipes.tasks.marks import CHAIN_MARK, TARGET
from quietstar.recipes.tasks.stories import spaced_digits


class Scratchpad(Generated):
    """Addition of two numbers of the same length, from one digit to ``digits``, all lengths equally often.

    STaR's problems (arXiv 2203.14465, section 4.1), whose form is that of arXiv 2112.00114. Numbers have their most significant
    digit first, so that an answer without a scratchpad must begin with the digit that depends on all carries. The scratchpad
    adds from the right. Each step has the two digits, the digit of their sum and the carry. The hint is the sum, and stands
    before the problem, so that problem and scratchpad are as far apart as without it.

    Raises:
        ValueError: ``digits`` outside 1 to 18.
    """

    symbols = [*"0123456789+"]

    def __init__(self, digits: int = 5, tokenizer: PreTrainedTokenizerBase | None = None):
        if not 1 <= digits <= 18:
            raise ValueError(f"Scratchpad: digits must be from 1 to 18, got {digits}")
        self.digits = digits
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"addition of 1 to {self.digits} digits with a scratchpad"

    def draw(self, generator: torch.Generator) -> Problem:
        length = int(torch.randint(1, self.digits + 1, (), generator=generator))
        least = 10 ** (length - 1) if length > 1 else 0
        a, b = torch.randint(least, 10**length, (2,), generator=generator).tolist()
        return self.problem(a, b)

    def problem(self, a: int, b: int) -> Problem:
        """The problem with these operands, which must have the same number of digits."""
        steps, carry = [], 0
        for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
            carry, digit = divmod(int(x) + int(y) + carry, 10)
            steps.append(f"{x} {y} {digit} {carry}")
        asked, answer = f"{spaced_digits(a)} + {spaced_digits(b)}", spaced_digits(a + b)
        return Problem(
            f"{asked} {CHAIN_MARK}",
            f"{TARGET} {answer} {CHAIN_MARK} {asked} {CHAIN_MARK}",
            f" {' '.join(steps)}",
            f" {answer}",
            str(a + b),
            kind="1 digit" if len(str(a)) == 1 else f"{len(str(a))} digits",
        )
