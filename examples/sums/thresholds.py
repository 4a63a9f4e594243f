"""The claims of docs/results.md about one seed, each with what was measured and whether it holds."""

from __future__ import annotations

from typing import Any

from sums.pretraining import RIGHT_STEPS, RIGHT_THOUGHTS
from sums.results import exact_match
from sums.runs import EQUALS_ONLY, EVERYWHERE, FROZEN, NO_REINFORCE_REHEARSED, PAUSES, PLAIN, QUIET_STAR, RANDOM, SHUFFLED


def check(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All checks on the result of a seed; those of runs that were left out are left out too."""
    gate = result["pretraining"]
    checks = [
        bound("pretraining", "probability of a right step after right ones", min(gate["steps_right"][1:]), least=RIGHT_STEPS),
        bound("pretraining", "right thoughts before training", gate["right_thoughts"], least=RIGHT_THOUGHTS),
    ]
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        checks += check_setting(setting, {row["run"]: row for row in result["rows"] if row["setting"] == setting})
    if result["positions"]:
        *before, at_equals, after = result["positions"]["w"]
        checks.append(bound(EVERYWHERE.name, 'mixing weight at "="', at_equals, least=0.3))
        checks.append(bound(EVERYWHERE.name, "largest mixing weight elsewhere", max(map(abs, [*before, after])), most=0.15))
    return checks


def check_setting(setting: str, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    trained = rows[QUIET_STAR.name]
    rivals = [exact_match(rows[run.name], "sampled") for run in (FROZEN, NO_REINFORCE_REHEARSED) if run.name in rows]
    greedy = 0.9 if setting == EQUALS_ONLY.name else 0.8
    checks = [
        bound(setting, "Quiet-STaR, greedy", exact_match(trained, "greedy"), least=greedy),
        bound(setting, SHUFFLED, exact_match(rows[SHUFFLED], "greedy"), most=0.15),
    ]
    if rivals:
        lead = exact_match(trained, "sampled") - max(rivals)
        checks.append(bound(setting, "Quiet-STaR, above the best use of thoughts without REINFORCE", lead, least=0.35))
    if setting == EQUALS_ONLY.name:
        checks.append(bound(setting, "Quiet-STaR, sampled", exact_match(trained, "sampled"), least=0.85))
        checks.append(bound(setting, "Quiet-STaR, sampled: loss", trained["sampled"]["nll"], most=0.6))
    for name in (PAUSES.name, RANDOM.name, PLAIN):
        if name in rows:
            checks.append(bound(setting, name, exact_match(rows[name], "sampled"), most=0.15))
            checks.append(bound(setting, f"{name}: loss", rows[name]["sampled"]["nll"], least=2.2))
    return checks


def bound(setting: str, what: str, value: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    passed = value >= least if least is not None else value <= most
    wanted = f">= {least}" if least is not None else f"<= {most}"
    return {"setting": setting, "what": what, "value": value, "wanted": wanted, "passed": passed}
