"""How questions are asked, and the result: every question with its answers, and figures over all, as JSON and as a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietstar.checks import check_think
from quietstar.config import option
from quietstar.evaluation.intervals import mean_interval, paired, wilson
from quietstar.evaluation.questions.reading import Question
from quietstar.files.writing import write_whole
from quietstar_kernels.checks import check_at_least, check_positive, check_types


@dataclass(frozen=True)
class Asking:
    """How questions are asked. Thoughts are greedy.

    Raises:
        ValueError: a value is outside its range.
    """

    think: float | str = option("always", "always, never, or only where the model's entropy is above this number of nats")
    chat: bool = option(False, "ask in the tokenizer's chat template: each question is a user's message")
    max_new_tokens: int = option(256, "most tokens of an answer")
    answer_prefix: str = option("", 'how an answer begins, such as " Let\'s think step by step."; not for the probability')
    votes: int = option(0, "answers to sample for a majority vote on each question; 0 for no vote")
    temperature: float = option(0.7, "temperature of the answers that vote")
    seed: int = option(0, "seed of the answers that vote, which it determines together with the batch size")
    batch_size: int = option(8, "questions at a time")

    def __post_init__(self) -> None:
        check_think("Asking: think", self.think)
        check_types("Asking", self)
        check_at_least("Asking", self, 1, ("max_new_tokens", "batch_size"))
        check_at_least("Asking", self, 0, ("votes",))
        check_positive("Asking", self, ("temperature",))


FORMAT = 1
SHOWN, WIDTH = 20, 90  # the page's largest number of differing questions, and of letters in each
TITLES = {"thinking": "with thoughts", "base": "without"}


@dataclass(frozen=True)
class ModelAnswer:
    """What a model answers to a question."""

    text: str  # the greedy answer
    extracted: str | None  # the label or number in that text; None if none was found, which counts as wrong
    probability: float  # of the right answer; see ``asking.scored_answers``
    votes: list[str | None]  # the label or number in each sampled answer
    vote: str | None  # the most frequent vote; None if none was found


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question, and the model's answers under "thinking" and "base"."""

    question: Question
    answers: dict[str, ModelAnswer]


