"""Thoughts can be learnt from their reward alone: 0.83 of the answers are right, 0.22 before training. But the best of a few
thoughts that were sampled once teach as much here, 0.84: three quarters of those that are kept are right, where an eighth of
all is. The loss is that of preset `rlp`, with no mixing head and no loss of the text; the setting is not that of RLP's paper.
Thoughts have four tokens, at one known place, between vectors that begin as the dash around an aside; the reward is the
log-likelihood of the answer after the thought, less that of a slow copy without one.

Thoughts are at "=" only, 4 for each of 64 lines a step, all weights at a rate of 1e-3. The controls start from the same
pretrained model. One thinks as it did before any training. One trains on four times the lines, without thoughts. The strongest
has offline thoughts: as many are sampled, once; of each four the best is kept where it helps, and trained on for as many steps,
its likelihood weighted by its gain. RLP's own model is also given another line's thoughts, or random digits.

Accuracy and loss are those of the answer on held-out lines, predicted after a greedy thought. Right thoughts are all four
running sums; "kept right" is their share among the thoughts that were kept to train on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from digit_thoughts import SETTING, SIZES, digit_sums, pretrained, trained
from experiments_claims import Claim, figure

from quietstar import OfflineThoughts, QuietStar, export_thoughts
from quietstar.data.filtering import ThoughtFilter
from quietstar_recipes.common.plots import Panel, panels

TITLE = "RLP: rewarded thoughts alone"
RLP, BEFORE, OFFLINE, PLAIN = "rlp", "before training", "offline thoughts", "plain training, no thoughts"
ANOTHER, RANDOM = "rlp, another line's thoughts", "rlp, random digits as thoughts"
RUNS = (RLP, OFFLINE, BEFORE, ANOTHER, RANDOM, PLAIN)
CLAIMS = (
    Claim(
        "RLP learns thoughts that lead to the answer, and better ones than the best of those sampled once.",
        RLP,
        (BEFORE, ANOTHER, RANDOM, PLAIN, OFFLINE),
    ),
)
FIELDS: dict[str, Any] = {"preset": "rlp", "thought_start": "", "thought_end": "", "anchors": "all", "policy_weight": 1.0}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    model, _ = pretrained(seed, size)
    numbers = SIZES[size]
    strings, held_out = digit_sums.split_strings(seed)
    digits = held_out[: numbers["lines"]]
    generator = torch.Generator().manual_seed(seed)
    drawn = digit_sums.draw(strings, SETTING.lines * numbers["steps"], generator)
    lines = digit_sums.DirectLines(drawn, SETTING)

    before = digit_sums.think_with(model, SETTING, seed, **FIELDS)
    export_thoughts(before.train(), lines, out / "thoughts.jsonl", seed, SETTING.lines, wanted=ThoughtFilter(keep=1))
    before.thought_config = replace(before.thought_config, thoughts=1, advantage="relu")
    kept = OfflineThoughts(out / "thoughts.jsonl", lines, before)
    offline = trained(model, kept, seed, out / "offline", **FIELDS | {"thoughts": 1, "advantage": "relu"})
    rlp = trained(model, lines, seed, out / "rlp", **FIELDS)

    found = {RLP: rlp, OFFLINE: offline, BEFORE: before.eval()}
    thoughts = {name: digit_sums.own_thoughts(qs, digits) for name, qs in found.items()}
    rows: list[dict[str, Any]] = [{"run": name, **measured(qs, digits, thoughts[name])} for name, qs in found.items()]
    for row in rows:
        row["right_thoughts"] = digit_sums.right_thoughts(thoughts[row["run"]], digits)
    rows[1]["kept_right"] = right_of_kept(kept, drawn)
    own = thoughts[RLP]
    others = {ANOTHER: own.roll(1, 0), RANDOM: torch.randint(10, own.shape, generator=generator)}
    rows += [{"run": name, **measured(rlp, digits, ids)} for name, ids in others.items()]
    plain = digit_sums.train_plain(model, replace(SETTING, steps=numbers["steps"]), strings, digits, seed)["sampled"]
    return {"rows": [*rows, {"run": PLAIN, "accuracy": plain["right"] / plain["lines"], "loss": plain["nll"]}]}


def right_of_kept(kept: OfflineThoughts, digits: torch.Tensor) -> float | None:
    """Of the kept thoughts about these lines, how many are all four running sums; None if none is kept."""
    pairs = [(x["thought_ids"], sums) for x, sums in zip(kept, digit_sums.running_sums(digits), strict=True)]
    right = [bool((ids[0, 0] == sums).all()) for ids, sums in pairs if len(ids)]
    return fmean(right) if right else None


def measured(qs: QuietStar, digits: torch.Tensor, thoughts: torch.Tensor) -> dict[str, float]:
    score = digit_sums.score(digit_sums.predict(qs, digits, thoughts).mixed, digits)
    return {"accuracy": score["right"] / score["lines"], "loss": score["nll"]}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def bars(column: str) -> dict[str, list[float]]:
        return {name: [figure(result, name, column) for result in results] for name in RUNS}

    both = [Panel("accuracy on held-out lines", "", bars=bars("accuracy")), Panel("loss, nats", "", bars=bars("loss"))]
    panels(path, TITLE, both)
    return "Accuracy and loss of the answer on held-out lines; each dot is a seed"
