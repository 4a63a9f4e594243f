"""Variants of the objective, compared on digit sums: how a reward becomes an advantage, how often it is used, and what keeps
the thoughts close to the text. The base model that a reward is compared with (`base_model`) makes no difference by itself,
since every advantage is a difference between the thoughts of one position. It matters for a divergence.

Thoughts are at "=" only, 4 of 4 tokens, from the same pretrained model and for the same number of steps. The weight of the
policy term is 3 throughout, which suits the published objective; another variant might need another weight. Answers are
predicted as in training: the preset "paper" mixes log-probabilities, which then don't add up to 1, with a weight from 0 to 1.
Its row was run with a policy temperature of 1 and without a loss of the base prediction, as the preset was then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digit_thoughts import measure, pretrained
from experiments_claims import figure

from quietstar_recipes.common.plots import Panel, panels

TITLE = "Quiet-STaR: objectives"
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "paper": {"preset": "paper", "policy_temperature": 1.0, "base_weight": 0.0, "mix_weight": 1.0},
    "temperature 1": {"policy_temperature": 1.0},
    "mean": {"advantage": "mean"},
    "leave one out": {"advantage": "leave_one_out"},
    "z-score": {"advantage": "zscore"},
    "clipped, two updates": {"ratio_clip": 0.2, "updates": 2},
    "divergence 0.01": {"kl_weight": 0.01, "policy_temperature": 1.0},
    "divergence 0.01 from the first model": {"kl_weight": 0.01, "policy_temperature": 1.0, "base_model": "frozen"},
    "entropy 0.01": {"entropy_weight": 0.01, "policy_temperature": 1.0},
    "no reward": {"policy_weight": 0.0},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, _ = pretrained(seed, size)
    rows = [
        {"run": name, **measure(model, seed, size, out / str(number), **fields)}
        for number, (name, fields) in enumerate(VARIANTS.items())
    ]
    return {"rows": rows}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def bars(column: str) -> dict[str, list[float]]:
        return {name: [figure(result, name, column) for result in results] for name in VARIANTS}

    panels(
        path,
        TITLE,
        [Panel("accuracy on held-out lines", "", bars=bars("accuracy")), Panel("loss, nats", "", bars=bars("loss"))],
    )
    return "Accuracy and loss of the answer on held-out lines for each objective; each dot is a seed"
