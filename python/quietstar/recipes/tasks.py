"""Problems whose answers can be checked: multiplication, addition, small stories, GSM8K, CommonsenseQA; each with its chain."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.data.texts import json_lines
from quietstar.evaluation.questions.answers import STOP, cut, extract
from quietstar.evaluation.questions.asking import prompt as ask
from quietstar.evaluation.questions.reading import MARK, Question, parse

__all__ = [
    "Addition",
    "CommonsenseQA",
    "GSM8K",
    "Multiplication",
    "Problem",
    "Row",
    "SPLITS",
    "Task",
    "WordProblems",
    "small_tokenizer",
]

SPLITS = ("train", "valid", "test")
TEST, VALID = 0.10, 0.05  # shares of the problems
CHAIN_MARK = "||"  # between a generated problem and its chain, as in the published multiplication files
TARGET = "Target:"  # before the answer, where a prompt gives it as a hint
AGAIN = "again"  # behind a solution, for another one
PAD, END = "<pad>", "<end>"


@dataclass(frozen=True)
class Problem:
    """A problem as text.

    Attributes:
        prompt: up to where the chain begins.
        hinted: the same with the answer in it, for rationalisation.
        chain, answer: as the model should write them; an empty chain where the data have none.
        right: the answer as ``Task.answer`` returns it.
        choices: text of each choice by its label; empty where the answer is written out.
    """

    prompt: str
    hinted: str
    chain: str
    answer: str
    right: str
    choices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A problem in token ids: ``prompt_ids``, then ``cot_ids``, ``Task.separator_ids``, ``answer_ids``, ``Task.end_id``.

    Attributes:
        prompt_ids, cot_ids, answer_ids: of the parts, without the marks between them.
        hinted_ids: of the prompt with the answer in it.
        problem: the same as text.
    """

    prompt_ids: list[int]
    cot_ids: list[int]
    answer_ids: list[int]
    hinted_ids: list[int]
    problem: Problem


class Task(ABC):
    """Problems of one kind, in the tokens of one tokenizer.

    A problem is in the same one of ``SPLITS`` for ever, by a hash of what is asked, so that train and test never share one.

    Args:
        tokenizer: of the model; default a small one of the task's own symbols, for models trained from scratch. It must have an
            end-of-text token.

    Raises:
        ValueError: a tokenizer without an end-of-text token.
    """

    symbols: Sequence[str] = ()
    stop: Sequence[str] = ()  # texts that end an answer, beside the end-of-text token
    between = f" {MARK}"  # between chain and answer
    again = f" {AGAIN} {CHAIN_MARK}"  # behind a solution: asks for another one, and does not say whether it was right

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None):
        self.tokenizer: Any = tokenizer or small_tokenizer(self.symbols)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{type(self).__name__}: the tokenizer has no end-of-text token, which ends an answer")
        self.end_id: int = self.tokenizer.eos_token_id
        self.separator_ids: list[int] = self._encode([self.between])[0]
        self.again_ids: list[int] = self._encode([self.again])[0]

    @property
    def name(self) -> str:
        """Of the problems, as a run's settings and reports have it."""
        return type(self).__name__

    @abstractmethod
    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        """``n`` problems of a split; fewer where a file has fewer."""

    def sample(self, n: int, split: str, generator: torch.Generator) -> list[Row]:
        """``n`` problems of a split in token ids; fewer where a file has fewer.

        Raises:
            ValueError: a split that isn't one of ``SPLITS``, or a split without a problem.
        """
        if split not in SPLITS:
            raise ValueError(f"{type(self).__name__}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        problems = self.problems(n, split, generator)
        if n and not problems:
            raise ValueError(f"{type(self).__name__}: the split {split!r} has no problem")
        return self._rows(problems)

    def solved(self, n: int, generator: torch.Generator) -> list[Row]:
        """``n`` training problems that come with a chain; fewer where a file has fewer."""
        return self._rows(self.problems(n, "train", generator))

    def completion_ids(self, row: Row) -> list[int]:
        """What should follow the row's prompt, from the chain to the end-of-text token; the answer alone without a chain."""
        return row.cot_ids + self.separator_ids + row.answer_ids + [self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, up to the end-of-text token or a stop text, without it."""
        ids = list(ids)
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return cut(self.tokenizer.decode(ids), self.stop)

    def trimmed(self, ids: Sequence[int]) -> list[int]:
        """Generated ids as one would train on them: the end-of-text token in the place of a stop text and what follows it.

        Ids without either, which were cut off by a limit, stay as they are.
        """
        ids = list(ids)
        if self.end_id in ids:
            return ids[: ids.index(self.end_id) + 1]
        whole = self.tokenizer.decode(ids)
        kept = cut(whole, self.stop)
        return ids if kept == whole else self._encode([kept.rstrip()])[0] + [self.end_id]

    def answer(self, row: Row, ids: Sequence[int]) -> str | None:
        """The answer in generated ids, to compare with others and with ``row.problem.right``; None: there is none."""
        if self.end_id not in list(ids):
            return None
        _, found, written = self.text(ids).partition(MARK)
        written = "".join(written.split())
        return written if found and written.isdigit() else None

    def check(self, row: Row, ids: Sequence[int]) -> bool:
        """Whether generated ids hold the right answer."""
        return self.answer(row, ids) == row.problem.right

    def check_chain(self, row: Row, ids: Sequence[int]) -> bool | None:
        """Whether the chain is that of the problem, word for word; None where the task has not one chain alone."""
        return self.text(ids).partition(MARK)[0].split() == row.problem.chain.split()

    def _rows(self, problems: Sequence[Problem]) -> list[Row]:
        if not problems:  # tokenizers take no empty list
            return []
        # Special tokens, such as one that begins a text, belong before the prompt alone.
        prompts, hinted = (self._encode([getattr(x, part) for x in problems], True) for part in ("prompt", "hinted"))
        chains, answers = (self._encode([getattr(x, part) for x in problems]) for part in ("chain", "answer"))
        return [Row(*parts) for parts in zip(prompts, chains, answers, hinted, problems, strict=True)]

    def _encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]


def small_tokenizer(symbols: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each of these words, which texts keep apart with spaces, and for the marks of ``Task``."""
    words = [PAD, END, *dict.fromkeys([CHAIN_MARK, MARK, TARGET, AGAIN, *symbols])]
    words_only = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token=PAD))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token=END, pad_token=PAD)