@dataclass(frozen=True)
class AccuracyReport:
    """The result of ``asking.ask``.

    Attributes:
        model: class, name (where it was loaded from; may be empty), preset, mixing and thought_tokens.
        asking: the settings.
        asked: the questions in order.
    """

    model: dict[str, Any]
    asking: Asking
    asked: list[AnsweredQuestion]

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Figures over all questions for each measure: ``exact``, ``vote`` if answers were sampled, and ``probability``.

        Under "thinking" and "base", exact and vote have right, questions, unanswered (no answer was found), accuracy and the
        ends low and high of its Wilson interval; probability has mean, low and high. Under "paired", exact and vote have what
        ``intervals.paired`` returns, the first with thoughts; probability has the mean difference, low and high.
        """
        given: dict[str, Callable[[ModelAnswer], str | None]] = {"exact": lambda x: x.extracted}
        if self.asking.votes:
            given["vote"] = lambda x: x.vote
        return {name: self._accuracies(get) for name, get in given.items()} | {"probability": self._probabilities()}

    def to_dict(self) -> dict[str, Any]:
        """Format, model, settings, figures, and questions with their answers, as plain dicts, lists, numbers and strings."""
        questions = [
            {"question": x.question.text, "choices": dict(x.question.choices), "answer": x.question.answer}
            | {name: asdict(answer) for name, answer in x.answers.items()}
            for x in self.asked
        ]
        own = {"format": FORMAT, "model": self.model, "asking": asdict(self.asking)}
        return own | {"figures": self.figures, "questions": questions}

    @property
    def markdown(self) -> str:
        """A page with the figures and the questions that were answered right only with, or only without, thoughts."""
        return "\n\n".join(x for x in (self._heading(), self.table, self._notes(), self._differing()) if x) + "\n"

    @property
    def table(self) -> str:
        """The figures as a Markdown table."""
        titles = TITLES | {"paired": "difference"}
        measures = {"exact": "exact match", "vote": f"majority of {self.asking.votes}", "probability": "probability"}
        rows = [["", "", "95 % interval"]]
        for measure, modes in self.figures.items():
            for mode, figures in modes.items():
                form = ("+.1f",) if mode == "paired" else (".1f", " %")
                rows.append([measures[measure], titles[mode], _figures_cell(figures, *form)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(f"| {line} |" for line in lines)

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the numbers to ``path``, a .json, and the page next to it, a .md, each whole or not at all. Returns both."""
        page = Path(path).with_suffix(".md")
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        write_whole(page, self.markdown)
        return [Path(path), page]

    def _accuracies(self, get: Callable[[ModelAnswer], str | None]) -> dict[str, Any]:
        figures, right = dict[str, Any](), dict[str, list[bool]]()
        for name in self.asked[0].answers:
            answers = [get(x.answers[name]) for x in self.asked]
            right[name] = [answer == x.question.answer for answer, x in zip(answers, self.asked, strict=True)]
            low, high = wilson(sum(right[name]), len(answers))
            counts = {"right": sum(right[name]), "questions": len(answers), "unanswered": answers.count(None)}
            figures[name] = counts | {"accuracy": sum(right[name]) / len(answers), "low": low, "high": high}
        if len(right) == 2:
            figures["paired"] = paired(right["thinking"], right["base"])
        return figures

    def _probabilities(self) -> dict[str, Any]:
        values = {name: [x.answers[name].probability for x in self.asked] for name in self.asked[0].answers}
        if len(values) == 2:
            values["paired"] = [x - y for x, y in zip(values["thinking"], values["base"], strict=True)]
        figures = {name: dict(zip(("mean", "low", "high"), mean_interval(x), strict=True)) for name, x in values.items()}
        for name in self.asked[0].answers:  # few, very different values can give an interval beyond 0 to 1
            own = figures[name]
            own |= {end: None if x is None else min(max(x, 0.0), 1.0) for end, x in own.items()}
        return figures

    def _heading(self) -> str:
        asking = self.asking
        think = asking.think if isinstance(asking.think, str) else f"where the entropy exceeds {asking.think:g} nats"
        name = f" `{self.model['name']}`" if self.model["name"] else ""
        form = ", in the chat template" if asking.chat else ""
        return (
            f"# {len(self.asked):,} questions\n\n{self.model['class']}{name}, thoughts of "
            f"{self.model['thought_tokens']} tokens: {think}. Zero-shot{form}, answers of up to {asking.max_new_tokens} tokens."
        )

    def _notes(self) -> str:
        exact = self.figures["exact"]
        missing = " and ".join(f"{exact[name]['unanswered']:,} {TITLES[name]}" for name in self.asked[0].answers)
        notes = [
            "Intervals are 95 %: Wilson's for accuracies, over questions for the probability.",
            f"Greedy answers in which no answer was found, which count as wrong: {missing}, of {len(self.asked):,}.",
            "The probability is that of the right answer among the tokens of possible answers, a mean over questions.",
        ]
        if "paired" in exact:
            pair = exact["paired"]
            notes.append(
                f"Questions right by exact match only with thoughts: {pair['first']:,}; only without: {pair['second']:,} "
                f"(McNemar's exact test: p = {pair['p']:.2g})."
            )
        return "\n".join(f"- {note}" for note in notes)

    def _differing(self) -> str:
        if len(self.asked[0].answers) < 2:
            return ""
        rows = []
        for x in self.asked:
            thinking, base = x.answers["thinking"].extracted, x.answers["base"].extracted
            if (thinking == x.question.answer) != (base == x.question.answer):
                rows.append(f"| {_cell(x.question.text)} | {x.question.answer} | {thinking or '-'} | {base or '-'} |")
        if not rows:
            return ""
        more = f"\n\nAnd {len(rows) - SHOWN:,} more." if len(rows) > SHOWN else ""
        head = "| right with one of them only | answer | with thoughts | without |\n|---|---|---|---|\n"
        return head + "\n".join(rows[:SHOWN]) + more


def _figures_cell(figures: dict[str, Any], form: str, unit: str = "") -> str:
    """A share or a difference of two, in percent, with its interval."""
    share = next(figures[name] for name in ("accuracy", "difference", "mean") if name in figures)
    low, high = figures["low"], figures["high"]
    interval = "" if low is None else f" ({100 * low:{form}} to {100 * high:{form}})"
    return f"{100 * share:{form}}{unit}{interval}"


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table, with its markup escaped."""
    line = " ".join(text.split())
    line = line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
    return "".join(f"&#{ord(letter)};" if letter in "|<>&`*_[]\\$" else letter for letter in line)
