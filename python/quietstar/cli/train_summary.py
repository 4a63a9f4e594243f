"""What ``quietstar train`` leaves and prints when it is done: a picture, the key figures, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from quietstar.evaluation.gain import PARTS, verdict
from quietstar.run import plot, snapshots

FIGURES = ("loss_ce", "reward", "weight", "thoughts_per_second")


def finish(out: str, lines: Sequence[Mapping[str, float]]) -> str:
    """Draw the metrics of a run in ``out``, if matplotlib is there; returns the text to print."""
    if not lines:  # resumed from the last checkpoint of another folder
        return "there was nothing left to train"
    written = [snapshots.every(out)[-1], Path(out) / "metrics.jsonl"]
    missing = ""
    if plot.can_draw():
        written.append(Path(out) / "metrics.png")
        plot.draw(lines, written[-1])
    else:
        missing = "no metrics.png: matplotlib is not installed (pip install matplotlib)\n"
    evaluations = plot.evaluations_of(lines)
    held_out = _held_out(evaluations) if evaluations else NOTHING_HELD_OUT
    saved = "\n".join(f"  {path}" for path in written)
    return f"{held_out}\n{_training(lines)}\nwrote\n{saved}\n{missing}{_next(shlex.quote(out), bool(evaluations))}"


NOTHING_HELD_OUT = (
    "held-out text: none was evaluated, so nothing says yet whether thoughts help\n"
    "  --held-out keeps texts for it, --eval-every says how often; eval takes another text"
)


def _held_out(evaluations: Sequence[Mapping[str, float]]) -> str:
    first, last = evaluations[0], evaluations[-1]
    rows = [("language model", "base", ".4f"), ("with thoughts", "mixed", ".4f"), ("gain from thoughts", "gain", "+.4f")]
    rows += [(f"  {sign} {name}", name, "+.4f") for sign, name in (("=", "mixing"), ("+", "content")) if name in last]
    parts = [name for name in PARTS if name in last]
    return "\n".join(
        [
            f"loss on held-out text, nats a token, {last['tokens']:,} tokens of {last['texts']} texts",
            _row("", f"step {first['step']}", f"step {last['step']}"),
            *(
                _row(label, f"{first[name]:{form}}" if name in first else "", f"{last[name]:{form}}")
                for label, name, form in rows
            ),
            f"  95 % intervals at step {last['step']}:",
            *(f"    {name:<8} {last[f'{name}_low']:+.4f} to {last[f'{name}_high']:+.4f}" for name in parts),
            verdict(last),
        ]
    )


def _training(lines: Sequence[Mapping[str, float]]) -> str:
    """The first step, which still has the model as it was, beside the mean of the last tenth."""
    first, last = lines[0], lines[-max(1, len(lines) // 10) :]
    since = f"step {last[0]['step']}" if len(last) == 1 else f"{last[0]['step']} to {last[-1]['step']}"
    rows = [_row("", f"step {first['step']}", since)]
    for name in FIGURES:
        mean = sum(line[name] for line in last) / len(last)
        form = ".0f" if name == "thoughts_per_second" else ".4f"
        rows.append(_row(name.replace("_per_second", "/s"), f"{first[name]:{form}}", f"{mean:{form}}"))
    return "\n".join([f"training, {len(lines):,} steps in {_time(sum(line['seconds'] for line in lines))}", *rows])


def _row(label: str, first: str, last: str) -> str:
    return f"  {label:<20}{first:>14}{last:>16}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _next(out: str, held_out: bool) -> str:
    data, text = ("", "") if held_out else (" --data OTHER.txt --all", '"Some text." ')
    return (
        "next\n"
        f"  quietstar eval --model {out}{data}\n"
        f"  quietstar explain --model {out} {text}--out page.html\n"
        f'  quietstar generate --model {out} "Some text"'
    )
