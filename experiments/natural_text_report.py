"""The page of natural_text.py: every arm on every measure, and what thinking gains over each of its controls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from natural_text_evaluation import BASE
from natural_text_settings import Experiment

from quietstar.cli.entry import versions
from quietstar.evaluation.intervals import FEW, mean_interval, wilson
from quietstar.files.pictures import can_draw, legend_below, new_figure, save
from quietstar.files.reading import read_json
from quietstar.files.writing import write_whole

# Of one model and one measure: for each seed a value for each text or question.
Scores = list[list[float]]

LOSS = "held-out loss"
MEASURES = {
    LOSS: "nats per token",
    "GSM8K, probability": "of the right answer, among answer tokens",
    "GSM8K, exact match": "of the greedy answer",
    "CommonsenseQA, probability": "of the right answer, among answer tokens",
    "CommonsenseQA, exact match": "of the greedy answer",
}
SHARES = ("GSM8K, exact match", "CommonsenseQA, exact match")
TASKS = {"gsm8k": "GSM8K", "commonsense_qa": "CommonsenseQA"}
START, PLAIN = "base model", "trained without thoughts"
WITHOUT, OWN, ANOTHER = "without a thought", "own thoughts", "another text's thoughts"
CONSTANT, RANDOM = "one constant thought", "random tokens"
WAYS = {"base": WITHOUT, "own": OWN, "another": ANOTHER, "constant": CONSTANT, "random": RANDOM}
OVER_PLAIN = "over training without thoughts"
# Each gain of an arm that thinks: of the first over the second. Both parts first, then what own thoughts must beat besides.
GAINS = {
    "of thinking": (OWN, WITHOUT),
    "of mixing": (ANOTHER, WITHOUT),
    "of content": (OWN, ANOTHER),
    "over one constant thought": (OWN, CONSTANT),
    "over random tokens": (OWN, RANDOM),
    OVER_PLAIN: (OWN, PLAIN),
    "over the base model": (OWN, START),
}
NEEDED = ("of thinking", "of content", "over one constant thought", OVER_PLAIN)


@dataclass(frozen=True)
class Figure:
    """A mean over texts or questions of the mean over seeds, with its 95 % interval over texts or questions.

    The interval of a share of right answers is Wilson's, others are by Student's t. ``units`` is how many there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: list[float]
    units: int

    @classmethod
    def of(cls, scores: Scores, share: bool = False) -> Figure:
        units = [fmean(unit) for unit in zip(*scores, strict=True)]
        mean, low, high = mean_interval(units)
        if share:
            low, high = wilson(round(mean * len(units)), len(units))
        return cls(mean, low, high, [fmean(seed) for seed in scores], len(units))

    @classmethod
    def gain(cls, first: Scores, second: Scores, less: bool) -> Figure:
        """What the first gain over the second, text by text; with ``less``, smaller values are better."""
        sign = -1 if less else 1
        pairs = zip(first, second * len(first) if len(second) == 1 else second, strict=True)
        return cls.of([[sign * (x - y) for x, y in zip(one, other, strict=True)] for one, other in pairs])


def write(e: Experiment) -> str:
    """Write report.md, results.json and, with matplotlib, report.png; returns the page."""
    scores = collect(e)
    rows = {
        name: {measure: Figure.of(values, measure in SHARES) for measure, values in row.items()} for name, row in scores.items()
    }
    gains = {arm: gains_of(scores, arm) for arm in e.arms if arm != "plain"}
    values = {
        "versions": versions(),
        "rows": {name: {measure: vars(figure) for measure, figure in row.items()} for name, row in rows.items()},
        "gains": {arm: {f"{name}: {m}": vars(x) for (name, m), x in found.items()} for arm, found in gains.items()},
    }
    write_whole(e.folder / "results.json", json.dumps(values, indent=1) + "\n")
    drawn = bool(gains) and draw(gains, e.folder / "report.png")
    page = "\n\n".join(sections(e, rows, gains, drawn)) + "\n"
    write_whole(e.folder / "report.md", page)
    return page


