"""Thoughts of six tokens, then four, three and two, each stage from the one before (Fast Quiet-STaR), against as many updates
with two from the start; and the plain model that is trained against the last stage's losses, against plain training.

The digit sums of examples/digit_sums.py, which need a thought: the loss is that of the answer on held-out lines, where a guess
has 2.30 nats. Two tokens are too few for the running sums that the text shows.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments_checks import figure, least, most

from quietstar import QuietStar, ThoughtConfig
from quietstar.recipes import plain
from quietstar.recipes.fast import BEST, Config, fast, stages

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import digit_sums  # noqa: E402, of examples

TITLE = "Shorter thoughts, then none"
CURRICULUM, DIRECT = "6-1,4-1,3-1,2-1", "2-1"
PLAIN = {"the published loss": "sampled", "the text's token": "observed", "plain training": "likelihood"}
SIZES: dict[str, dict[str, int]] = {  # steps of the pretraining, of a stage, of the plain model; lines to measure on
    "tiny": {"pretraining": 2, "stage": 2, "plain": 2, "lines": 20},
    "quick": {"pretraining": 600, "stage": 100, "plain": 150, "lines": 1024},
    "full": {"pretraining": 600, "stage": 300, "plain": 300, "lines": 2048},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    training, test = digit_sums.split_strings(seed)
    model, gate = digit_sums.pretrain(training, test, seed, numbers["pretraining"])
    setting = digit_sums.EQUALS_ONLY
    generator = digit_sums.torch.Generator().manual_seed(seed)
    digits = digit_sums.draw(training, 64 * numbers["stage"], generator)
    data, held_out = (digit_sums.DirectLines(x, setting, "own", generator) for x in (digits, test[: numbers["lines"]]))
    thoughts = ThoughtConfig(thoughts=4, policy_weight=3.0, embedding_scale=1.0, embedding_init=digit_sums.DASH)
    config = Config(
        out=str(out / "curriculum"),
        curriculum=CURRICULUM,
        steps=numbers["stage"],
        batch_size=64,
        learning_rate=1e-3,
        eval_every=max(1, numbers["stage"] // 5),
        save_every=numbers["stage"],
        plain_steps=numbers["plain"],
        plain_rate=1e-3,
        plain_weight=1.0,
        seed=seed,
    )
    _, report = fast(model, data, held_out, thoughts, config, resume=True)
    rows = [{"run": "base", "loss": report["base"]}]
    names = [f"curriculum, {T} tokens" for T, _ in stages(CURRICULUM)]
    rows += [{"run": name, "loss": stage["mixed"]} for name, stage in zip(names, report["stages"], strict=True)]

    longer = {"steps": numbers["stage"] * len(names), "curriculum": DIRECT, "plain_steps": 1}
    _, alone = fast(model, data, held_out, thoughts, replace(config, out=str(out / "direct"), **longer), resume=True)
    rows.append({"run": "2 tokens from the start", "loss": alone["stages"][0]["mixed"]})

    teacher = QuietStar.from_pretrained(out / "curriculum" / f"stage-{len(names)}-2-1" / BEST)
    for name, objective in PLAIN.items():
        own = replace(config, out=str(out / objective), objective=objective)
        _, loss = plain.train(copy.deepcopy(model), teacher, list(data), list(held_out), own)
        rows.append({"run": f"without thoughts, {name}", "loss": loss})
    return {"rows": rows, "pretraining_passed": gate["passed"], "losses": [stage["mixed"] for stage in report["stages"]]}


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def less(run: str, other: str) -> list[float]:
        return [figure(result, other, "loss") - figure(result, run, "loss") for result in results]

    shorter = less("curriculum, 2 tokens", "2 tokens from the start")
    published, likelihood = (f"without thoughts, {name}" for name in ("the published loss", "plain training"))
    return [
        least("two tokens, nats less behind the curriculum than from the start", shorter, 0.02),
        most("six tokens, loss", [figure(result, "curriculum, 6 tokens", "loss") for result in results], 0.6),
        least("without thoughts, published loss, nats less than plain training", less(published, likelihood), 0.0),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    from experiments_plot import lines

    tokens = [T for T, _ in stages(CURRICULUM)]
    curves = {"curriculum": [result["losses"] for result in results]}
    for name in ("base", "2 tokens from the start"):
        curves[name] = [[figure(result, name, "loss")] * len(tokens) for result in results]
    lines(path, tokens, curves, "tokens of a thought", "loss of the answer on held-out lines, nats", TITLE)
    return "Loss of the answer against the length of thoughts, stage after stage, every seed thin and their mean thick"
