"""Plots of the controls, of learning, and of where a model learnt to think."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietstar.evaluation.intervals import wilson
from quietstar.files.pictures import can_draw, legend_below, new_figure, save
from sums.results import POSITIONS, Results, exact_match, how_scored, pooled, total
from sums.runs import SHUFFLED

CHANCE = 0.1


def draw(results: Results, folder: Path) -> list[Path]:
    """Save the plots; none if matplotlib is missing or nothing was measured."""
    if not can_draw() or not pooled(results):
        return []
    plots = [draw_controls(results, folder), draw_learning(results, folder)]
    if any(seed["positions"] for seed in results["seeds"]):
        plots.append(draw_positions(results, folder))
    return plots


def new_panels(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its panels [rows][columns]."""
    figure = new_figure(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False)


def settings(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The pooled runs of each setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in pooled(results):
        groups.setdefault(group["setting"], []).append(group)
    return groups


def draw_controls(results: Results, folder: Path) -> Path:
    """Exact match of every run over all seeds, with its interval, a dot for each seed, and the line of chance."""
    groups = settings(results)
    longest = max(map(len, groups.values()))
    figure, panels = new_panels(6 * len(groups), 1 + 0.35 * longest, 1, len(groups))
    for axes, (setting, runs) in zip(panels[0], groups.items(), strict=True):
        for place, group in enumerate(runs):
            rows, how = group["rows"], how_scored(group["rows"])
            right, lines = total(rows, how)
            low, high = wilson(right, lines)
            middle = right / lines
            color = "tab:blue" if group["run"].startswith("Quiet-STaR") and group["run"] != SHUFFLED else "tab:gray"
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, ecolor="black", capsize=2)
            axes.plot([exact_match(row, how) for row in rows], [place] * len(rows), "k.", ms=3)
        axes.axvline(CHANCE, color="tab:red", lw=1, ls="--", label="chance")
        axes.set_yticks(range(len(runs)), [group["run"] for group in runs])
        axes.set(title=f"thoughts {setting}", xlabel="exact match, held-out", xlim=(0, 1))
        axes.invert_yaxis()
    legend_below(figure)
    return saved(figure, folder / "digit_sums_controls.png")


def draw_learning(results: Results, folder: Path) -> Path:
    """Exact match and right thoughts during training of every run with thoughts: the seeds as thin lines, and their mean."""
    groups = settings(results)
    figure, panels = new_panels(5.5 * len(groups), 6, 2, len(groups))
    for column, (setting, runs) in enumerate(groups.items()):
        curves = {group["run"]: [row["curve"] for row in group["rows"]] for group in runs if "curve" in group["rows"][0]}
        for row, (key, label) in enumerate(
            (("exact_match", "exact match, held-out, greedy"), ("right_thoughts", "right thoughts"))
        ):
            axes = panels[row][column]
            for number, (run, seeds) in enumerate(curves.items()):
                values = [[point[key] for point in curve] for curve in seeds]
                draw_seeds(axes, [point["step"] for point in seeds[0]], values, f"C{number}", run)
            axes.set(xlabel="step", ylabel=label, ylim=(-0.02, 1.02))
        panels[0][column].axhline(CHANCE, color="tab:red", lw=1, ls="--", label="chance")
        panels[0][column].set_title(f"thoughts {setting}")
    legend_below(figure)
    return saved(figure, folder / "digit_sums_learning.png")


def draw_seeds(axes: Any, steps: list[int], seeds: list[list[float]], color: str, label: str) -> None:
    for values in seeds:
        axes.plot(steps, values, color=color, lw=0.5, alpha=0.5)
    axes.plot(steps, [sum(values) / len(values) for values in zip(*seeds, strict=True)], color=color, label=label)


def draw_positions(results: Results, folder: Path) -> Path:
    """Mixing weight and gain at each position of a line: the mean over seeds, and a dot for each seed."""
    measured = [seed["positions"] for seed in results["seeds"] if seed["positions"]]
    figure, panels = new_panels(9, 3, 1, 2)
    for axes, key, label in zip(panels[0], ("w", "gain"), ("mixing weight w", "gain, nats"), strict=True):
        columns = list(zip(*(one[key] for one in measured), strict=True))
        axes.bar(range(len(POSITIONS)), [sum(column) / len(column) for column in columns], color="tab:blue")
        for place, column in enumerate(columns):
            axes.plot([place] * len(column), column, "k.", ms=4)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(POSITIONS)), POSITIONS)
        axes.set(ylabel=label, xlabel="position")
    return saved(figure, folder / "digit_sums_where.png")


def saved(figure: Any, path: Path) -> Path:
    save(figure, path)
    return path
