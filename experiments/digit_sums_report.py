"""What examples/digit_sums.py measured: results file, terminal, plots, and its table in docs/results.md."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quietstar.evaluation.intervals import PARTS, format_gain, wilson
from quietstar.files.pictures import can_draw, legend_below, new_figure, save
from quietstar.files.reading import as_type, read_json
from quietstar.files.writing import write_whole
from quietstar_recipes.common.plots import Panel, panels

sys.path.append(str(Path(__file__).parents[1]))

from experiments_report import markdown  # noqa: E402, from this folder

from benchmarks.report.committed import as_json, write_block  # noqa: E402, which is not installed

Results = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # header and rows
SHUFFLED = "Quiet-STaR with another line's thoughts"
POSITIONS = ["d", "d", "d", "d", "d", "=", "a"]  # of a line that think
CHANCE = 0.1

# The results file, from which all else is made.


def describe_machine() -> Results:
    """The head of a results file, without seeds yet."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "seeds": [],
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def earlier_seeds(path: Path, now: Results) -> list[dict[str, Any]]:
    """The finished seeds of an interrupted run; none if there is no file.

    Raises:
        ValueError: the file is from a run with other options, or from another machine or other versions.
    """
    if not path.exists():
        return []
    saved = read_results(path)
    for name in now:
        if name != "seeds" and saved.get(name) != now[name]:
            raise ValueError(f"{path} was made with {name}={saved.get(name)!r}, not {now[name]!r}: take another --out")
    return saved["seeds"]


def read_results(path: Path) -> Results:
    """A results file. Raises ValueError if it is missing or is none."""
    results = read_json(path, Results)
    as_type(list[Results], results.get("seeds"), f"{path}: seeds")
    return results


def write_json(results: Results, path: Path) -> None:
    write_whole(path, json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same with every number rounded to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def pooled(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of all seeds, by setting and run."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in (row for seed in results["seeds"] for row in seed["rows"]):
        groups.setdefault(row["setting"], {}).setdefault(row["run"], []).append(row)
    return groups


def how_scored(rows: list[dict[str, Any]]) -> str:
    """The kind of thoughts to show: sampled ones where a run has both kinds."""
    return "sampled" if "sampled" in rows[0] else "greedy"


def exact_match(row: dict[str, Any], how: str) -> float:
    return row[how]["right"] / row[how]["lines"]


def pooled_share(rows: list[dict[str, Any]], how: str) -> tuple[float, float, float]:
    """Exact match over the lines of all seeds, with its 95 % interval."""
    right, lines = (sum(row[how][name] for row in rows) for name in ("right", "lines"))
    return right / lines, *wilson(right, lines)


# Tables.


def main_table(results: Results) -> Table:
    def share(rows: list[dict[str, Any]], how: str) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*pooled_share(rows, how)) if how in rows[0] else ""

    def mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
        values = [row[name] for row in rows if name in row]
        return form.format(sum(values) / len(values)) if values else ""

    header = ["thoughts", "run", "loss", "exact match, sampled", "exact match, greedy", "right thoughts", "distinct", "seconds"]
    body = []
    for setting, runs in pooled(results).items():
        for run, rows in runs.items():
            how = how_scored(rows)
            cells = [setting, run, f"{sum(row[how]['nll'] for row in rows) / len(rows):.2f}"]
            cells += [share(rows, "sampled"), share(rows, "greedy"), mean(rows, "right_thoughts", "{:.3f}")]
            body.append([*cells, mean(rows, "distinct_thoughts", "{:.0f}"), mean(rows, "seconds", "{:.0f}")])
    return header, body


def checks_table(results: Results) -> Table:
    """A row for each threshold, with the values of all seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for check in (check for seed in results["seeds"] for check in seed["checks"]):
        groups.setdefault((check["setting"], check["what"], check["wanted"]), []).append(check)
    body = []
    for what, checks in groups.items():
        verdict = "pass" if all(check["passed"] for check in checks) else "FAIL"
        body.append([verdict, *what, " ".join(f"{check['value']:.3f}" for check in checks)])
    return ["", "setting", "measure", "threshold", "value of each seed"], body


def thoughts_table(results: Results) -> Table:
    """The first seed's thoughts in its first setting."""
    header = ["text", "thought before", "thought after", "right sums", "p(answer) without", "p(answer) with", "w"]
    first = next(iter(results["seeds"][0]["thoughts"].values()), [])
    texts, numbers = ("line", "before", "after", "right"), ("p_without", "p_with", "w")
    return header, [[*(t[name] for name in texts), *(f"{t[name]:.2f}" for name in numbers)] for t in first]


def gains_table(results: Results) -> Table:
    """The gain of the answer's thought and its two parts, nats, with 95 % intervals over lines; empty in older results."""
    body = [
        [setting, f"seed {seed['seed']}", *(format_gain(gains, part, 2) for part in PARTS)]
        for seed in results["seeds"]
        for setting, gains in seed.get("gains", {}).items()
    ]
    return ["thoughts", "", "gain", "= mixing, another line's thought", "+ content, own over another's"], body


def positions_table(results: Results) -> Table:
    """Mixing weight and gain at each position of a line."""
    body = [
        [f"seed {seed['seed']}", name, *(f"{round(value, 2) + 0.0:.2f}" for value in seed["positions"][key])]
        for seed in results["seeds"]
        if seed["positions"]
        for key, name in (("w", "w"), ("gain", "gain, nats"))
    ]
    return ["", "", *POSITIONS], body


def as_text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )


# The terminal and the docs.


