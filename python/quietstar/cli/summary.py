"""What a training run leaves and prints when it is done: a picture, the key figures, and what to type next."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from quietstar.checkpoints import places
from quietstar.cli.common import typed
from quietstar.evaluation.alarms import alarms
from quietstar.evaluation.intervals import PARTS, verdict
from quietstar.files.pictures import can_draw, legend_above, new_figure, save

Line = Mapping[str, float]
GREY, BLUE, RED, GREEN = "#8c8c8c", "#2f6f9f", "#c0563b", "#2d7d46"
WIDTH = 9  # inches
SMOOTHED = 20  # as many parts of a run are averaged


def draw(lines: Sequence[Line], path: str | os.PathLike) -> None:
    """Write a .png of the lines of a metrics file: losses, gain and its parts, reward and weight against steps."""
    figure = new_figure(WIDTH, 6.4)
    (loss, gain), (reward, weight) = figure.subplots(2, 2, sharex=True)
    _training(loss, lines, "loss_ce", "nats per token", "loss_ce in training")
    evaluations = evaluations_of(lines)
    _held_out(loss, gain, evaluations)
    _training(reward, lines, "reward", "nats", "reward of the thoughts")
    _training(weight, lines, "weight", "mean weight on the thought", "mixing weight")
    for axes in (gain, reward, weight):
        axes.axhline(0, color="#222222", linewidth=0.8, zorder=1)
    for axes in (reward, weight):
        axes.set_xlabel("step")
    for axes in (loss, gain, reward, weight):
        axes.grid(color="#e4e4e4", linewidth=0.6, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        legend_above(axes, WIDTH / 2)
    save(figure, path)


def evaluations_of(lines: Sequence[Line]) -> list[dict[str, float]]:
    """The evaluations on held-out text among the lines, the one before the first step included, each with its step."""
    found = []
    for line in lines:
        scores = {name: value for name, value in line.items() if name.startswith("eval_")}
        first = {name.removeprefix("eval_0_"): value for name, value in scores.items() if name.startswith("eval_0_")}
        later = {name.removeprefix("eval_"): value for name, value in scores.items() if not name.startswith("eval_0_")}
        found += [{"step": step, **x} for step, x in ((0, first), (line["step"], later)) if "gain_low" in x]
    return found


def _training(axes: Any, lines: Sequence[Line], name: str, unit: str, label: str) -> None:
    """Each step as a thin line, and the mean of the steps around it as a thick one."""
    steps, values = [line["step"] for line in lines], [line[name] for line in lines]
    half = len(values) // SMOOTHED // 2
    if half:
        axes.plot(steps, values, color=GREY, linewidth=0.6, alpha=0.5, zorder=2)
        totals = [0.0, *accumulate(values)]
        around = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
        values = [(totals[end] - totals[start]) / (end - start) for start, end in around]
    axes.plot(steps, values, color=GREY, linewidth=1.6, zorder=2, label=label)
    axes.set_ylabel(unit)


def _held_out(loss: Any, gain: Any, evaluations: Sequence[Line]) -> None:
    gain.set_ylabel("nats per token, 95 % intervals")
    if not evaluations:
        gain.text(0.5, 0.6, "no evaluation on held-out text", ha="center", transform=gain.transAxes, color=GREY)
        return
    steps = [scores["step"] for scores in evaluations]
    loss.plot(steps, [scores["base"] for scores in evaluations], "o-", color=BLUE, markersize=3, label="held out, no thoughts")
    loss.plot(
        steps, [scores["mixed"] for scores in evaluations], "o-", color=RED, markersize=3, label="held out, with thoughts"
    )
    _part(gain, evaluations, "gain", RED, "gain from thoughts")
    parts = [scores for scores in evaluations if "content_low" in scores]  # a run may have gone on with controls
    if parts:
        _part(gain, parts, "mixing", BLUE, "of mixing: another text's thoughts")
        _part(gain, parts, "content", GREEN, "of content: own over another's")


def _part(axes: Any, evaluations: Sequence[Line], name: str, color: str, label: str) -> None:
    """A gain, or a part of it, as a line in its 95 % interval over texts."""
    steps = [scores["step"] for scores in evaluations]
    low, high = ([scores[f"{name}_{end}"] for scores in evaluations] for end in ("low", "high"))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)
    axes.plot(steps, [scores[name] for scores in evaluations], "o-", color=color, markersize=3, label=label)


FIGURES = ("loss_ce", "reward", "weight", "thoughts_per_second")
ALARMS = ("thought_length", "leak_rate", "dead_groups")  # shown where there are any


def finish(out: str, lines: Sequence[Mapping[str, float]], held_out: bool) -> str:
    """Draw the metrics of a run in ``out``, if matplotlib is there; returns the text to print.

    Args:
        held_out: whether there are texts to evaluate, though none may have been.
    """
    if not lines:  # resumed from the last checkpoint of another folder
        return "there was nothing left to train"
    written = [places.every(out)[-1], Path(out) / "metrics.jsonl"]
    missing = ""
    if can_draw():
        written.append(Path(out) / "metrics.png")
        draw(lines, written[-1])
    else:
        missing = "no metrics.png: matplotlib is not installed (pip install matplotlib)\n"
    evaluations = evaluations_of(lines)
    found = _held_out_text(evaluations) if evaluations else NOT_EVALUATED + ("" if held_out else HOW_TO_HOLD_OUT)
    saved = "\n".join(f"  {path}" for path in written)
    return f"{found}\n{_training_text(lines)}\nwrote\n{saved}\n{missing}{_next(typed('model', out), held_out)}"


NOT_EVALUATED = "held-out text: none was evaluated, so nothing says yet whether thoughts help"
HOW_TO_HOLD_OUT = "\n  --held-out keeps texts for it, --eval-every says how often; eval takes another text"


def _held_out_text(evaluations: Sequence[Mapping[str, float]]) -> str:
    first, last = evaluations[0], evaluations[-1]
    rows = [("language model", "base", ".4f"), ("with thoughts", "mixed", ".4f"), ("gain from thoughts", "gain", "+.4f")]
    rows += [(f"  {sign} {name}", name, "+.4f") for sign, name in (("=", "mixing"), ("+", "content")) if name in last]
    parts = [name for name in PARTS if name in last]
    return "\n".join(
        [
            f"loss on held-out text, nats per token, {last['tokens']:,} tokens of {last['texts']} texts",
            _row("", f"step {first['step']}", f"step {last['step']}"),
            *(
                _row(label, f"{first[name]:{form}}" if name in first else "", f"{last[name]:{form}}")
                for label, name, form in rows
            ),
            f"  95 % intervals at step {last['step']}:",
            *(f"    {name:<8} {last[f'{name}_low']:+.4f} to {last[f'{name}_high']:+.4f}" for name in parts),
            verdict(last),
            *alarms(last),
        ]
    )


def _training_text(lines: Sequence[Mapping[str, float]]) -> str:
    """The first step, taken before any update, beside the mean of the last tenth; without what is the same by construction."""
    first, last = lines[0], lines[-max(1, len(lines) // 10) :]
    since = f"step {last[0]['step']}" if len(last) == 1 else f"{last[0]['step']} to {last[-1]['step']}"
    rows = [_row("", f"step {first['step']}", since)]
    fixed = {"loss_ce": 0.0, "weight": 1.0}  # without a cross entropy, and without a mixing head
    figures = [name for name in FIGURES if name not in fixed or any(line.get(name) != fixed[name] for line in lines)]
    means = {name: fmean(line.get(name, 0.0) for line in last) for name in (*FIGURES, *ALARMS)}
    for name in (*figures, *(name for name in ALARMS if first.get(name) or means[name])):
        form = ".0f" if name == "thoughts_per_second" else ".4f"
        rows.append(_row(name.replace("_per_second", "/s"), f"{first.get(name, 0.0):{form}}", f"{means[name]:{form}}"))
    if len(lines) == 1:  # which is the first and the last
        rows = [row[:36] for row in rows]
    title = f"training, {len(lines):,} step{'s' * (len(lines) > 1)} in {_time(sum(line['seconds'] for line in lines))}"
    return "\n".join([title, *rows, *alarms(means, first)])


def _row(label: str, first: str, last: str) -> str:
    return f"  {label:<20}{first:>14}{last:>16}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _next(model: str, held_out: bool) -> str:
    data, text = ("", "") if held_out else (" --data OTHER.txt --all", '"Some text." ')
    return (
        "next\n"
        f"  quietstar eval {model}{data}\n"
        f"  quietstar explain {model} {text}--out page.html\n"
        f'  quietstar generate {model} "Some text"'
    )
