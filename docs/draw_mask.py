"""Draw docs/mask.png and docs/branches_*.png from ``ThoughtLayout.dense_mask()``: which row of a packed sequence sees which.

python docs/draw_mask.py [folder]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # what it names may not be installed
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from quietstar_kernels import ThoughtLayout

L, N, T, J = 6, 2, 1, 2  # a thought then has four rows: start, z, end and one token of the text
COLOURS = {"text sees text": "#4878a8", "a thought sees text": "#e6a04b", "a thought sees itself": "#4f9d69"}
EDGES = {True: {"color": "#444444", "linewidth": 1.0}, False: {"color": "#bbbbbb", "linewidth": 0.6}}  # new anchor, same one

Groups = dict[float, str]  # the middle of some rows, and what they are called


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
    block = layout.N * layout.S
    groups = {L / 2: "text"} | {L + (p + 0.5) * block: f"thoughts at $x_{p}$" for p in range(layout.P)}
    draw_layout(path, layout, names(layout), groups)


def draw_branches(folder: Path) -> None:
    """The pictures of docs/branches.md: text in documents, and branches of each kind."""
    lo = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4]])
    prompts = [f"$p_{t}$" for t in range(4)] + [f"$q_{t}$" for t in range(5)]
    thoughts = ThoughtLayout.every_position(1, 4, 2, 3)
    draw_branch(folder / "branches_thoughts.png", thoughts, [f"$x_{t}$" for t in range(4)], "z", {2: "text"})
    completions = ThoughtLayout.packed(torch.tensor([[3, 3, 3, 8, 8]]), torch.tensor([[2, 5, 3, 4, 6]]), lo=lo)
    draw_branch(folder / "branches_group.png", completions, prompts, "y", {2: "prompt p", 6.5: "prompt q"})
    turns = ThoughtLayout.tree(
        torch.tensor([[3, -1, -1, 3]]), torch.tensor([[-1, 0, 0, -1]]), torch.tensor([[3, 2, 4, 4]]), text_length=4
    )
    labels = prompts[:4] + [f"${turn}_{i}$" for turn, rows in zip("abcd", (3, 2, 4, 4), strict=True) for i in range(rows)]
    groups = {2.0: "prompt", 5.5: "a", 8.0: "b", 11.0: "c", 15.0: "d"}
    draw_layout(folder / "branches_tree.png", turns, labels, groups, branch_colours())
    drafts = ThoughtLayout.at(torch.tensor([[1, 5, 6]]), 1, 4, lo=lo, own="full")
    draw_branch(folder / "branches_drafter.png", drafts, prompts, "m", {2: "text p", 6.5: "text q"}, False)
    text = [f"$x_{{{t}}}$" for t in range(11)]
    noisy = ThoughtLayout.at(torch.tensor([[2, 6]]), 1, 4, text_length=11, own="full")
    draw_branch(folder / "branches_diffusion.png", noisy, text, "m", {1.5: "prompt", 5: "block 1", 9: "block 2"}, False)


def draw_branch(path: Path, layout: ThoughtLayout, text: list[str], row: str, groups: Groups, queries: bool = True) -> None:
    """``row`` is the letter of branch rows. Without ``queries``, the text is only seen."""
    places = layout.row_in_branch()[0].tolist()
    labels = text + [f"${row}_{place}$" for place in places]
    draw_layout(path, layout, labels, groups | branch_groups(layout, text), branch_colours(), 0 if queries else layout.L)


def branch_colours() -> dict[str, str]:
    return {name.replace("thought", "branch"): colour for name, colour in COLOURS.items()}


def branch_groups(layout: ThoughtLayout, text: list[str]) -> Groups:
    """The rows on each anchor."""
    anchors = layout.row_anchor()[0]
    rows = {anchor: (anchors == anchor).nonzero() for anchor in anchors.unique().tolist()}
    return {layout.L + float(found.float().mean()) + 0.5: f"on {text[anchor]}" for anchor, found in rows.items()}


def draw_layout(
    path: Path,
    layout: ThoughtLayout,
    labels: list[str],
    groups: Groups,
    colours: dict[str, str] = COLOURS,
    first: int = 0,
) -> None:
    """The rows from ``first`` on, and all columns."""
    M, rows = layout.M, layout.M - first
    cells = max(0.2, 4 / M)  # inches
    figure, axes = plt.subplots(figsize=(M * cells, rows * cells), dpi=150, facecolor="white")
    axes.pcolormesh(
        kinds(layout)[first:],
        cmap=ListedColormap(["#f4f4f4", *colours.values()]),
        vmin=0,
        vmax=3,
        edgecolor="white",
        linewidth=0.6,
    )
    axes.set(xlim=(0, M), ylim=(rows, 0), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2, labelsize=7)
    axes.set_xticks([i + 0.5 for i in range(M)], labels, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(rows)], labels[first:])
    label_groups(axes, groups, first)
    branches, anchors = layout.branch_of_row()[0].tolist(), layout.row_anchor()[0].tolist()
    for r in range(layout.R):
        if r == 0 or branches[r] != branches[r - 1]:
            style = EDGES[r == 0 or anchors[r] != anchors[r - 1]]
            axes.axvline(layout.L + r, **style)
            axes.axhline(layout.L + r - first, **style)
    used = list(colours.items())[first > 0 :]
    handles = [Patch(color=colour, label=label) for label, colour in used]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def label_groups(axes: Axes, groups: Groups, first: int) -> None:
    """Label groups of rows along both axes."""
    style = {"ha": "center", "va": "center", "fontsize": 9.5}
    for middle, name in groups.items():
        axes.text(middle, -3.5, name, **style)
        if middle >= first:
            axes.text(-3.5, middle - first, name, rotation=90, **style)
    axes.text(-2.4, -2.4, "row sees\ncolumn", style="italic", **style)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    draw(folder / "mask.png")
    draw_branches(folder)
