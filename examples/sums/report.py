"""What was measured, on the terminal and as page.html."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from sums.plots import draw
from sums.results import Results, exact_match, write_json
from sums.tables import as_html, as_text, checks_table, gains_table, main_table, positions_table, thoughts_table


def print_gate(seed: int, gate: dict[str, Any]) -> None:
    failed = "" if gate["passed"] else ": pretraining failed, so this seed says nothing about thoughts"
    steps = " ".join(f"{p:.2f}" for p in gate["steps_right"])
    print(
        f"seed {seed}  pretraining, {gate['steps']} steps: running sums right {steps}, "
        f"all sums of a thought right {gate['right_thoughts']:.2f}  {gate['seconds']:.0f} s{failed}",
        flush=True,
    )


def print_row(seed: int, row: dict[str, Any]) -> None:
    scores = [f"{how} {exact_match(row, how):.3f}" for how in ("sampled", "greedy") if how in row]
    nll = row.get("sampled", row.get("greedy"))["nll"]
    seconds = f"  {row['seconds']:.0f} s" if "seconds" in row else ""
    print(
        f"seed {seed}  {row['setting']:<10}  {row['run']:<42} exact match {', '.join(scores)}; loss {nll:.2f}{seconds}",
        flush=True,
    )


def show(results: Results, folder: Path) -> None:
    """Print the tables; write results.json, plots and page.html into ``folder``."""
    write_json(results, folder / "results.json")
    plots = draw(results, folder)
    (folder / "page.html").write_text(page(results, plots), encoding="utf-8")
    print("\nResults on held-out lines: exact match with its 95 % interval, loss in nats. Chance: 0.100, loss 2.30.")
    print(as_text(*main_table(results)))
    header, gains = gains_table(results)
    if gains:
        print("\nWhat thinking gains at the answer, nats; only content is due to what was thought")
        print(as_text(header, gains))
    if any(seed["positions"] for seed in results["seeds"]):
        print("\nWhere it learnt to think, with a thought at every position")
        print(as_text(*positions_table(results)))
    print('\nThoughts at "=" on held-out lines')
    print(as_text(*thoughts_table(results)))
    print("\nThresholds")
    print(as_text(*checks_table(results)))
    files = ["results.json", "page.html", *(plot.name for plot in plots)]
    print(f"\n{verdict(results)}\n{folder}: {', '.join(files)}")


def verdict(results: Results) -> str:
    """Whether all thresholds of all seeds pass, in a sentence."""
    checks = [check for seed in results["seeds"] for check in seed["checks"]]
    failed = [check for check in checks if not check["passed"]]
    if any(check["setting"] == "pretraining" for check in failed):
        return "FAIL: pretraining did not teach the running sums, so the other results say nothing about Quiet-STaR."
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
        "<h2>What thinking gains at the answer, nats</h2>" + as_html(*gains_table(results)) if gains_table(results)[1] else "",
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
    """What the results were measured on, in a sentence."""
    seeds, threads = results["seeds"], results["threads"]
    seconds = sum(seed["seconds"] for seed in seeds) / len(seeds)
    return (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {seconds:.0f} s each on {threads} thread{'s' * (threads > 1)} of "
        f"{results['cpu']}; Python {results['python']}, torch {results['torch']}, transformers {results['transformers']}."
    )
