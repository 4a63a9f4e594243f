"""Draw docs/hybrid_reads.png: a branch at every position of a recurrent layer, with states of their own and without.

python docs/draw_reads.py [folder]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # what it names may not be installed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Patch, Rectangle

L, C, S = 12, 4, 3  # text rows, in chunks of C; a branch of S rows on each
SHOWN = 6  # the anchor whose branch shows what it reads
TEXT, READS, OWN, STATE, FAINT = "#4878a8", "#e6a04b", "#4f9d69", "#7b5ea7", "#dddddd"


def cell(axes: Axes, x: float, y: float, colour: str, label: str = "") -> None:
    axes.add_patch(Rectangle((x - 0.42, y - 0.38), 0.84, 0.76, facecolor=colour, edgecolor="white"))
    axes.text(x, y, label, color="white", fontsize=8, ha="center", va="center_baseline")


def state(axes: Axes, x: float, y: float, label: str) -> None:
    axes.add_patch(Circle((x, y), 0.42, facecolor=STATE, edgecolor="white"))
    axes.text(x, y, label, color="white", fontsize=8, ha="center", va="center_baseline")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": colour, "linewidth": 1.3, "shrinkA": 2, "shrinkB": 2}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def text_row(axes: Axes, y: float) -> None:
    for t in range(L):
        cell(axes, t, y, TEXT, f"$x_{{{t}}}$")


def with_states(axes: Axes) -> None:
    """Each position's state, and each branch from its own."""
    axes.set_title("A state for each branch: the usual way", fontsize=10)
    text_row(axes, 0)
    for t in range(L):
        state(axes, t, 1.5, f"$S_{{{t}}}$")
        arrow(axes, (t, 0.35), (t, 1.15), STATE)
        for s in range(S):
            cell(axes, t, 3 + s, FAINT)
        arrow(axes, (t, 1.85), (t, 2.7), STATE)
    for y, name in ((0, "text"), (1.5, "states"), (3 + (S - 1) / 2, "branches")):
        axes.text(-0.8, y, name, fontsize=9, ha="right", va="center")


def with_reads(axes: Axes) -> None:
    """States at chunk starts; the rows of one branch read the one before their anchor."""
    axes.set_title("A state for each chunk, and rows that read it", fontsize=10)
    text_row(axes, 0)
    first = SHOWN // C * C
    for start in range(0, L, C):  # S_t is the state after x_t
        state(axes, start - 0.5, 1.5, f"$S_{{{start - 1}}}$" if start else "0")
        axes.plot([start - 0.5] * 2, [-0.6, 1], color="#999999", linewidth=0.8, linestyle=":")
    for t in range(L):
        for s in range(S):
            cell(axes, t, 3 + s, READS if t == SHOWN else FAINT, f"$z_{s + 1}$" if t == SHOWN else "")
    axes.plot([first - 0.4, SHOWN + 0.4], [0.6, 0.6], color=TEXT, linewidth=3, solid_capstyle="butt")
    for s in range(S):
        arrow(axes, (SHOWN - 0.4, 3 + s), (first - 0.3, 1.95), STATE, -0.1 * s)
    arrow(axes, (SHOWN, 2.6), (SHOWN - 0.6, 0.7), TEXT)
    for s in range(1, S):
        arrow(axes, (SHOWN + 0.4, 3 + s), (SHOWN + 0.4, 3), OWN, 0.6)


def draw(path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10.2, 3.0), dpi=110, facecolor="white", sharey=True)
    for axes, panel in zip(panels, (with_states, with_reads), strict=True):
        panel(axes)
        axes.set(xlim=(-1.2, L - 0.2), ylim=(3 + S, -0.8), aspect="equal")
        axes.axis("off")
    meanings = {
        "the state before its chunk": STATE,
        "the chunk's rows up to its anchor": TEXT,
        "its branch's earlier rows": OWN,
    }
    handles = [Patch(color=colour, label=f"a row reads {name}") for name, colour in meanings.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw((Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent) / "hybrid_reads.png")
