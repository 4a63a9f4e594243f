"""Shows what examples/digit_sums.py measured: lines on the terminal, tables, plots, a page and docs/digit-sums.md."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quietstar.files import write_whole

Results = dict[str, Any]
Rows = list[list[str]]
CHANCE = 0.1
POSITIONS = ["d", "d", "d", "d", "d", "=", "a"]


def describe_machine() -> Results:
    """The head of a results file."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "seeds": [],
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def write_json(results: Results, path: Path) -> None:
    write_whole(path, json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same with every number rounded to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


# Lines during a run


def print_gate(seed: int, gate: dict[str, Any]) -> None:
    verdict = "" if gate["passed"] else ": pretraining failed, so nothing can be said about thoughts"
    steps = " ".join(f"{p:.2f}" for p in gate["steps_right"])
    print(
        f"seed {seed}  pretraining, {gate['steps']} steps: running sums right {steps}, "
        f"whole thoughts right {gate['right_thoughts']:.2f}  {gate['seconds']:.0f} s{verdict}",
        flush=True,
    )


def print_row(seed: int, row: dict[str, Any]) -> None:
    scores = [f"{how} {row[how]['right'] / row[how]['lines']:.3f}" for how in ("sampled", "greedy") if how in row]
    nll = row.get("sampled", row.get("greedy"))["nll"]
    seconds = f"  {row['seconds']:.0f} s" if "seconds" in row else ""
    print(
        f"seed {seed}  {row['setting']:<10}  {row['run']:<42} exact match {', '.join(scores)}; loss {nll:.2f}{seconds}",
        flush=True,
    )


# Tables


def interval(right: int, lines: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / lines
    middle = (share + z * z / (2 * lines)) / (1 + z * z / lines)
    half = z / (1 + z * z / lines) * math.sqrt(share * (1 - share) / lines + z * z / (4 * lines * lines))
    return max(0.0, middle - half), min(1.0, middle + half)


def pooled(results: Results) -> list[dict[str, Any]]:
    """One entry for each run of each setting: the rows of all seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in results["seeds"]:
        for row in seed["rows"]:
            groups.setdefault((row["setting"], row["run"]), []).append(row)
    return [{"setting": setting, "run": run, "rows": rows} for (setting, run), rows in groups.items()]


def total(rows: list[dict[str, Any]], how: str) -> tuple[int, int]:
    return sum(row[how]["right"] for row in rows), sum(row[how]["lines"] for row in rows)


def share(rows: list[dict[str, Any]], how: str) -> str:
    if how not in rows[0]:
        return ""
    right, lines = total(rows, how)
    low, high = interval(right, lines)
    return f"{right / lines:.3f} [{low:.3f}, {high:.3f}]"


def mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows if name in row]
    return form.format(sum(values) / len(values)) if values else ""


def main_table(results: Results) -> tuple[list[str], Rows]:
    header = ["thinks", "run", "loss", "exact match, sampled", "exact match, greedy", "right thoughts", "distinct", "seconds"]
    body = []
    for group in pooled(results):
        rows = group["rows"]
        how = "sampled" if "sampled" in rows[0] else "greedy"
        cells = [group["setting"], group["run"], f"{sum(row[how]['nll'] for row in rows) / len(rows):.2f}"]
        cells += [share(rows, "sampled"), share(rows, "greedy"), mean(rows, "right_thoughts", "{:.3f}")]
        body.append([*cells, mean(rows, "distinct_thoughts", "{:.0f}"), mean(rows, "seconds", "{:.0f}")])
    return header, body


def seeds_table(results: Results) -> tuple[list[str], Rows]:
    """Exact match of every seed, with sampled thoughts where a run has both kinds."""
    header = ["thinks", "run", *(f"seed {seed['seed']}" for seed in results["seeds"])]
    body = []
    for group in pooled(results):
        how = "sampled" if "sampled" in group["rows"][0] else "greedy"
        body.append(
            [group["setting"], group["run"], *(f"{row[how]['right'] / row[how]['lines']:.3f}" for row in group["rows"])]
        )
    return header, body


def checks_table(results: Results) -> tuple[list[str], Rows]:
    """One row for each threshold, with the values of all seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for seed in results["seeds"]:
        for check in seed["checks"]:
            groups.setdefault((check["setting"], check["what"], check["wanted"]), []).append(check)
    body = []
    for (setting, what, wanted), checks in groups.items():
        verdict = "pass" if all(check["passed"] for check in checks) else "FAIL"
        body.append([verdict, setting, what, wanted, " ".join(f"{check['value']:.3f}" for check in checks)])
    return ["", "thinks", "what", "wanted", "measured, seed by seed"], body


def thoughts_table(results: Results) -> tuple[list[str], Rows]:
    header = ["text", "thought before", "thought after", "right sums", "p(answer) without", "p(answer) with", "w"]
    first = results["seeds"][0]["thoughts"]
    body = [
        [t["line"], t["before"], t["after"], t["right"], f"{t['p_without']:.2f}", f"{t['p_with']:.2f}", f"{t['w']:.2f}"]
        for t in (next(iter(first.values())) if first else [])
    ]
    return header, body


def positions_table(results: Results) -> tuple[list[str], Rows]:
    body = [
        [f"seed {seed['seed']}", name, *(f"{round(value, 2) + 0.0:.2f}" for value in seed["positions"][key])]
        for seed in results["seeds"]
        if seed["positions"]
        for key, name in (("w", "w"), ("gain", "gain, nats"))
    ]
    return ["", "", *POSITIONS], body


def as_text(header: list[str], rows: Rows) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )


def as_markdown(header: list[str], rows: Rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def as_html(header: list[str], rows: Rows) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


# Plots


def draw(results: Results, folder: Path) -> list[Path]:
    """The plots as files; none where matplotlib is missing or nothing was measured."""
    if find_spec("matplotlib") is None or not pooled(results):
        return []
    plots = [draw_controls(results, folder), draw_learning(results, folder)]
    return plots if not any(seed["positions"] for seed in results["seeds"]) else [*plots, draw_positions(results, folder)]


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its panels [rows][columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def settings(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The pooled runs of each setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in pooled(results):
        groups.setdefault(group["setting"], []).append(group)
    return groups


def draw_controls(results: Results, folder: Path) -> Path:
    """Exact match of every run, with intervals and the line of chance."""
    groups = settings(results)
    longest = max(map(len, groups.values()))
    figure, panels = new_figure(6 * len(groups), 1 + 0.35 * longest, 1, len(groups))
    for axes, (setting, runs) in zip(panels[0], groups.items(), strict=True):
        for place, group in enumerate(runs):
            how = "sampled" if "sampled" in group["rows"][0] else "greedy"
            right, lines = total(group["rows"], how)
            low, high = interval(right, lines)
            middle = right / lines
            color = "tab:blue" if group["run"].startswith("Quiet-STaR") and "another" not in group["run"] else "tab:gray"
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, ecolor="black", capsize=2)
            axes.plot(
                [row[how]["right"] / row[how]["lines"] for row in group["rows"]], [place] * len(group["rows"]), "k.", ms=3
            )
        axes.axvline(CHANCE, color="tab:red", lw=1, ls="--", label="chance")
        axes.legend(loc="lower right")
        axes.set_yticks(range(len(runs)), [group["run"] for group in runs])
        axes.set(title=f"thinks {setting}", xlabel="held-out exact match", xlim=(0, 1))
        axes.invert_yaxis()
    return save(figure, folder / "digit_sums_controls.png")


def draw_learning(results: Results, folder: Path) -> Path:
    """Exact match and right thoughts over the steps of every run with thoughts: mean of the seeds, thin lines for each."""
    groups = settings(results)
    figure, panels = new_figure(5.5 * len(groups), 6, 2, len(groups))
    for column, (setting, runs) in enumerate(groups.items()):
        curves = {group["run"]: [row["curve"] for row in group["rows"]] for group in runs if "curve" in group["rows"][0]}
        for row, (key, label) in enumerate(
            (("exact_match", "held-out exact match, greedy"), ("right_thoughts", "right thoughts"))
        ):
            axes = panels[row][column]
            for number, (run, seeds) in enumerate(curves.items()):
                values = [[point[key] for point in curve] for curve in seeds]
                draw_seeds(axes, [point["step"] for point in seeds[0]], values, f"C{number}", run)
            axes.set(xlabel="step", ylabel=label, ylim=(-0.02, 1.02))
        panels[0][column].axhline(CHANCE, color="tab:red", lw=1, ls="--")
        panels[0][column].set_title(f"thinks {setting}")
        panels[1][column].legend(fontsize=7, loc="center right")
    return save(figure, folder / "digit_sums_learning.png")


def draw_seeds(axes: Any, steps: list[int], seeds: list[list[float]], color: str, label: str) -> None:
    for values in seeds:
        axes.plot(steps, values, color=color, lw=0.5, alpha=0.5)
    axes.plot(steps, [sum(values) / len(values) for values in zip(*seeds, strict=True)], color=color, label=label)


def draw_positions(results: Results, folder: Path) -> Path:
    """Mixing weight and gain at each position of a line, mean of the seeds and a dot for each."""
    measured = [seed["positions"] for seed in results["seeds"] if seed["positions"]]
    figure, panels = new_figure(9, 3, 1, 2)
    for axes, key, label in zip(panels[0], ("w", "gain"), ("mixing weight w", "gain from the thought, nats"), strict=True):
        columns = list(zip(*(one[key] for one in measured), strict=True))
        axes.bar(range(len(POSITIONS)), [sum(column) / len(column) for column in columns], color="tab:blue")
        for place, column in enumerate(columns):
            axes.plot([place] * len(column), column, "k.", ms=4)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(POSITIONS)), POSITIONS)
        axes.set(ylabel=label, xlabel="position that thinks")
    return save(figure, folder / "digit_sums_where.png")


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


# The whole


def show(results: Results, folder: Path) -> None:
    """Print the tables; write results.json, plots and page.html into ``folder``."""
    write_json(results, folder / "results.json")
    plots = draw(results, folder)
    (folder / "page.html").write_text(page(results, plots))
    print("\nHeld-out lines. Exact match has 95 % intervals, chance is 0.100 and a loss of 2.30 nats.")
    print(as_text(*main_table(results)))
    if any(seed["positions"] for seed in results["seeds"]):
        print("\nWhere it learnt to think, with a thought at every position")
        print(as_text(*positions_table(results)))
    print('\nThoughts at "=" on held-out lines')
    print(as_text(*thoughts_table(results)))
    print("\nThresholds")
    print(as_text(*checks_table(results)))
    print(f"\n{verdict(results)}\n{folder}: results.json, page.html, {', '.join(plot.name for plot in plots)}")


def verdict(results: Results) -> str:
    checks = [check for seed in results["seeds"] for check in seed["checks"]]
    failed = [check for check in checks if not check["passed"]]
    if any(check["setting"] == "pretraining" for check in failed):
        return "FAIL: pretraining did not teach the running sums, so the rest says nothing about Quiet-STaR."
    return f"{len(failed)} of {len(checks)} thresholds FAIL." if failed else f"All {len(checks)} thresholds pass."


def page(results: Results, plots: list[Path]) -> str:
    images = "".join(
        f'<p><img src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"></p>' for plot in plots
    )
    parts = [
        "<h1>Digit sums: does thinking help?</h1>",
        f"<p>{html.escape(verdict(results))}</p>",
        f"<p>{html.escape(machine(results))}</p>",
        as_html(*main_table(results)),
        images,
        "<h2>Thoughts on held-out lines</h2>",
        as_html(*thoughts_table(results)),
        "<h2>Where it learnt to think</h2>",
        as_html(*positions_table(results)),
        "<h2>Thresholds</h2>",
        as_html(*checks_table(results)),
    ]
    style = "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    style += "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
    return f"<!doctype html><meta charset=utf-8><title>Digit sums</title><style>{style}</style>{''.join(parts)}\n"


def machine(results: Results) -> str:
    seeds, threads = results["seeds"], results["threads"]
    seconds = sum(seed["seconds"] for seed in seeds) / len(seeds)
    return (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {seconds:.0f} s each on {threads} thread{'s' * (threads > 1)} of "
        f"{results['cpu']}; Python {results['python']}, torch {results['torch']}, transformers {results['transformers']}."
    )


# docs/digit-sums.md


def write_docs(results: Results, folder: Path) -> None:
    """Write digit-sums.md, its plots, and digit_sums.json, which has every number of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "digit_sums.json")
    draw(results, folder)
    (folder / "digit-sums.md").write_text(docs_page(results))


def docs_page(results: Results) -> str:
    shares = {
        (group["setting"], group["run"], how): f"{right / lines:.2f}"
        for group in pooled(results)
        for how in ("sampled", "greedy")
        if how in group["rows"][0]
        for right, lines in [total(group["rows"], how)]
    }
    best = shares["at =", "Quiet-STaR", "sampled"]
    shuffled = shares["at =", "Quiet-STaR with another line's thoughts", "greedy"]
    frozen = shares["at =", "frozen model, mixing head trained", "sampled"]
    rehearsed = shares["at =", "no REINFORCE, with rehearsal", "sampled"]
    plain = shares["at =", "plain language model, 4 times the batch", "sampled"]
    everywhere = shares["everywhere", "Quiet-STaR", "sampled"]
    lines = results["seeds"][0]["rows"][0]["sampled"]["lines"]
    return f"""# Digit sums: does thinking help?

Yes, on text that shows how. A small model that thinks before the answer gets {best} of the held-out sums right; without
thinking it gets {plain}, which is chance. [examples/digit_sums.py](../examples/digit_sums.py) runs the experiment and writes
this page:

```sh
python examples/digit_sums.py --quick             # one seed, every position thinks, some controls
python examples/digit_sums.py --seeds {len(results["seeds"])} --docs docs   # everything on this page
```

All numbers are from [digit_sums.json](digit_sums.json): {machine(results)}

## The task

A line is five digits and the last digit of their sum. A Llama of three layers and width 64 is pretrained on such lines, some
with an aside before the answer. An aside either has the running sums, which lead to the answer, or repeats the first four
digits, which is more frequent and of no use:

```
7 5 8 6 2 = 8
7 5 8 6 2 = - 2 0 6 8 - 8
7 5 8 6 2 = - 7 5 8 6 - 8
```

Quiet-STaR then trains it on lines without an aside. A random tenth of all digit strings is held out from both. A model of this
size and training can't compute the answer in one pass: without thinking it can only guess. A thought of four tokens has room
for the running sums. Its reward is how much it improves the prediction.

## What was measured

- **Exact match**: the most likely token after "=" is the answer, on {lines} held-out lines per seed. The 95 % interval is
  Wilson's; it covers the choice of lines, not the seeds.
- **Loss**: of the answer, in nats. A guess has 2.30.
- **Right thoughts**: the share of sampled thoughts with all four running sums right. **Distinct**: the number of different
  greedy thoughts of one seed.
- **Seconds**: of training alone, on a machine that was also doing other work.

{as_markdown(*main_table(results))}

![Exact match of every run, with intervals](digit_sums_controls.png)

The runs:

- **Another line's thoughts**: the trained model, given the greedy thoughts of other lines. It gets {shuffled}, so what counts
  is what a thought says, not the computation it costs.
- **Pause tokens, random digits**: thoughts of the same length that say nothing, in training and evaluation.
- **Untrained thoughts, w = 1**: the answer from what the pretrained model writes after the dash, before any training.
- **Frozen model, mixing head trained**: the best use of these untrained thoughts, {frozen}.
- **No REINFORCE**: the policy weight is 0. On its own this control is unfair, because lines without asides make the model
  forget how to write them. With rehearsal (64 lines of the pretraining text in every step) it keeps its asides and gets
  {rehearsed}.
- **Plain language model**: next-token training on the same lines, four times as many per step.
- **Start and end stored at 1/100**: as in the published code (`embedding_scale=100`), which multiplies their learning rate
  by 100. All other runs use 1.

Each seed separately, with sampled thoughts where a run has both kinds:

{as_markdown(*seeds_table(results))}

![Exact match over the steps](digit_sums_learning.png)

## Where it thinks

With a thought at every position, as in the paper, {everywhere} of the answers are right. The mixing weight w shows that the
thoughts are used at "=", just before the token that needs them.

{as_markdown(*positions_table(results))}

![Mixing weight and gain at each position](digit_sums_where.png)

w alone is no evidence. Where base and mixed prediction agree, as with pause tokens, it can take any value.

## Some thoughts

These were sampled at "=" on held-out lines by the first seed's model, before and after training.

{as_markdown(*thoughts_table(results))}

## What it does not show

The text shows two kinds of asides. From the reward of the next token alone, Quiet-STaR finds out which kind helps, where to
think, and how far to trust a thought. It does not invent a way of reasoning here: if pretraining has not taught the running
sums, nothing is gained, which is why each seed must first pass a gate. These results also don't show that thinking improves
ordinary text at this size, and say nothing about models with billions of weights. [limits.md](limits.md) has more.

## Thresholds

They were set before these runs, from the results of a prototype. {verdict(results)}

{as_markdown(*checks_table(results))}
"""
