"""What every task provides: problems as text and as token ids, and a check of generated answers."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.data.rows import MARK
from quietstar.data.sources import CHAIN_MARK
from quietstar.evaluation.questions.answers import cut
from quietstar.hf.ends import end_ids

LOG = logging.getLogger("quietstar")
TARGET = "Target:"  # precedes the answer where a prompt gives it as a hint
AGAIN = "again"  # follows a solution, to ask for another one
PAD, END = "<pad>", "<end>"
SPLITS = ("train", "valid", "test")
TEST, VALID = 0.10, 0.05  # shares of the problems


@dataclass(frozen=True)
class Problem:
    """A problem as text.

    Attributes:
        prompt: up to where the chain begins.
        hinted: the prompt with the answer in it, for rationalisation.
        chain, answer: as the model should write them; the chain is empty where the data have none.
        right: the right answer, in the form that ``Task.answer`` returns.
        choices: the text of each choice by its label; empty where the answer is written out.
        kind: groups problems whose accuracies are reported apart, such as those of one length; empty where there is one group.
    """

    prompt: str
    hinted: str
    chain: str
    answer: str
    right: str
    choices: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A problem as token ids: ``prompt_ids``, then ``cot_ids``, ``Task.separator_ids``, ``answer_ids``, ``Task.end_id``.

    Attributes:
        prompt_ids, cot_ids, answer_ids: the parts, without the marks between them.
        hinted_ids: the prompt with the answer in it.
        problem: the same problem as text.
    """

    prompt_ids: list[int]
    cot_ids: list[int]
    answer_ids: list[int]
    hinted_ids: list[int]
    problem: Problem