def collect(e: Experiment) -> dict[str, dict[str, Scores]]:
    """The scores of each row of the first table, by measure."""
    rows = {START: of_model([read(e, BASE)], "base")}
    for arm in e.arms:
        found = [read(e, f"{arm}-{seed}") for seed in range(e.seeds)]
        if arm == "plain":
            rows[PLAIN] = of_model(found, "base")
        else:
            rows |= {f"{arm}, {name}": of_model(found, way) for way, name in WAYS.items()}
    return rows


def read(e: Experiment, name: str) -> dict[str, Any]:
    """What was measured of one model: losses, and the questions of each task."""
    folder, found = e.folder / name, {}
    found["losses"] = read_json(folder / "losses.json", dict[str, Any])
    for task in TASKS:
        blocks = [read_json(path, dict[str, Any])["questions"] for path in sorted(folder.glob(f"{task}-*.json"))]
        found[task] = [question for block in blocks for question in block]
    return found


def of_model(found: list[dict[str, Any]], way: str) -> dict[str, Scores]:
    """The scores with one kind of thoughts; questions are asked without thoughts and with own ones alone."""
    scores = {LOSS: [one["losses"][way] for one in found]}
    mode = {"base": "base", "own": "thinking"}.get(way)
    for task, title in TASKS.items() if mode else ():
        scores[f"{title}, probability"] = [[q[mode]["probability"] for q in one[task]] for one in found]
        scores[f"{title}, exact match"] = [[float(q[mode]["extracted"] == q["answer"]) for q in one[task]] for one in found]
    return scores


def gains_of(rows: dict[str, dict[str, Scores]], arm: str) -> dict[tuple[str, str], Figure]:
    """The gains of an arm, by name and measure, where both sides were measured."""
    found = {}
    for name, (first, second) in GAINS.items():
        one, other = rows[f"{arm}, {first}"], rows.get(second) or rows.get(f"{arm}, {second}", {})
        for measure in MEASURES:
            if measure in one and measure in other:
                found[name, measure] = Figure.gain(one[measure], other[measure], less=measure == LOSS)
    return found


def sections(
    e: Experiment, rows: dict[str, dict[str, Figure]], gains: dict[str, dict[tuple[str, str], Figure]], drawn: bool
) -> Iterator[str]:
    data = read_json(e.folder / "data.json", dict[str, Any])
    asked = " and ".join(f"{data[task]:,} questions of {title}" for task, title in TASKS.items())
    tokens = e.steps * e.batch_size * e.length
    yield "# Quiet-STaR on natural text"
    yield (
        f"Model `{e.model}`, text `{e.data}`. Each arm is trained {e.seeds} times on {tokens:,} tokens in {e.steps:,} steps. "
        f"{data['held_out']:,} held-out texts, {asked}, zero-shot. Means over seeds, with 95 % intervals over texts or "
        f"questions. All phases took {hours(e):.2f} hours, with {versions()}."
    )
    yield table(["", *MEASURES], [[name, *(cell(row.get(m), m) for m in MEASURES)] for name, row in rows.items()])
    yield "\n".join(f"- {name}: {what}" for name, what in MEASURES.items())
    if drawn:
        yield "![Gains of thinking with their intervals](report.png)"
    for arm, found in gains.items():
        yield f"## What thinking gains: {arm}"
        names = list(dict.fromkeys(name for name, _ in found))
        yield table(["gain", *MEASURES], [[n, *(cell(found.get((n, m)), m, "+") for m in MEASURES)] for n in names])
        yield f"In nats per token, and in percentage points. Thinking is mixing and content together. {verdict(found)}"
        if e.seeds > 1:
            yield f"By seed: {by_seed(found)}. The intervals are over texts, so they don't hold what seeds differ by."


def by_seed(found: dict[tuple[str, str], Figure]) -> str:
    """The gains in ``NEEDED`` on held-out text, for each seed."""
    gains = {name: found[name, LOSS].seeds for name in NEEDED if (name, LOSS) in found}
    return "; ".join(f"{name} {', '.join(f'{seed:+.4f}' for seed in seeds)}" for name, seeds in gains.items())


