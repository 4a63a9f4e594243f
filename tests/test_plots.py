"""Legends of all plots lie beside the axes, where they hide no curve, and inside the picture; no backend is needed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.report import plots as benchmark_plots  # noqa: E402
from quietstar.cli import summary as metrics_plot  # noqa: E402
from quietstar.evaluation import difficulty  # noqa: E402
from quietstar_recipes.common import plots as recipe_plots  # noqa: E402
from quietstar_recipes.common.plots import Panel  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves."""
    figures = []
    save = Figure.savefig

    def kept(figure, *arguments, **options):
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def check(figures, trimmed=False):
    """``trimmed``: whether the file is cut to what is drawn, so that legends may lie outside the figure."""
    for figure in figures:
        figure.canvas.draw()
        areas = [axes.get_window_extent() for axes in figure.axes]
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
        boxes = [legend.get_window_extent() for legend in legends]
        for box in boxes:
            assert not any(box.overlaps(area) for area in areas)
            assert box.width > 0
            if not trimmed:
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    return sum(len(figure.legends) + sum(axes.get_legend() is not None for axes in figure.axes) for figure in figures)


LONG = ("sum of five, the published loss", "sum of five, the text's token", "no thoughts, plain training", "chains of 16")


@pytest.mark.parametrize("count", range(1, 6))
def test_recipes(count, drawn, tmp_path):
    curves = {name: [[(x, x * seed * i) for x in range(6)] for seed in (1, 2)] for i, name in enumerate(LONG)}
    plots = [
        Panel("round", "accuracy", curves, marks=[1, 3]),
        Panel("tokens", "accuracy", {name: curves[name] for name in LONG[-1:]}, share=True),
        Panel("update", "loss, nats", curves, log=True),
        Panel("accuracy", "", bars={name: [0.1, 0.7] for name in LONG}),
        Panel("tokens", "accuracy", {str(i): [[(i, i)]] for i in range(9)}),
    ]
    recipe_plots.panels(tmp_path / "x.png", "A title", plots[:count])
    assert check(drawn) == count - (count > 3)


def test_difficulty(drawn, tmp_path):
    group = {"tokens": 9, "gain": 0.4, "gain_low": -0.1, "gain_high": 0.9, "easiest": 1.0, "hardest": 2.5}
    parts = {"content": 0.1, "content_low": 0.0, "content_high": 0.2}
    for number, both in enumerate((group, group | parts), 1):
        difficulty.draw({"base": [both] * 10, "mean": [{**both, "gain_low": None}] * 10}, tmp_path / "x.png")
        assert check(drawn) == number


def test_a_run(drawn, tmp_path):
    lines = [{"step": step, "loss_ce": 3.0, "reward": 0.1 * step, "weight": 0.1} for step in range(1, 60)]
    gain = {"base": 3.0, "mixed": 2.5, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.6, "texts": 9, "tokens": 90}
    for line in lines[::20]:
        line |= {f"eval_{name}": value for name, value in gain.items()}
    for line in lines[20::20]:
        line |= {f"eval_{name}{end}": 0.3 for name in ("mixing", "content") for end in ("", "_low", "_high")}
    metrics_plot.draw(lines, tmp_path / "metrics.png")
    assert check(drawn) == 4


def test_a_backend_that_is_not_there_is_not_needed(tmp_path):
    draw = "from quietstar.files.pictures import new_figure, save; save(new_figure(1, 1), 'x.png')"
    subprocess.run([sys.executable, "-c", draw], cwd=tmp_path, env=os.environ | {"MPLBACKEND": "nonsense"}, check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_digit_sums(drawn, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    report = importlib.import_module("digit_sums_report")
    results = json.loads((ROOT / "docs/digit_sums.json").read_text())
    assert len(report.draw(results, tmp_path)) == 3
    assert check(drawn) == 5


@pytest.mark.long
@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/results/*.json")), ids=lambda path: path.stem)
def test_benchmarks(file, drawn, tmp_path):
    paths = benchmark_plots.draw(json.loads(file.read_text()), tmp_path, file.stem)
    assert paths
    assert check(drawn, trimmed=True) == sum(not path.stem.endswith("-roofline") for path in paths)  # bars have no legend
