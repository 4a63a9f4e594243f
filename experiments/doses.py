"""How accuracy on digit sums depends on the tokens of a thought, the number of thoughts, the weight of the reward, and the
share of the text's asides that help. With a share of a tenth it depends on the seed: some models have learnt the steps from so
few asides and others have not, as the share of right thoughts before training shows.

Thoughts are at "=" only. Unless a row says otherwise there are 4 thoughts of 4 tokens, the weight is 3, and 40 % of the asides
help. A guess is right in a tenth of the lines, and the running sums have four steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digit_thoughts import measure, pretrained

from quietstar_recipes.common.plots import Panel, panels

TITLE = "Quiet-STaR: doses"
DOSES: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {  # a field of ThoughtConfig, and its values
    "tokens": ("thought_tokens", {"tiny": (2,), "quick": (2, 3, 4, 6), "full": (1, 2, 3, 4, 6, 8, 12)}),
    "thoughts": ("thoughts", {"tiny": (2,), "quick": (2, 8), "full": (1, 2, 4, 8, 16)}),
    "weight": ("policy_weight", {"tiny": (3.0,), "quick": (0.1, 1.0, 30.0), "full": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)}),
}
DEFAULTS = {"tokens": 4, "thoughts": 4, "weight": 3, "helpful asides": 0.4}
LOG = ("thoughts", "weight")
HELPFUL = {"tiny": (0.4,), "quick": (0.1, 0.2), "full": (0.0, 0.1, 0.15, 0.2, 0.3, 0.6)}  # besides 0.4


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, right = pretrained(seed, size)
    rows: list[dict[str, Any]] = []
    for name, (field, values) in DOSES.items():
        for value in values[size]:
            measured = measure(model, seed, size, out / f"{name}-{value}", **{field: value})
            rows.append({"run": f"{name}: {value:g}", "right_before": right, **measured})
    for share in HELPFUL[size]:
        model, right = pretrained(seed, size, share)
        measured = measure(model, seed, size, out / f"helpful-{share}")
        rows.append({"run": f"helpful asides: {share:g}", "right_before": right, **measured})
    return {"rows": rows}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
        of = {row["run"]: row["accuracy"] for row in rows}
        found = [(float(run.split()[-1]), accuracy) for run, accuracy in of.items() if run.startswith(f"{name}:")]
        default = [(DEFAULTS[name], of[run]) for run in of if run == "tokens: 4" and name != "tokens"]
        return sorted(found + default)

    plots = [
        Panel(
            name,
            "accuracy",
            {"greedy thoughts": [points(result["rows"], name) for result in results]},
            log=name in LOG,
            share=True,
        )
        for name in DEFAULTS
    ]
    panels(path, TITLE, plots)
    return "Accuracy on held-out lines against each dose; thin lines are seeds, thick lines their mean"
