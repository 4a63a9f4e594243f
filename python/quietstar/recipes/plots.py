"""The recipes' plots, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from quietstar.files import write_whole

Points = Sequence[tuple[float, float]]


def draw(path: Path, curves: Mapping[str, Points], across: str, title: str, greedy: tuple[float, float] | None = None) -> None:
    """A .png of accuracy, a line through (x, accuracy) for each name, x in powers of 2; nothing without matplotlib.

    Args:
        greedy: a point of its own.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        style = ":" if name == "oracle" else "--" if name.startswith("sequential") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    if greedy:
        axes.plot(*greedy, "k*", markersize=9, label="greedy", zorder=5)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(across)
    axes.set_ylabel("accuracy")
    axes.set_title(title)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
