"""What several commands print: tables, and the losses on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.data.texts import Data
from quietstar.evaluation.gain import format_gain, verdict


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line for each row; values that a row lacks are left empty."""
    lines = [list(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def source_name(data: str) -> str:
    """The name of a data set; of a file in the working folder, or below it, without the folders above."""
    path = Path(data)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else data


def held_out_text(data: Data) -> str:
    """How much of the data is held out, and why it is not more."""
    held = f"{len(data.held_out):,} texts held out"
    tokens = sum(len(x["input_ids"]) for x in data.held_out)
    if data.held_out:
        held += f" ({tokens:,} tokens)"
    return held + (f", {data.repeated} more occur in training, word for word" if data.repeated else "")


LOSSES = {"base": "language model", "another": "with another's thoughts", "mixed": "with thoughts"}
GAINS = {"gain": "gain from thoughts", "mixing": "  = mixing, any thought", "content": "  + content, what was thought"}


def held_out_losses(figures: Mapping[str, float]) -> str:
    """The losses and gains of ``quietstar.evaluation.losses.evaluate``, and what they say."""
    lines = [f"held-out loss, nats a token, {figures['tokens']:,} tokens of {figures['texts']} texts"]
    lines += [f"  {label:<31} {figures[name]:.4f}" for name, label in LOSSES.items() if name in figures]
    lines += [f"  {label:<31}{format_gain(figures, name, 4)}" for name, label in GAINS.items() if name in figures]
    return "\n".join([*lines, verdict(figures)])