def print_gate(seed: int, gate: dict[str, Any]) -> None:
    failed = "" if gate["passed"] else ": pretraining failed, so this seed says nothing about thoughts"
    steps = " ".join(f"{p:.2f}" for p in gate["steps_right"])
    print(
        f"seed {seed}  pretraining, {gate['steps']} steps: running sums right {steps}, "
        f"all sums of a thought right {gate['right_thoughts']:.2f}  {gate['seconds']:.0f} s{failed}",
        flush=True,
    )


def print_row(seed: int, row: dict[str, Any]) -> None:
    scores = ", ".join(f"{how} {exact_match(row, how):.3f}" for how in ("sampled", "greedy") if how in row)
    loss = f"loss {row[how_scored([row])]['nll']:.2f}"
    seconds = f"  {row['seconds']:.0f} s" if "seconds" in row else ""
    print(f"seed {seed}  {row['setting']:<10}  {row['run']:<42} exact match {scores}; {loss}{seconds}", flush=True)


def show(results: Results, folder: Path) -> None:
    """Print the tables; write results.json and plots into ``folder``."""
    write_json(results, folder / "results.json")
    plots = draw(results, folder)
    for title, table in sections(results):
        print(f"\n{title}\n{as_text(*table)}")
    print(f"\n{verdict(results)}\n{machine(results)}\n{folder}: {', '.join(['results.json', *(plot.name for plot in plots)])}")


def sections(results: Results) -> Iterator[tuple[str, Table]]:
    """The tables that have rows, by their titles."""
    chance = "Chance: 0.100, loss 2.30."
    yield f"Results on held-out lines: exact match with its 95 % interval, loss in nats. {chance}", main_table(results)
    if (gains := gains_table(results))[1]:
        yield "What thinking gains at the answer, nats; only content is due to what was thought", gains
    if (positions := positions_table(results))[1]:
        yield "Where it learnt to think, with a thought at every position", positions
    yield 'Thoughts at "=" on held-out lines', thoughts_table(results)
    yield "Thresholds", checks_table(results)


def verdict(results: Results) -> str:
    """Whether all thresholds of all seeds pass, in a sentence."""
    checks = [check for seed in results["seeds"] for check in seed["checks"]]
    failed = [check for check in checks if not check["passed"]]
    if any(check["setting"] == "pretraining" for check in failed):
        return "FAIL: pretraining did not teach the running sums, so the other results say nothing about Quiet-STaR."
    return f"{len(failed)} of {len(checks)} thresholds FAIL." if failed else f"All {len(checks)} thresholds pass."


def machine(results: Results) -> str:
    """What the results were measured on, in a sentence."""
    seeds, threads = results["seeds"], results["threads"]
    seconds = sum(seed["seconds"] for seed in seeds) / len(seeds)
    return (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {seconds:.0f} s each on {threads} thread{'s' * (threads > 1)} of "
        f"{results['cpu']}; Python {results['python']}, torch {results['torch']}, transformers {results['transformers']}."
    )


def write_docs(results: Results, folder: Path) -> None:
    """The numbers, the plots, and the table in results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digit_sums.json").write_text(as_json(rounded(results)), encoding="utf-8")
    draw(results, folder)
    write_block(folder / "results.md", "digit-sums", block(results))


def block(results: Results) -> str:
    return f"{markdown(*main_table(results))}\n\nAll numbers are from [digit_sums.json](digit_sums.json): {machine(results)}"


# Plots.


def draw(results: Results, folder: Path) -> list[Path]:
    """Save the plots; none if matplotlib is missing or nothing was measured."""
    settings = pooled(results)
    if not can_draw() or not settings:
        return []
    names = ["controls", "learning"]
    draw_controls(settings, folder / "digit_sums_controls.png")
    axes = {"exact_match": "exact match, greedy", "right_thoughts": "right thoughts"}
    shown = []
    for key, label in axes.items():
        for setting, runs in settings.items():
            curves = {
                run: [[(point["step"], point[key]) for point in row["curve"]] for row in rows]
                for run, rows in runs.items()
                if "curve" in rows[0]
            }
            shown.append(Panel("step", f"{label}, {setting}", curves, share=True))
    panels(folder / "digit_sums_learning.png", "Digit sums: held-out lines during training", shown)
    if measured := [seed["positions"] for seed in results["seeds"] if seed["positions"]]:
        names.append("where")
        labels = {"w": "mixing weight w", "gain": "gain, nats"}
        bars = {key: {f"{i} {name}": [x[key][i] for x in measured] for i, name in enumerate(POSITIONS)} for key in labels}
        shown = [Panel(label, "position", bars=bars[key]) for key, label in labels.items()]
        panels(folder / "digit_sums_where.png", "Digit sums: where it thinks", shown)
    return [folder / f"digit_sums_{name}.png" for name in names]


def draw_controls(settings: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Exact match of every run over all seeds, with its interval, a dot for each seed, and the line of chance."""
    figure = new_figure(6 * len(settings), 1 + 0.35 * max(map(len, settings.values())))
    for axes, (setting, runs) in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings.items(), strict=True):
        for place, (run, rows) in enumerate(runs.items()):
            how = how_scored(rows)
            middle, low, high = pooled_share(rows, how)
            color = "tab:blue" if run.startswith("Quiet-STaR") and run != SHUFFLED else "tab:gray"
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, ecolor="black", capsize=2)
            axes.plot([exact_match(row, how) for row in rows], [place] * len(rows), "k.", ms=3)
        axes.axvline(CHANCE, color="tab:red", lw=1, ls="--", label="chance")
        axes.set_yticks(range(len(runs)), list(runs))
        axes.set(title=f"thoughts {setting}", xlabel="exact match, held-out", xlim=(0, 1))
        axes.invert_yaxis()
    legend_below(figure)
    save(figure, path)
