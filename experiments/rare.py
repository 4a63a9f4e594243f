"""Digit sums whose answer comes third, as in `4 1 9 3 5 = 4 1 2`. It follows a copy of two digits, which needs no thought, so
only a look-ahead of three tokens rewards a thought. Of the asides in the text only 20, 10 or 2 % help, as in `= - 5 4 7 2 - 4 1
2`; the others repeat the digits.

What decides is whether the model knows the steps, not how often it writes them. Where the text had 10 % all along, the model
had not learnt the steps, and there was nothing to reward. Two things were enough to learn them: a warm start of 512 written-out
asides, half of each batch for 500 steps, or a text that had 40 % first and less later ("learnt, then"). From there the
published recipe is enough at 20 and 10 %, and in the seed shown also at 2 %. In an earlier run of three seeds, of which only
the means are kept ([what thinking does](results.md#what-thinking-does-and-what-it-doesnt)), one seed of three was not done
after a hundred steps at 2 %.

Thoughts are at "=" only, 4 of 4 tokens, weight 3, on lines without asides. "Steps known" is the lowest probability of a right
step after right ones, and "answer known" that of the answer after all of them. "Right before" and "right after" are the shares
of right thoughts, sampled before training and greedy after it. Rehearsal adds 64 lines of the text to each step.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import rare_text
import torch
from digit_thoughts import SETTING, digit_sums, trained
from experiments_claims import figure
from transformers import LlamaForCausalLM

from quietstar.training import thought_loss
from quietstar_recipes.common.plots import Panel, panels

TITLE = "Quiet-STaR: rare asides, late answers"
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining, of what may follow it, of training thoughts; lines to measure on
    "tiny": {"pretraining": 2, "longer": 2, "warm": 2, "share": 2, "steps": 2, "lines": 20},
    "quick": {"pretraining": 1200, "longer": 300, "warm": 500, "share": 100, "steps": 100, "lines": 1024},
    "full": {"pretraining": 1200, "longer": 300, "warm": 500, "share": 100, "steps": 100, "lines": 2048},
}
ASIDES = 512  # in the warm start
ALWAYS, WARM = "10 % always", "10 % always, warm start"
LEARNT = {0.2: "learnt, then 20 %", 0.1: "learnt, then 10 %", 0.02: "learnt, then 2 %"}
PUBLISHED, NEXT, REHEARSAL, NO_REWARD = "published", "look-ahead 1", "rehearsal", "rehearsal, no reward"
SHUFFLED, PLAIN = "another line's thoughts", "no thoughts, 4 times the batch"
Runs = dict[str, dict[str, Any]]  # what is done with a model, and the fields of ThoughtConfig for it
RUNS: dict[str, Runs] = {
    ALWAYS: {PUBLISHED: {}},
    WARM: {PUBLISHED: {}, NO_REWARD: {"policy_weight": 0.0}},
    LEARNT[0.2]: {PUBLISHED: {}},
    LEARNT[0.1]: {PUBLISHED: {}, NEXT: {"lookahead": 1}, REHEARSAL: {}, NO_REWARD: {"policy_weight": 0.0}},
    LEARNT[0.02]: {PUBLISHED: {}, "z-score": {"advantage": "zscore"}},
}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    strings, held_out = digit_sums.split_strings(seed)
    numbers = SIZES[size]
    digits = held_out[: numbers["lines"]]
    generator = torch.Generator().manual_seed(seed)
    lines = digit_sums.draw(strings, SETTING.lines * numbers["steps"], generator)
    examples = rare_text.examples(lines)
    rows = []
    for name, (model, share) in models(seed, size).items():
        known = rare_text.knowledge(model, digits, seed)
        for what, fields in RUNS[name].items():
            loss = rare_text.with_rehearsal(strings, share) if REHEARSAL in what else thought_loss
            qs = trained(model, examples, seed, out / f"{name}-{what}", loss, **({"lookahead": rare_text.LOOKAHEAD} | fields))
            thoughts = digit_sums.own_thoughts(qs, digits)
            right = digit_sums.right_thoughts(thoughts, digits)
            rows.append({"run": f"{name}: {what}", **known, "right_after": right, **rare_text.answers(qs, digits, thoughts)})
            if name == LEARNT[0.1] and what == PUBLISHED:
                rows.append({"run": f"{name}: {SHUFFLED}", **known, **rare_text.answers(qs, digits, thoughts.roll(1, 0))})
        if name == LEARNT[0.1]:
            rare_text.read_direct(model, strings, numbers["steps"], seed)
            rows.append({"run": f"{name}: {PLAIN}", **known, **rare_text.plain_answers(model, digits)})
    return {"rows": rows}


def models(seed: int, size: str) -> dict[str, tuple[LlamaForCausalLM, float]]:
    """The models from which thoughts are trained, by name, each with the share of helpful asides in the text it read last."""
    strings, held_out = digit_sums.split_strings(seed)
    numbers = SIZES[size]
    digits = held_out[: numbers["lines"]]

    def after(model: LlamaForCausalLM, share: float, stage: str, peak: float, asides: int = 0) -> LlamaForCausalLM:
        model = copy.deepcopy(model)
        rare_text.read(model, strings, share, numbers[stage], peak, seed, asides)
        return model

    always = after(digit_sums.new_model(seed), 0.1, "pretraining", 3e-3)
    learnt = rare_text.learnt(strings, digits, seed, numbers["pretraining"], numbers["longer"])
    found = {ALWAYS: (always, 0.1), WARM: (after(always, 0.1, "warm", 3e-3, ASIDES), 0.1)}
    return found | {name: (after(learnt, share, "share", 1e-3), share) for share, name in LEARNT.items()}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def measured(key: str) -> dict[str, list[list[tuple[float, float]]]]:
        """For each model, a point per seed."""

        def point(result: dict[str, Any], run: str) -> tuple[float, float]:
            return figure(result, run, key), figure(result, run)

        return {name: [[point(result, f"{name}: {PUBLISHED}")] for result in results] for name in RUNS}

    known, written = measured("steps_known"), measured("right_before")
    panels(
        path,
        TITLE,
        [Panel("probability of a right step, before", "accuracy", known), Panel("right thoughts, before", "accuracy", written)],
    )
    return "Accuracy after the published recipe against what each model could do before; each pale dot is a seed"
