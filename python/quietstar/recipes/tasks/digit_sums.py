"""The last digit of a sum, which a small model can't learn to tell at once but can work out digit by digit."""

from __future__ import annotations

from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.recipes.tasks.base import Problem
from quietstar.recipes.tasks.generated import Generated
from quietstar.recipes.tasks.marks import CHAIN_MARK, TARGET


class DigitSums(Generated):
    """The last digit of the sum of ``digits`` digits: "7 5 8 6 2" has the answer 8.

    The chain has the last digits of the running sums, from that of the first two digits to that of all, which is the answer.

    Raises:
        ValueError: ``digits`` outside 2 to 18.
    """

    symbols = [*"0123456789"]

    def __init__(self, digits: int = 5, tokenizer: PreTrainedTokenizerBase | None = None):
        if not isinstance(digits, int) or not 2 <= digits <= 18:
            raise ValueError(f"DigitSums: digits must be from 2 to 18, got {digits!r}")
        self.digits = digits
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"sums of {self.digits} digits"

    def draw(self, generator: torch.Generator) -> Problem:
        return self.problem(torch.randint(10, (self.digits,), generator=generator).tolist())

    def problem(self, digits: list[int]) -> Problem:
        """The problem with these digits."""
        sums = [total % 10 for total in accumulate(digits)][1:]
        asked, answer = " ".join(map(str, digits)), str(sums[-1])
        hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
        return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {' '.join(map(str, sums))}", f" {answer}", answer)
