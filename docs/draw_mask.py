"""Draw docs/mask.png from ``ThoughtLayout.dense_mask()``: which row of a packed sequence sees which.

python docs/draw_mask.py [file.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from quietstar_kernels import ThoughtLayout

L, N, T, J = 6, 2, 1, 2  # a thought then has four rows: start, z, end and one token of the text
COLOURS = {"text sees text": "#4878a8", "a thought sees text": "#e6a04b", "a thought sees itself": "#4f9d69"}


def kinds(layout: ThoughtLayout) -> torch.Tensor:
    """[M,M]: 0 where the row does not see the column, otherwise 1 plus the index of its colour."""
    seen = layout.dense_mask()[0]
    is_thought = torch.arange(layout.M) >= layout.L
    return seen * (1 + is_thought[:, None].int() + is_thought[None, :].int())


def names(layout: ThoughtLayout) -> list[str]:
    """A label for each row of the packed sequence."""
    text = [f"$x_{t}$" for t in range(layout.L)]
    thoughts = [["start", "z", "end", text[p + 1] if p + 1 < layout.L else "pad"] for p in range(layout.P)]
    return text + [name for rows in thoughts for name in rows * layout.N]


def draw(path: Path) -> None:
    layout = ThoughtLayout.every_position(1, L, N, T + J + 1)
    figure, axes = plt.subplots(figsize=(10, 10.4), dpi=150, facecolor="white")
    axes.pcolormesh(kinds(layout), cmap=ListedColormap(["#f4f4f4", *COLOURS.values()]), edgecolor="white", linewidth=0.6)
    axes.set(xlim=(0, layout.M), ylim=(layout.M, 0), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2, labelsize=7)
    places = [i + 0.5 for i in range(layout.M)]
    axes.set_xticks(places, names(layout), rotation=90)
    axes.set_yticks(places, names(layout))
    label_groups(axes, layout)
    for edge in range(layout.L, layout.M, layout.S):
        first = (edge - layout.L) % (layout.N * layout.S) == 0
        for line in (axes.axhline, axes.axvline):
            line(edge, color="#444444" if first else "#bbbbbb", linewidth=1.0 if first else 0.6)
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def label_groups(axes: Axes, layout: ThoughtLayout) -> None:
    """Label the text and the thoughts of each anchor along both axes."""
    block = layout.N * layout.S
    middles = {layout.L / 2: "text"} | {layout.L + (p + 0.5) * block: f"thoughts at $x_{p}$" for p in range(layout.P)}
    style = {"ha": "center", "va": "center", "fontsize": 9.5}
    for middle, name in middles.items():
        axes.text(middle, -3.5, name, **style)
        axes.text(-3.5, middle, name, rotation=90, **style)
    axes.text(-2.4, -2.4, "row sees\ncolumn", style="italic", **style)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("mask.png"))
