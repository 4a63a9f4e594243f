"""A run's metrics: their file, and what the terminal shows of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tqdm.auto import tqdm

from quietstar.files.reading import as_type, json_value, read_utf8
from quietstar.files.writing import naming, write_whole


class Line(msgspec.Struct):
    """What every line has; the other figures depend on the run."""

    step: Annotated[int, msgspec.Meta(ge=0)]


class TrainingLine(Line):
    """What ``train`` writes in every line, and its summary reads."""

    seconds: float
    loss_ce: float
    reward: float
    weight: float
    thoughts_per_second: float


class Metrics:
    """``metrics.jsonl``, one line per step. A resumed run drops the lines after its checkpoint.

    Args:
        done: steps of the checkpoint that the run continues from; 0 starts a new file.
        write: whether this process writes the file; the others only keep the lines.
        kind: what every line must have.

    Attributes:
        lines: the figures of every step so far.
    """

    def __init__(self, path: Path, done: int, write: bool, kind: type[Line] = Line):
        self.path, self.write = path, write
        self.lines: list[dict[str, float]] = []
        if done and path.exists():
            *whole, rest = read_utf8(path).split("\n")
            with suppress(ValueError, RecursionError):  # nothing, or half a line from a run that was killed, which is dropped
                json.loads(rest)
                whole.append(rest)
            for number, text in enumerate(whole, 1):
                line = json_value(text, f"{path}: line {number}")
                if as_type(kind, line, f"{path}: line {number}").step <= done:
                    self.lines.append(line)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite()

    def _rewrite(self) -> None:
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def lacks_evaluation(self) -> bool:
        """Whether there is a last line, without an evaluation after its step."""
        last = self.lines[-1] if self.lines else {"eval_": 0.0}
        return not any(name.startswith("eval_") and not name.startswith("eval_0_") for name in last)

    def complete(self, figures: Mapping[str, float]) -> None:
        """Add figures to the last line."""
        self.lines[-1] |= figures
        if self.write:
            self._rewrite()

    def add(self, line: dict[str, float]) -> None:
        """Append the figures of a step."""
        self.lines.append(line)
        if self.write:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


SECONDS = 10.0  # between lines about single updates


class Pace:
    """Limits log lines to one every ``SECONDS`` seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another line."""
        now = time.monotonic()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True


# The most important first: where the terminal is narrow, the last ones are left out.
FIGURES = {
    "loss_ce": lambda x: f"loss_ce {x:.3f}",
    "reward": lambda x: f"reward {x:.3f}",
    "weight": lambda x: f"weight {x:.3f}",
    "thoughts_per_second": lambda x: f"{tqdm.format_sizeof(x)} th/s",
    "thought_length": lambda x: f"length {x:.0f}",
    "leak_rate": lambda x: f"leaks {x:.0%}",
    "dead_groups": lambda x: f"dead {x:.0%}",
}


def shown(line: Mapping[str, float]) -> list[str]:
    """Those that a line has; of leaks and dead groups, where there are any."""
    rare = ("leak_rate", "dead_groups")
    return [form(line[name]) for name, form in FIGURES.items() if name in line and (line[name] or name not in rare)]


class Display:
    """The bar of a run, on stderr; where that is no terminal, a line every ``SECONDS`` seconds."""

    def __init__(self, steps: int, done: int, shown: bool):
        self._shown, self._steps, self._done, self._pace = shown, steps, done, Pace()
        self._figures = ""
        self._other_columns = len(f"{steps}/{steps} | ETA 12:34:56")  # with the shortest bar
        form = "{n_fmt}/{total_fmt} {bar} ETA {remaining}{desc}"
        self._bar = tqdm(total=steps, initial=done, disable=None if shown else True, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, line: Mapping[str, float]) -> None:
        """Count a step, and show those of its figures for which there is room."""
        self._done += 1
        if self._bar.disable:
            if self._shown and (self._pace.due() or self._done == self._steps):
                self._say(f"step {self._done} of {self._steps}: {', '.join(shown(line))}")
            return
        columns, text = self._bar.format_dict["ncols"], ""
        for figure in shown(line):
            longer = f"{text} {figure}"
            if not isinstance(columns, int) or len(longer) + self._other_columns <= columns:
                text = longer
        self._figures = text
        self._bar.set_description_str(text, refresh=False)
        self._bar.update()

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is, in place of the last step's figures."""
        self._bar.set_description_str(f" evaluating {done}/{total}")

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Print what an evaluation after ``step`` steps found, above the bar."""
        if self._shown:
            others = ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in scores.items())
            self._say(f"step {step}: {_gain(scores) if 'gain_low' in scores else others}")
            self._bar.set_description_str(self._figures)

    def _say(self, text: str) -> None:
        """Print above the bar, on stderr. A closed stderr must not end the run."""
        with suppress(OSError):
            tqdm.write(text, file=sys.stderr)


def _gain(scores: Mapping[str, float]) -> str:
    """The figures of ``quietstar.evaluate``, in lines of few enough characters for 80 columns."""
    line = f"held-out loss {scores['base']:.3f}, thinking {scores['mixed']:.3f}, gain {_interval(scores, 'gain')}"
    if "content_low" in scores:
        line += f"\n  = mixing {_interval(scores, 'mixing')} + content {_interval(scores, 'content')}"
    return line


def _interval(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:+.3f} ({scores[f'{name}_low']:+.3f} to {scores[f'{name}_high']:+.3f})"
