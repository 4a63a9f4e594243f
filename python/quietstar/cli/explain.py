"""``quietstar explain``"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from quietstar.cli.loading import load_checkpoint
from quietstar.cli.shared_options import Checkpoint, check_out_file
from quietstar.files.reading import read_utf8


@dataclass
class Explain:
    """Write a page that shows what thinking does to each token of a text."""

    model: Checkpoint
    text: Positional[Annotated[str, arg(metavar="TEXT", help="the text; or use --file")]] = ""
    file: Annotated[str, arg(help="a UTF-8 file with the text")] = ""
    out: Annotated[tuple[str, ...], arg(help="pages to write; all numbers where the name ends in .json")] = ("explain.html",)
    seed: Annotated[int | None, arg(help="sample N thoughts with this seed; default the likeliest tokens")] = None

    def run(self) -> None:
        if bool(self.text) == bool(self.file):
            raise ValueError("explain takes a text or --file, one of the two")
        for path in self.out:
            check_out_file(path, self.file)
        text = self.text or read_utf8(self.file)
        report = load_checkpoint(self.model).explain(text, self.seed)
        for path in self.out:
            report.save(path)
        print(f"{summary_text(report.summary)}\nwrote {' and '.join(self.out)}")


def summary_text(figures: Mapping[str, float]) -> str:
    low, high = figures["gain_low"], figures["gain_high"]
    return (
        f"loss of {figures['tokens']:,} tokens {figures['base']:.4f} nats without thoughts, {figures['mixed']:.4f} with them: "
        f"gain {figures['gain']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; "
        f"{figures['helped']:.0%} of the tokens helped, {figures['hurt']:.0%} hurt"
    )