def split_of(asked: str) -> str:
    """The split of a problem, by a hash of what it asks."""
    place = int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if place < TEST else "valid" if place < TEST + VALID else "train"


class Generated(Task):
    """Problems made up one by one; a split's are drawn with replacement."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Problem:
        """A problem of any split."""

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        found: list[Problem] = []
        while len(found) < n:
            problem = self.draw(generator)
            if split_of(problem.prompt) == split:
                found.append(problem)
        return found


class Arithmetic(Generated):
    """Two operands of ``digits`` digits each, all numbers least significant digit first, a space between characters."""

    sign: str
    symbols = [*"0123456789+*()"]

    def __init__(self, digits: int, tokenizer: PreTrainedTokenizerBase | None = None):
        if not 1 <= digits <= 18:
            raise ValueError(f"{type(self).__name__}: digits must be from 1 to 18, got {digits}")
        self.digits = digits
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"{self.digits}-digit {type(self).__name__.lower()}"

    def draw(self, generator: torch.Generator) -> Problem:
        least = 10 ** (self.digits - 1) if self.digits > 1 else 0
        a, b = torch.randint(least, 10**self.digits, (2,), generator=generator).tolist()
        return self.problem(a, b)

    def problem(self, a: int, b: int) -> Problem:
        """The problem of these operands."""
        chain, answer = self.solve(a, b)
        asked = f"{spaced(a, self.digits)} {self.sign} {spaced(b, self.digits)}"
        hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
        return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {chain}", f" {answer}", "".join(answer.split()))

    @abstractmethod
    def solve(self, a: int, b: int) -> tuple[str, str]:
        """Chain and answer."""


class Multiplication(Arithmetic):
    """``digits`` x ``digits`` multiplication as in the published files of Internalize_CoT_Step_by_Step (arXiv 2405.14838).

    The chain is the partial products, the k-th of them with k zeros first, and in brackets the running sums but the first and
    the last. The answer has 2 * digits digits.
    """

    sign = "*"

    def solve(self, a: int, b: int) -> tuple[str, str]:
        pieces, total = [], 0
        for k in range(self.digits):
            partial = a * (b // 10**k % 10) * 10**k
            total += partial
            width = self.digits + 1 + k
            inside = f" ( {spaced(total, width)} )" if 0 < k < self.digits - 1 else ""
            pieces.append(spaced(partial, width) + inside)
        return " + ".join(pieces), spaced(total, 2 * self.digits)


class Addition(Arithmetic):
    """Addition; the chain has the sum's digit and the carry of each place, and the answer ``digits`` + 1 digits."""

    sign = "+"

    def solve(self, a: int, b: int) -> tuple[str, str]:
        steps, carry = [], 0
        for k in range(self.digits):
            carry, digit = divmod(a // 10**k % 10 + b // 10**k % 10 + carry, 10)
            steps.append(f"{digit} {carry}")
        return " ".join(steps), spaced(a + b, self.digits + 1)


def spaced(value: int, width: int) -> str:
    """The digits, least significant first."""
    return " ".join(f"{value:0{width}d}"[::-1])


class WordProblems(Generated):
    """Stories of two steps, "tom has 1 2 pens and buys 5 . then tom loses 4 ."; numbers in the usual order, digit by digit."""

    names = ("tom", "ann", "kim", "sam", "eva", "leo")
    things = ("pens", "books", "coins", "apples", "cards", "shells")
    gains = ("buys", "finds", "gets")
    losses = ("loses", "sells", "eats")
    symbols = [*"0123456789+-=;.?", "has", "and", "then", "how", "many", *names, *things, *gains, *losses]

    def draw(self, generator: torch.Generator) -> Problem:
        def one(words: Sequence[str]) -> str:
            return words[int(torch.randint(len(words), (), generator=generator))]

        def number(least: int, most: int) -> int:
            return int(torch.randint(least, most + 1, (), generator=generator))

        name, thing, value = one(self.names), one(self.things), number(2, 30)
        told, steps = [f"{name} has {apart(value)} {thing}"], []
        for word in ("and", f". then {name}"):
            loses = value > 1 and number(0, 1) == 1
            change = number(1, min(20, value)) if loses else number(1, 20)
            told.append(f"{word} {one(self.losses if loses else self.gains)} {apart(change)}")
            after = value - change if loses else value + change
            steps.append(f"{apart(value)} {'-' if loses else '+'} {apart(change)} = {apart(after)}")
            value = after
        asked, answer = f"{' '.join(told)} . how many {thing} ?", apart(value)
        hinted = f"{asked} {TARGET} {answer} {CHAIN_MARK}"
        return Problem(f"{asked} {CHAIN_MARK}", hinted, f" {' ; '.join(steps)}", f" {answer}", str(value))


def apart(value: int) -> str:
    return " ".join(str(value))


def shuffled(problems: Sequence[Problem], generator: torch.Generator) -> list[Problem]:
    return [problems[i] for i in torch.randperm(len(problems), generator=generator).tolist()]


class FromFile(Task):
    """Problems of a .jsonl file, or of a folder's train.jsonl and test.jsonl.

    Raises:
        ValueError: no such file, no question in it, a broken line, or a question without an answer; by its line.
    """

    stop = STOP
    between = f"\n{MARK}"
    again = "\n\nThere may be a mistake above. Solve it once more.\nA:"

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase):
        self.path = Path(path)
        if self.path.is_dir():
            training, test = ([x for _, x in self._read(self.path / f"{name}.jsonl")] for name in ("train", "test"))
            # What this leaves of the training file's hashes is "train": the test problems are in a file of their own.
            self.of = {"test": test, "valid": [x for x in training if split_of(x.prompt) == "valid"]}
            self.of["train"] = [x for x in training if split_of(x.prompt) != "valid"]
        else:
            rows = self._read(self.path)
            self.of = {split: [x for place, x in rows if place == split] for split in SPLITS}
        super().__init__(tokenizer)

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.path}"

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        return shuffled(self.of[split], generator)[:n]

    def solved(self, n: int, generator: torch.Generator) -> list[Row]:
        return self._rows(shuffled([x for x in self.of["train"] if x.chain], generator)[:n])

    def answer(self, row: Row, ids: Sequence[int]) -> str | None:
        return extract(self.text(ids), row.problem.choices)

    def check_chain(self, row: Row, ids: Sequence[int]) -> bool | None:
        return None

    def _read(self, path: Path) -> list[tuple[str, Problem]]:
        rows = []
        for number, value in json_lines(path):
            problem = self.problem(value, parse(value, f"{path}: line {number}"))
            rows.append((split_of(problem.prompt), problem))
        if not rows:
            raise ValueError(f"{path}: there is no question in it")
        return rows

    @abstractmethod
    def problem(self, row: dict[str, Any], question: Question) -> Problem:
        """From a line of the file."""


class GSM8K(FromFile):
    """GSM8K and data like it: the chain is what stands before ``####`` in the answer. A hint is the solution in brackets."""

    def problem(self, row: dict[str, Any], question: Question) -> Problem:
        chain = str(row["answer"]).rpartition(MARK)[0].strip()
        solution = f"{chain} {MARK} {question.written}" if chain else question.written
        hinted = ask(replace(question, text=f"{question.text} ({solution})"))
        return Problem(ask(question), hinted, f" {chain}" if chain else "", f" {question.written}", question.answer)


class CommonsenseQA(FromFile):
    """CommonsenseQA and data like it; a field "rationale", where a line has it, is its chain. A hint marks the right choice."""

    def problem(self, row: dict[str, Any], question: Question) -> Problem:
        if not question.choices:
            raise ValueError(f"{self.path}: {question.text[:40]!r} has no choices")
        marked = {x: f"{text} (CORRECT)" if x == question.answer else text for x, text in question.choices.items()}
        chain = str(row.get("rationale", "")).strip()
        return Problem(
            ask(question),
            ask(replace(question, choices=marked)),
            f" {chain}" if chain else "",
            f" ({question.answer})",
            question.answer,
            question.choices,
        )
