"""The plots of a results page: time and memory by text length, a training step by T, and each op's share of the roofline."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # what it names may not be installed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

from benchmarks.report import units  # noqa: E402
from benchmarks.report.results_file import RowDict  # noqa: E402
from benchmarks.report.tables import WITHOUT_A_ROOFLINE, share  # noqa: E402

OURS_COLOR, BASELINE_COLORS = "#c0392b", ["#2c6fbb", "#3a923a", "#8e5bb0", "#d98a1f", "#5f6b73", "#1b9e9e"]


def draw(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Every plot for which there are enough rows. Returns their paths."""
    rows = [row for row in results["rows"] if row["seconds"] is not None and not row["is_partial"]]
    device = results["machine"]["device"]
    paths = []
    for make in (time, memory, passes, chunks, roofline):
        figure = make(rows, device)
        if figure is None:
            continue
        path = folder / f"{name}-{make.__name__}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def _against(rows: Iterable[RowDict], letter: str, y: Callable[[RowDict], float | None]) -> dict[str, dict[int, float]]:
    """{candidate: {size: y}} by the size of that letter, ours first."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: not row["is_ours"]):
        if value := y(row):
            lines["ours" if row["is_ours"] else row["candidate"]][row["sizes"][letter]] = value
    return {candidate: dict(sorted(points.items())) for candidate, points in lines.items()}


def _milliseconds(row: RowDict) -> float:
    return 1e3 * row["seconds"]


def _mebibytes(row: RowDict) -> float | None:
    return row["peak_bytes"] and row["peak_bytes"] / 2**20


def _plot(axes: Axes, lines: dict[str, dict[int, float]], colors: dict[str, str], log: bool) -> None:
    for candidate, points in lines.items():
        style = {"linewidth": 2.6, "zorder": 3} if candidate == "ours" else {"linewidth": 1.6}
        axes.plot(
            list(points), list(points.values()), marker="o", markersize=5, color=colors[candidate], label=candidate, **style
        )
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({x for points in lines.values() for x in points})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(True, which="major", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)


def _panels(panels: dict[str, dict[str, dict[int, float]]], xlabel: str, ylabel: str, title: str, log: bool = True) -> Any:
    """The panels that have at least two points of ours, side by side with one legend; None if no panel has."""
    panels = {name: lines for name, lines in panels.items() if len(lines.get("ours", {})) > 1}
    if not panels:
        return None
    candidates = list(dict.fromkeys(candidate for lines in panels.values() for candidate in lines))
    colors = dict(zip(candidates, itertools.chain([OURS_COLOR], itertools.cycle(BASELINE_COLORS)), strict=False))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    entries = {}
    for axes, (name, lines) in zip(all_axes[0], panels.items(), strict=True):
        _plot(axes, lines, colors, log)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel(xlabel)
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    all_axes[0][0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=12)
    columns = min(3, len(panels) + 1)
    figure.legend(entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, frameon=False)
    figure.tight_layout()
    return figure


def _lengths(rows: list[RowDict], y: Callable[[RowDict], float | None]) -> dict[str, dict[str, dict[int, float]]]:
    """By text length. On a GPU longer texts come in smaller batches, so ``y`` is that of one text."""
    texts = [row for row in rows if row["grid"] in ("headline", "text")]
    panels = {}
    for op, what in (
        ("thought_attention", "forward"),
        ("thought_attention", "forward+backward"),
        ("thought_decode", "forward"),
    ):
        some = [row for row in texts if row["op"] == op and row["what"] == what]
        name = "decode step" if op == "thought_decode" else f"attention, {what}"
        panels[name] = _against(some, "L", lambda row: (y(row) or 0) / row["sizes"]["B"])
    return panels


def _shape(rows: list[RowDict]) -> str:
    row = next((row for row in rows if row["op"] == "thought_attention" and row["grid"] == "headline"), None)
    if row is None:
        return ""
    return " ".join(f"{letter} {size}" for letter, size in row["sizes"].items() if letter not in "BL") + f", {row['dtype']}"


def time(rows: list[RowDict], device: str) -> Any:
    panels = _lengths(rows, _milliseconds)
    return _panels(panels, "text length L", "milliseconds per text", f"Time on {device}: {_shape(rows)}")


def memory(rows: list[RowDict], device: str) -> Any:
    """Of a call."""
    panels = _lengths(rows, _mebibytes)
    return _panels(panels, "text length L", "MiB per text", f"Memory of a call on {device}: {_shape(rows)}")


def passes(rows: list[RowDict], device: str) -> Any:
    """Peak memory and time of a training step by T."""
    some = [row for row in rows if row["op"] == "step" and row["grid"] == "passes"]
    panels = {"peak memory, MiB": _against(some, "T", _mebibytes), "time, milliseconds": _against(some, "T", _milliseconds)}
    return _panels(panels, "sampled tokens per thought T", "", f"Training step on {device}", log=False)


def chunks(rows: list[RowDict], device: str) -> Any:
    """Peak memory of a training step on a long text, by its length and by the size of the chunks of anchors."""
    some = [row for row in rows if row["op"] == "memory"]
    shortest = min((row["sizes"]["L"] for row in some), default=0)
    whole = [row for row in some if row["grid"] != "chunk"]
    cut = [row for row in some if row["is_ours"] and row["sizes"]["L"] == shortest]
    panels = {
        "text length L": _against(whole, "L", _mebibytes),
        f"anchors per chunk C, L {shortest}": _against(cut, "C", _mebibytes),
    }
    return _panels(panels, "", "peak memory, MiB", f"Training step on a long text, {device}", log=False)


def roofline(rows: list[RowDict], device: str) -> Any:
    """Our share of the roofline in each headline case."""
    mine = [row for row in rows if row["is_ours"] and row["grid"] == "headline" and row["op"] not in WITHOUT_A_ROOFLINE]
    if not mine:
        return None
    names = [f"{row['op']}\n{row['what']}" for row in mine]
    figure, axes = plt.subplots(figsize=(7.5, 0.62 * len(mine) + 1.2))
    bars = axes.barh(names, [100 * row["of_roofline"] for row in mine], color=OURS_COLOR, height=0.6)
    labels = [f"{share(row)}, {units.seconds(row['seconds'])}" for row in mine]
    over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, labels, padding=4, fontsize=9, bbox=over_the_line)
    axes.axvline(100, color="#5f6b73", linestyle="--", linewidth=1)
    axes.set_xlim(
        0, max(115.0, *(100 * row["of_roofline"] + 2.1 * len(label) for row, label in zip(mine, labels, strict=True)))
    )
    axes.invert_yaxis()
    axes.set_xlabel("percent of the roofline, the time of the useful work at the measured peak rates")
    axes.set_title(f"Share of the roofline on {device}, headline cases", fontsize=11)
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