class Task(ABC):
    """Problems of one kind, in the tokens of one tokenizer.

    A hash of its prompt assigns each problem to one of ``SPLITS``, so that train and test never share a problem.

    Args:
        tokenizer: the model's; default a small one of the task's own symbols, for models trained from scratch. It must have an
            end-of-text token.
    """

    symbols: Sequence[str] = ()  # words of the small tokenizer
    stop: Sequence[str] = ()  # strings that end an answer, besides the end-of-text token
    step_marks: Sequence[str] = (MARK,)  # a token that contains one of these ends a step of a solution
    between = f" {MARK}"  # between chain and answer
    files: Sequence[str] = ()  # where problems are read from; none where they are generated
    again = f" {AGAIN} {CHAIN_MARK}"  # follows a solution and asks for another, without saying whether it was right

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None):
        self.tokenizer: Any = tokenizer or small_tokenizer(self.symbols)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{type(self).__name__}: the tokenizer has no end-of-text token, which ends an answer")
        self.end_id: int = self.tokenizer.eos_token_id
        self.ends = set(end_ids(self.tokenizer))  # what ends a solution; ``rollout`` adds those of its model
        self.separator_ids: list[int] = self._encode([self.between])[0]
        self.again_ids: list[int] = self._encode([self.again])[0]
        self._said: set[tuple[str, int]] = set()  # what a line in the log has said already

    @property
    def name(self) -> str:
        """Identifies the problems in a run's settings and reports."""
        return type(self).__name__

    @abstractmethod
    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        """``n`` problems of a split; fewer where there are fewer. Only those to train on may repeat."""

    def sample(self, n: int, split: str, generator: torch.Generator) -> list[Row]:
        """``n`` problems of a split as token ids; fewer, with a line in the log, where there are fewer.

        Generated problems of "valid" and "test" are distinct, so that intervals are right. Those of "train" may repeat.
        """
        if split not in SPLITS:
            raise ValueError(f"{type(self).__name__}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        problems = self.problems(n, split, generator)
        if n and not problems:
            raise ValueError(f"{type(self).__name__}: the split {split!r} has no problem")
        distinct = len({problem.prompt for problem in problems})
        # Some of many training problems are drawn twice by chance; if half of them are, there are fewer than asked for.
        if distinct < (n / 2 if split == "train" else n) and (split, n) not in self._said:
            self._said.add((split, n))
            LOG.info("%s: %s distinct %s problems, %s asked", self.name, f"{distinct:,}", split, f"{n:,}")
        return self._rows(problems)

    def sample_with_chain(self, n: int, generator: torch.Generator) -> list[Row]:
        """``n`` training problems that come with a chain; fewer where a file has fewer."""
        return self._rows(self.problems(n, "train", generator))

    def completion_ids(self, row: Row) -> list[int]:
        """What should follow the row's prompt: chain, separator, answer and end-of-text token."""
        return row.cot_ids + self.direct_ids(row)

    def direct_ids(self, row: Row) -> list[int]:
        """The same without the chain: what a model learns that answers directly."""
        return self.separator_ids + row.answer_ids + [self.end_id]

    @cached_property
    def step_ids(self) -> frozenset[int]:
        """The tokens that end a step of a solution, besides the end-of-text token."""
        texts = (self.tokenizer.decode([i]) for i in range(len(self.tokenizer)))
        return frozenset(i for i, text in enumerate(texts) if any(mark in text for mark in self.step_marks))

    def step_ends(self, ids: Sequence[int]) -> list[int]:
        """The length of a solution up to the end of each of its steps, the last of which is its whole length."""
        ends = [i for i, x in enumerate(ids, 1) if x in self.step_ids and i < len(ids)]
        return [*ends, len(ids)]

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, up to but without the end-of-text token or a stop string."""
        ids = list(ids)
        return cut(self.tokenizer.decode(ids[: self.end(ids)]), self.stop)

    def end(self, ids: Sequence[int]) -> int | None:
        """The place of the token that ends a solution; None where there is none."""
        return next((i for i, x in enumerate(ids) if x in self.ends), None)

    def trimmed(self, ids: Sequence[int]) -> list[int]:
        """Generated ids in the form to train on: the end-of-text token replaces a stop string and all that follows it.

        Ids with neither, because they reached the length limit, are returned unchanged.
        """
        ids = list(ids)
        if (end := self.end(ids)) is not None:
            return [*ids[:end], self.end_id]
        whole = self.tokenizer.decode(ids)
        kept = cut(whole, self.stop)
        return ids if kept == whole else self._encode([kept.rstrip()])[0] + [self.end_id]

    def answer(self, row: Row, ids: Sequence[int]) -> str | None:
        """The answer in generated ids, comparable with other answers and with ``row.problem.right``; None if there is none."""
        if self.end(ids) is None:
            return None
        _, mark, written = self.text(ids).partition(MARK)
        written = "".join(written.split())
        return written if mark and written.isdigit() else None

    def check(self, row: Row, ids: Sequence[int]) -> bool:
        """Whether generated ids contain the right answer."""
        return self.answer(row, ids) == row.problem.right

    def check_chain(self, row: Row, ids: Sequence[int]) -> bool | None:
        """Whether the chain is the problem's own, word for word; None where a problem may have several right chains."""
        return self.text(ids).partition(MARK)[0].split() == row.problem.chain.split()

    def _rows(self, problems: Sequence[Problem]) -> list[Row]:
        if not problems:  # tokenizers reject an empty list
            return []
        # Special tokens, such as one at the beginning of a text, belong only before the prompt.
        prompts, hinted = (self._encode([getattr(x, part) for x in problems], True) for part in ("prompt", "hinted"))
        chains, answers = (self._encode([getattr(x, part) for x in problems]) for part in ("chain", "answer"))
        return [Row(*parts) for parts in zip(prompts, chains, answers, hinted, problems, strict=True)]

    def _encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]


def split_of(prompt: str) -> str:
    """The split that a problem belongs to, from a hash of its prompt."""
    share = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if share < TEST else "valid" if share < TEST + VALID else "train"


def small_tokenizer(symbols: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each of these words, which are separated by spaces in the text, and for the marks of ``Task``."""
    words = [PAD, END, *dict.fromkeys([CHAIN_MARK, MARK, TARGET, AGAIN, *symbols])]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
