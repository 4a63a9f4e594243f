"""``quietstar explain``"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from quietstar.cli import common, errors
from quietstar.cli.ignored import Rule
from quietstar.data.held_out import data_config
from quietstar.data.texts import load_data
from quietstar.evaluation.intervals import PARTS, format_gain, smaller
from quietstar.explanation.report import explain
from quietstar.files.reading import read_utf8
from quietstar.model import QuietStar


@dataclass
class Explain:
    """Write a page that shows what thinking does to each token of a text."""

    model: common.Checkpoint
    text: Positional[Annotated[str, arg(metavar="TEXT", help="the text; default one that the model's run held out")]] = ""
    file: Annotated[str, arg(help="a UTF-8 file with the text")] = ""
    chat: common.Chat = False
    held_out: Annotated[int, arg(help="which of the texts that the run held out, from 0")] = 0
    out: Annotated[tuple[str, ...], arg(help="pages to write; all numbers where the name ends in .json")] = ("explain.html",)
    another: Annotated[
        str, arg(help="the text whose thoughts are the control; default another that was held out, or TEXT from half of it on")
    ] = ""
    seed: Annotated[int | None, arg(help="sample N thoughts with this seed; default the likeliest tokens")] = None

    ignored: ClassVar[list] = [
        Rule("held_out", lambda o: bool(o.text or o.file), "with a text"),
        Rule("chat", lambda o: not (o.text or o.file), "without a text"),
    ]

    def run(self) -> None:
        if self.text and self.file:
            raise ValueError("explain takes a text or --file, one of the two")
        if self.held_out < 0:
            raise errors.UsageError(f"--held-out must be 0 or more, got {self.held_out}")
        for path in self.out:
            common.check_out_file(path, self.file)
        text = read_utf8(self.file) if self.file else self.text
        qs = common.load_checkpoint(self.model)
        another, special = self.another or None, not self.chat
        if not text:
            text, other, special = self._held_out_texts(qs)
            another = another or other
        elif self.chat:
            tokenizer = common.text_tokenizer(qs)
            text = common.as_message(tokenizer, text)
            another = another and common.as_message(tokenizer, another)
        report = explain(qs, text, self.seed, another, special)
        for path in self.out:
            report.save(path)
        print(f"{summary_text(report.summary)}\nwrote {' and '.join(self.out)}")

    def _held_out_texts(self, qs: QuietStar) -> tuple[str, str | None, bool]:
        """As much of the text as the run would evaluate, of one to compare its thoughts with, if there is one, and whether
        special tokens are to be added."""
        if not qs.trained_on:
            raise ValueError(f"{self.model}: it doesn't say what its run held out: give explain a text or --file")
        config, tokenizer = data_config(qs.trained_on[-1]), common.text_tokenizer(qs)
        data = load_data(config, tokenizer, qs.thought_config.lookahead)
        common.check_unseen(self.model, qs.trained_on, config, data, "give explain a text or --file")
        n = len(data.held_out)
        if self.held_out >= n:
            raise ValueError(f"{self.model}: its run held out {n} texts, so there is no text {self.held_out}")
        print(f"text {self.held_out} of the {n} that the run held out, from {common.source_name(config.data)}")
        chosen = [self.held_out, (self.held_out + n // 2) % n]
        plain = isinstance(data.held_out_texts[self.held_out], str)
        one, other = (tokenizer.decode(data.held_out[i]["input_ids"], skip_special_tokens=plain) for i in chosen)
        return one, other if n > 1 else None, plain


def summary_text(figures: Mapping[str, float]) -> str:
    gains = "\n".join(f"  {sign} {name:<8}{format_gain(figures, name, 4)}" for sign, name in zip(" =+", PARTS, strict=True))
    return (
        f"loss of {figures['tokens']:,} tokens, nats: {figures['base']:.4f} without thoughts, {figures['another']:.4f} with "
        f"another's, {figures['mixed']:.4f} with its own; 95 % intervals\n{gains}\n"
        f"worth, the smaller of gain and content: {format_gain(figures, smaller(figures), 4)}\n"
        f"{figures['helped']:.0%} of the tokens helped by what was thought, {figures['hurt']:.0%} hurt by thinking"
    )