def verdict(found: dict[tuple[str, str], Figure]) -> str:
    """Thinking helped if own thoughts predict held-out text better than everything in ``NEEDED``."""
    thinking, content = found["of thinking", LOSS], found["of content", LOSS]
    if thinking.units < FEW:
        return f"{thinking.units} held-out texts are too few to say what thinking does."
    if thinking.high is not None and thinking.high < 0:
        less = content.low is not None and content.low > 0
        return "Thinking hurts on held-out text" + ("; its own thoughts hurt less than another text's." if less else ".")
    compared = {name: found[name, LOSS] for name in NEEDED if (name, LOSS) in found}
    failed = [name for name, gain in compared.items() if gain.low is None or gain.low <= 0]
    if len(compared) < len(NEEDED):
        return "Whether thinking is worth its training can't be said: there is no arm `plain` to compare it with."
    if failed:
        return f"No gain from what was thought is shown. Not above 0 with its interval: gain {', '.join(failed)}."
    least = min(compared.values(), key=lambda gain: gain.mean)
    names = ", ".join(NEEDED)
    return f"Thinking helped on held-out text, by {cell(least, LOSS, '+')}, the least of what is above 0: gain {names}."


def hours(e: Experiment) -> float:
    """Of all phases, without what was lost when one was stopped; for training the sum of its steps."""
    results = [read_json(path, dict[str, Any]) for path in e.folder.glob("*/*.json") if path.name != "options.json"]
    return sum(x.get("training_seconds", x.get("seconds", 0)) for x in results) / 3600


def cell(figure: Figure | None, measure: str, sign: str = "") -> str:
    """A figure of the first table; with a ``sign``, a gain, in nats or percentage points."""
    if figure is None:
        return ""
    scale, digits = (1, 4) if measure == LOSS else (100, 1)
    ends = [] if figure.low is None or figure.high is None else [figure.low, figure.high]
    if not sign and measure != LOSS:  # an interval by Student's t may end beyond 0 and 1
        ends = [min(max(end, 0), 1) for end in ends]
    mean, *shown = (f"{scale * x:{sign}.{digits}f}" for x in (figure.mean, *ends))
    unit = "" if sign or measure == LOSS else " %"
    return f"{mean}{unit} ({' to '.join(shown)})" if shown else f"{mean}{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(gains: dict[str, dict[tuple[str, str], Figure]], path: Path) -> bool:
    """A plot of the gains on held-out text, and two of those in the answers; False without matplotlib."""
    if not can_draw():
        return False
    # The gain over the base model is mostly that of more text, on a scale of its own.
    of_text = {name: (name, LOSS) for name in GAINS if name != "over the base model"}
    asked = [measure for measure in MEASURES if measure != LOSS]
    plots = {
        "held-out text": of_text,
        "answers, over no thoughts": {measure: ("of thinking", measure) for measure in asked},
        "answers, over plain training": {measure: (OVER_PLAIN, measure) for measure in asked},
    }
    picture = new_figure(13, 3.5)
    for axes, (title, bars) in zip(picture.subplots(1, len(plots)), plots.items(), strict=True):
        for number, (arm, found) in enumerate(gains.items()):
            shown = [(place + 0.2 * number, found[key]) for place, key in enumerate(bars.values()) if key in found]
            if not shown:
                continue
            scale = 1 if bars is of_text else 100
            means = [scale * figure.mean for _, figure in shown]
            ends = [0 if figure.high is None else scale * (figure.high - figure.mean) for _, figure in shown]
            axes.errorbar(means, [place for place, _ in shown], xerr=ends, fmt="o", capsize=3, label=arm)
        axes.set_yticks(range(len(bars)), bars)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("gain, nats per token" if bars is of_text else "gain, points")
        axes.locator_params(axis="x", nbins=4)
    if len(gains) > 1:
        legend_below(picture)
    save(picture, path)
    return True
