"""A model that solves about half of the 2 x 2-digit multiplications learns from its own greedy chains: from those with the
right answer, from all of them, or also from chains that it wrote with the answer as a hint, either all of these or only checked
ones.

The base is trained on the generator's own chains until it solves nearly half, with the answer shown in a third of the rows.
Rationalised chains may copy the hint after wrong steps, which the share of right chains shows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from experiments_checks import figure, least
from small_base import base

from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.star import Config, star

TITLE = "STaR"
RUNS: dict[str, dict[str, Any]] = {
    "filter, restart": {},
    "no filter": {"filter": False},
    "no restart": {"restart": False},
    "rationalised": {"rationalize": True},
    "rationalised, right chains": {"rationalize": True, "rationale_check": "chain"},
    "rationalised, likely chains": {"rationalize": True, "rationale_check": "likelihood"},
}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"rounds": 1, "problems": 60, "steps": 2, "test_problems": 20},
    "quick": {"rounds": 3, "problems": 4000, "steps": 60, "test_problems": 800},
    "full": {"rounds": 6, "problems": 4000, "steps": 60, "test_problems": 800},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, task = base(seed, size)
    result: dict[str, Any] = {"rows": [], "accuracy": {}}
    for name, options in RUNS.items():
        config = Config(
            out=str(out / name.replace(", ", "-").replace(" ", "-")),
            filter=size != "tiny" and options.get("filter", True),  # a base of five updates solves nothing
            **{k: v for k, v in options.items() if k != "filter"},
            **SIZES[size],
            max_new=20,
            seed=seed,
        )
        _, reports = star(copy.deepcopy(model), task, config, resume=True)
        last = reports[-1]
        if not result["rows"]:
            result["rows"].append({"run": "base", **{key: reports[0][key] for key in ("accuracy", "chain_right")}})
        keys = ("accuracy", "chain_right", "kept", "rationalised", "failed", "kept_chain_right", "rationalised_chain_right")
        result["rows"].append({"run": name, **{key: last[key] for key in keys}})
        result["accuracy"][name] = [x["accuracy"] for x in reports]
    return result


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def above(run: str, other: str) -> list[float]:
        return [figure(result, run) - figure(result, other) for result in results]

    return [
        least("filter, above the base", above("filter, restart", "base"), 0.15),
        least("filter, above no filter", above("filter, restart", "no filter"), 0.15),
        least("rationalised and checked, above filter alone", above("rationalised, right chains", "filter, restart"), -0.02),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    curves = {name: [list(enumerate(result["accuracy"][name])) for result in results] for name in RUNS}
    panels(path, TITLE, [Panel("round", "accuracy on test problems", curves)])
    return "Accuracy on test problems after each round; thin lines are seeds, thick lines their mean"
