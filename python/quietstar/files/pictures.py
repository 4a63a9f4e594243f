"""Pictures that matplotlib draws: legends that hide nothing, and files that are written whole."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from quietstar.files.writing import write_whole

SIZE = 8  # points, of a legend's text
INCHES_PER_LETTER, INCHES_PER_ENTRY = 0.063, 0.5


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, which is drawn without pyplot and its backends."""
    if "matplotlib" not in sys.modules:
        # It reads MPLBACKEND as it is imported, and can't be where that names what isn't installed, as Jupyter's may.
        backend = os.environ.pop("MPLBACKEND", "")
        import matplotlib

        if backend:
            os.environ["MPLBACKEND"] = backend
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = backend  # for others who do use pyplot
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend_above(axes: Any, width: float) -> None:
    """A legend over the top of the axes, which have no title. ``width``: of the axes, in inches."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
        axes.legend(handles, labels, **place, **_style(labels, width))


def legend_below(figure: Any) -> None:
    """One legend for all axes of a figure whose layout is constrained, at its lower edge."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        style = _style(list(entries), figure.get_figwidth())
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", **style)


def _style(labels: list[str], width: float) -> dict[str, Any]:
    """As many columns as fit into the width."""
    columns = int(width / (INCHES_PER_ENTRY + INCHES_PER_LETTER * max(map(len, labels))))
    return {"ncols": max(1, min(columns, len(labels))), "frameon": False, "fontsize": SIZE}


def save(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as .png, renamed into place."""
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
