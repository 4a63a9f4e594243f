"""How questions are asked: the settings of ``asking.ask``, which its report repeats."""

from __future__ import annotations

from dataclasses import dataclass

from quietstar.arguments.fields import check_at_least, check_positive, check_types
from quietstar.generate import Thinking


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        think: which tokens of an answer to think before, as in ``QuietStar.generate``; thoughts are greedy.
        max_new_tokens: in a generated answer.
        answer_prefix: the start of a generated answer, such as " Let's think step by step."; not used for the probability.
        votes: answers to sample for a majority vote; 0 for none.
        temperature: for sampling those answers.
        seed: for sampling those answers, which it determines together with the batch size.
        batch_size: questions at once.

    Raises:
        ValueError: a value is outside its range.
    """

    think: str | float = "always"
    max_new_tokens: int = 256
    answer_prefix: str = ""
    votes: int = 0
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        Thinking(self.think, 1, False, None, None, None)
        check_types("Asking", self)
        check_at_least("Asking", self, 1, ("max_new_tokens", "batch_size"))
        check_at_least("Asking", self, 0, ("votes",))
        check_positive("Asking", self, ("temperature",))
