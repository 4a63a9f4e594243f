"""``quietstar explain``"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from quietstar.cli.errors import UsageError
from quietstar.cli.loading import check_unseen, load_checkpoint, text_tokenizer
from quietstar.cli.shared_options import Checkpoint, check_out_file
from quietstar.cli.tables import source_name
from quietstar.data.held_out import data_config
from quietstar.data.texts import load_data
from quietstar.files.reading import read_utf8
from quietstar.model import QuietStar


@dataclass
class Explain:
    """Write a page that shows what thinking does to each token of a text."""

    model: Checkpoint
    text: Positional[Annotated[str, arg(metavar="TEXT", help="the text; default one that the model's run held out")]] = ""
    file: Annotated[str, arg(help="a UTF-8 file with the text")] = ""
    held_out: Annotated[int, arg(help="which of the texts that the run held out, from 0")] = 0
    out: Annotated[tuple[str, ...], arg(help="pages to write; all numbers where the name ends in .json")] = ("explain.html",)
    seed: Annotated[int | None, arg(help="sample N thoughts with this seed; default the likeliest tokens")] = None

    def run(self) -> None:
        if self.text and self.file:
            raise ValueError("explain takes a text or --file, one of the two")
        if self.held_out < 0:
            raise UsageError(f"--held-out must be 0 or more, got {self.held_out}")
        for path in self.out:
            check_out_file(path, self.file)
        text = read_utf8(self.file) if self.file else self.text
        qs = load_checkpoint(self.model)
        report = qs.explain(text or self._held_out_text(qs), self.seed)
        for path in self.out:
            report.save(path)
        print(f"{summary_text(report.summary)}\nwrote {' and '.join(self.out)}")

    def _held_out_text(self, qs: QuietStar) -> str:
        """As much of it as the run would evaluate."""
        if not qs.trained_on:
            raise ValueError(f"{self.model}: it doesn't say what its run held out: give explain a text or --file")
        config, tokenizer = data_config(qs.trained_on[-1]), text_tokenizer(qs)
        data = load_data(config, tokenizer, qs.thought_config.lookahead)
        check_unseen(self.model, qs.trained_on, config, data, "give explain a text or --file")
        if self.held_out >= len(data.held_out):
            raise ValueError(f"{self.model}: its run held out {len(data.held_out)} texts, so there is no text {self.held_out}")
        print(f"text {self.held_out} of the {len(data.held_out)} that the run held out, from {source_name(config.data)}")
        return tokenizer.decode(data.held_out[self.held_out]["input_ids"], skip_special_tokens=True)


def summary_text(figures: Mapping[str, float]) -> str:
    low, high = figures["gain_low"], figures["gain_high"]
    return (
        f"loss of {figures['tokens']:,} tokens {figures['base']:.4f} nats without thoughts, {figures['mixed']:.4f} with them: "
        f"gain {figures['gain']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; "
        f"{figures['helped']:.0%} of the tokens helped, {figures['hurt']:.0%} hurt"
    )
