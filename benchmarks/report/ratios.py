"""How many times longer the alternatives take to branches, trees and hybrid models, as tables for their pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.baselines.branches import DOCUMENTS, PROMPTS
from benchmarks.report import tables, units
from benchmarks.report.results_file import RowDict

BOTH = ("forward", "forward+backward")


def of_branches(row: RowDict) -> str:
    """The case of a row in words."""
    size = row["sizes"]
    L, C, S = (size[x] for x in "LCS")
    if row["grid"] == "prompts":
        return f"{PROMPTS} packed prompts of {L // 4} to {L}, {C} branches each of {S // 16} to {S}"
    if row["grid"] == "drafter":
        return f"drafter: {C} blocks of {S} in {DOCUMENTS} documents, {L:,} tokens"
    return f"prompt of {L:,}, {C} branches of {S:,}"


def of_trees(row: RowDict) -> str:
    L, C, F, S = (row["sizes"][x] for x in "LCFS")
    if row["grid"] == "chain":
        return f"{C} turns of {S} in a chain, each with {F} leaves of {S}"
    return f"{L:,} of text, {C} nodes of {S}, each with {F} of {S}"


def of_hybrid(row: RowDict) -> str:
    size = row["sizes"]
    words = {
        "headline": "{N} thoughts of {S} rows at each of {P} positions",
        "group": "{N} branches of {S} on a prompt of {L:,}",
        "decode": "row {step} of {N} thoughts at each of {P} positions",
        "GRPO": "GRPO, {C} completions of {T} on a prompt of {L:,}",
    }
    return f"{words[row['grid']].format(**size)}, {row['what']}"


def hybrid(results: dict[str, Any]) -> list[str]:
    """A line for each case: our time and memory, and how many times as long the others take, with how much memory."""
    rows = [row for row in results["rows"] if row["op"] == "hybrid" and row["times_ours"]]
    if not rows:
        return []
    body = []
    for _, (mine, *others) in tables.by_case(rows):
        than = (f"{x['candidate']} {units.number(x['times_ours'])} ({units.memory(x['peak_bytes'])})" for x in others)
        body.append([of_hybrid(mine), units.seconds(mine["seconds"]), units.memory(mine["peak_bytes"]), "; ".join(than)])
    machine, size = results["machine"], rows[0]["sizes"]
    versions = dict.fromkeys([f"torch {machine['packages']['torch']}", *(row["version"] for row in rows)])
    heads = f"{size['H']} heads of width {size['K']}, {rows[0]['dtype']}"
    head = ["", "time", "memory", "times faster than (its memory)"]
    return [f"{machine['device']}, {', '.join(versions)}; {heads}:", "", *tables.markdown_table(head, body), ""]


def table(results: dict[str, Any], op: str, in_words: Callable[[RowDict], str]) -> list[str]:
    """A line for each case and a column for each alternative: forward, then forward with backward. Empty without a ratio."""
    rows = [row for row in results["rows"] if row["op"] == op and row["times_ours"] and not row["is_ours"]]
    if not rows:
        return []
    cases, names = (list(dict.fromkeys(map(of, rows))) for of in (in_words, lambda row: row["candidate"]))
    cells = {(in_words(row), row["candidate"], row["what"]): row for row in rows}
    body = [[case, *(_cell([cells.get((case, name, what)) for what in BOTH]) for name in names)] for case in cases]
    size, dtype = rows[0]["sizes"], rows[0]["dtype"]
    heads = f"{size['H']} query heads and {size['G']} key heads of width {size['K']}, {dtype}"
    return [f"{results['machine']['device']}, {heads}:", "", *tables.markdown_table(["", *names], body), ""]


def _cell(rows: list[RowDict | None]) -> str:
    """Two ratios, and how many times our pairs are computed, where the row says so."""
    if not any(rows):
        return ""
    pairs = next((row["note"].removesuffix(" the pairs") for row in rows if row and row["note"].endswith(" the pairs")), "")
    ratios = ", ".join(units.number(row["times_ours"]) if row else "-" for row in rows)
    return f"{ratios} ({pairs.removesuffix(' times')})" if pairs and not pairs.startswith("1.00") else ratios
