"""How far ahead must a reward look, and how long must a thought be? The answer of these digit sums comes third, as in
`4 1 9 3 5 = 4 1 2`, after a copy of two digits that needs no thought. So a look-ahead of three tokens is the first that reaches
it, and thoughts of four tokens have room for the four running sums, the last of which is the answer. With both, three seeds of
five learn nearly every answer, one learns half and one nothing.

Quiet-STaR learns with each look-ahead and each length from the same model, at "=" only, 4 thoughts, 100 steps of 64 lines.
Accuracy and loss are those of the answer, with the held-out line's own greedy thought. The gain over the same model without a
thought has two parts: "mixing" is what another line's thought gains, and "content" what the own one gains over that. Untrained
thoughts with a trained mixing head are not among the controls.

Room for the steps is not enough: in the ablations, one seed, three and six tokens learn nothing with a look-ahead of 3 or 4,
and four tokens nearly all; with six it depends on the seed (log). Where the answer comes first, three and six are enough
(doses). Where the text has such asides, the sixth token is the copy's first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rare_text
import torch
from digit_thoughts import SETTING, digit_sums, trained
from experiments_claims import Claim

from quietstar.run.batches import Example
from quietstar_recipes.common.plots import Panel, panels

TITLE = "Quiet-STaR: look-ahead and length"
LOOKAHEADS = {"tiny": (1, 2, 3, 4), "quick": (2, 3), "full": (1, 2, 3, 4)}
TOKENS = {"tiny": (2, 4), "quick": (2, 4), "full": (2, 3, 4, 6)}
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining, and as often more as needed; of training; lines to measure on
    "tiny": {"pretraining": 2, "longer": 2, "steps": 2, "lines": 20},
    "quick": {"pretraining": 1200, "longer": 300, "steps": 100, "lines": 1024},
    "full": {"pretraining": 1200, "longer": 300, "steps": 100, "lines": 2048},
}
REACHED = "look-ahead 3, 4 tokens"
CLAIMS = (
    Claim(
        "Thoughts of four tokens with a look-ahead that reaches the answer learn more than with two tokens or a shorter one.",
        REACHED,
        ("look-ahead 2, 4 tokens", "look-ahead 3, 2 tokens", "look-ahead 2, 2 tokens"),
    ),
)


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    strings, held_out = digit_sums.split_strings(seed)
    numbers = SIZES[size]
    digits = held_out[: numbers["lines"]]
    model = rare_text.learnt(strings, digits, seed, numbers["pretraining"], numbers["longer"])
    generator = torch.Generator().manual_seed(seed)
    lines = padded(rare_text.examples(digit_sums.draw(strings, SETTING.lines * numbers["steps"], generator)))
    rows = []
    for J in LOOKAHEADS[size]:
        for T in TOKENS[size]:
            qs = trained(model, lines, seed, out / f"{J}-{T}", lookahead=J, thought_tokens=T)
            rows.append({"run": f"look-ahead {J}, {T} tokens", "lookahead": J, "tokens": T, **measured(qs, digits)})
    return {"rows": rows}


def padded(examples: list[Example]) -> list[Example]:
    """The lines with one token of padding, so that "=" isn't the last place with four targets, which REINFORCE leaves out."""
    found = []
    for line in examples:
        ids = torch.cat([line["input_ids"], torch.tensor([digit_sums.PAUSE])])
        found.append({**line, "input_ids": ids, "attention_mask": (ids != digit_sums.PAUSE).long()})
    return found


def measured(qs: Any, digits: torch.Tensor) -> dict[str, float]:
    """Accuracy and loss of the answer, and both parts of its gain over this model without a thought, nats."""
    thoughts = digit_sums.own_thoughts(qs, digits)
    own, another = (rare_text.answers(qs, digits, ids) for ids in (thoughts, thoughts.roll(1, 0)))
    base = rare_text.plain_answers(qs.model, digits)["loss"]
    return own | {"mixing": base - another["loss"], "content": another["loss"] - own["loss"]}


def worth(row: dict[str, Any]) -> float:
    """Another line's thoughts mislead a model that trusts its own, so content alone exceeds what there is to gain."""
    return min(row["content"], row["mixing"] + row["content"])


def plot(results: list[dict[str, Any]], path: Path) -> str:
    def curves(value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        lengths = dict.fromkeys(row["tokens"] for row in results[0]["rows"])
        return {
            f"{T} tokens": [[(row["lookahead"], value(row)) for row in x["rows"] if row["tokens"] == T] for x in results]
            for T in lengths
        }

    ahead = "look-ahead, tokens"
    accuracy = Panel(ahead, "accuracy", curves(lambda row: row["accuracy"]), share=True)
    panels(path, TITLE, [accuracy, Panel(ahead, "gain or its content, the smaller, nats", curves(worth))])
    return (
        "Accuracy of the answer, and its gain or the gain's content, the smaller, against the look-ahead, by the tokens of a "
        "thought; thin lines are seeds"
    )
