"""Digit sums: a line is five digits and the last digit of their sum, with or without an aside before the answer.

A token is a character, so tensors of digits are also tensors of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

# Tokens: the digits 0 to 9, then these.
EQUALS, DASH, NEWLINE, PAUSE = 10, 11, 12, 13
SYMBOLS = "0123456789=-\n_"
DIGITS, STEPS = 5, 4  # in a line, in an aside
AT_EQUALS = DIGITS  # the position of "=", whose next token is the answer in a line without an aside

HELPFUL = 0.4  # share of the asides that are running sums
DIRECT = 0.4  # share of the lines without an aside
TEST_LINES = 2048  # of the held-out strings, to score runs on


def split_strings(seed: int) -> tuple[Tensor, Tensor]:
    """All strings of five digits in random order, [90000,5] to train on and [10000,5] held out.

    The split is random because a rule such as "the string mod 10" would say something about the sum of the digits.
    """
    numbers = torch.randperm(10**DIGITS, generator=torch.Generator().manual_seed(seed))
    strings = numbers[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10
    held_out = len(strings) // 10
    return strings[held_out:], strings[:held_out]


def draw(strings: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return strings[torch.randint(len(strings), (count,), generator=generator)]


def running_sums(digits: Tensor) -> Tensor:
    """[lines,4], the last digits of the sums of the first 2, 3, 4 and 5 digits. The last one is the answer."""
    return digits.cumsum(1)[:, 1:] % 10


def column(digits: Tensor, token: int) -> Tensor:
    return digits.new_full((len(digits), 1), token)


def direct_lines(digits: Tensor) -> Tensor:
    """d d d d d = a and a newline, [lines,8]."""
    return torch.cat([digits, column(digits, EQUALS), running_sums(digits)[:, -1:], column(digits, NEWLINE)], 1)


def aside_lines(digits: Tensor, aside: Tensor) -> Tensor:
    """d d d d d = - c c c c - a and a newline, [lines,14]."""
    direct, dash = direct_lines(digits), column(digits, DASH)
    return torch.cat([direct[:, : AT_EQUALS + 1], dash, aside, dash, direct[:, AT_EQUALS + 1 :]], 1)


def mixed_lines(digits: Tensor, generator: torch.Generator, helpful: float = HELPFUL) -> Tensor:
    """The text to pretrain on, [lines,14], with this share of its asides helpful.

    Lines without an aside are padded with pause tokens, which every loss ignores.
    """
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    aside = torch.where(luck < helpful, running_sums(digits), digits[:, :STEPS])
    with_aside, direct = aside_lines(digits, aside), direct_lines(digits)
    fill = column(digits, PAUSE).expand(-1, with_aside.shape[1] - direct.shape[1])
    return torch.where(kind < DIRECT, torch.cat([direct, fill], 1), with_aside)


def as_text(tokens: Tensor) -> str:
    return " ".join(SYMBOLS[token] for token in tokens.tolist())


def score(logprobs: Tensor, digits: Tensor) -> dict[str, Any]:
    """Mean loss (nats) and number of right answers, the most likely of all 14 tokens, from log-probabilities [lines,1,14].

    They are taken as they are: mixed log-probabilities don't add up to 1, in the loss of training either.
    """
    answers = running_sums(digits)[:, -1]
    nll = nll_loss(logprobs[:, 0], answers).item()
    return {"nll": nll, "right": int((logprobs[:, 0].argmax(-1) == answers).sum()), "lines": len(digits)}


def right_thoughts(thought_ids: Tensor, digits: Tensor) -> float:
    """The share of thoughts at "=" [lines,1,1,4] that are all four running sums."""
    return (thought_ids[:, 0, 0] == running_sums(digits)).all(1).float().mean().item()
