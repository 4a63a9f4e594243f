"""What a training run shows on the terminal: a bar that fits its width, and a line for each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

# The most important first: where the terminal is narrow, the last ones are left out.
FIGURES = {
    "loss_ce": lambda x: f"loss_ce {x:.3f}",
    "reward": lambda x: f"reward {x:.3f}",
    "weight": lambda x: f"weight {x:.3f}",
    "thoughts_per_second": lambda x: f"{tqdm.format_sizeof(x)} th/s",
}


class Display:
    """The bar of a run, on stderr.

    Args:
        steps: of the whole run.
        done: steps of the checkpoint that it continues from.
        shown: whether to show anything.
    """

    def __init__(self, steps: int, done: int, shown: bool):
        self._shown = shown
        self._other_columns = len(f"{steps}/{steps} | ETA 12:34:56")  # with the shortest bar
        form = "{n_fmt}/{total_fmt} {bar} ETA {remaining}{desc}"
        self._bar = tqdm(total=steps, initial=done, disable=not shown, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, line: Mapping[str, float]) -> None:
        """Count a step, and show those of its figures for which there is room."""
        if not self._shown:
            return
        columns, text = self._bar.format_dict["ncols"], ""
        for name, form in FIGURES.items():
            longer = f"{text} {form(line[name])}"
            if not isinstance(columns, int) or len(longer) + self._other_columns <= columns:
                text = longer
        self._bar.set_description_str(text, refresh=False)
        self._bar.update()

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Print what an evaluation after ``step`` steps found, above the bar."""
        if self._shown:
            # Not to stdout: a run must not end because nobody reads that any more.
            tqdm.write(f"step {step}: {_gain(scores) if 'gain_low' in scores else _all(scores)}", file=self._bar.fp)


def _gain(scores: Mapping[str, float]) -> str:
    """The figures of ``quietstar.evaluation.losses.evaluate``, in lines of few enough characters for 80 columns."""
    line = f"held-out loss {scores['base']:.3f}, thinking {scores['mixed']:.3f}, gain {_interval(scores, 'gain')}"
    if "content_low" in scores:
        line += f"\n  = mixing {_interval(scores, 'mixing')} + content {_interval(scores, 'content')}"
    return line


def _interval(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:+.3f} ({scores[f'{name}_low']:+.3f} to {scores[f'{name}_high']:+.3f})"


def _all(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items())
