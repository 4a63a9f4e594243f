"""Thoughts within a written chain. A line is five digits and a chain of two sums, as in `4 1 9 3 5 = 7 2`: the last digit of
the sum of four, then of all five, the answer. The first step needs three additions, which the text sometimes makes in an aside,
as in `= - 5 4 7 - 7 2`; the second is one addition more, which the model writes without help.

The model writes chains without thoughts and, after Quiet-STaR on lines without asides, with a thought of three tokens before
each step. The control is plain training on as many lines without asides, four times the batch. Of 8 chains, sampled at
temperature 1, accuracy is that of their answers, and the vote is for the answer most of them have.

Without thoughts the base is at chance. So this is not the paper's question, whether a model that already reasons gains more by
a vote. The base's own thoughts, untrained, with a trained mixing head, are not among the controls.

Where the second step also needs a thought, as in `4 1 9 3 5 = 4 2`, it depends on the seed. A model whose text has asides
before both steps may learn to write the second one only after the first, which is not there when it thinks. The log has more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digit_thoughts import SETTING, digit_sums, trained
from experiments_claims import Claim, figure
from torch import Tensor

from quietstar.config import TrainConfig
from quietstar.run.batches import Example
from quietstar_recipes.common.plots import Panel, panels

TITLE = "Quiet-STaR: thoughts within a chain"
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining and of training thoughts, lines to measure on
    "tiny": {"pretraining": 2, "steps": 2, "lines": 20},
    "quick": {"pretraining": 1000, "steps": 100, "lines": 512},
}
VOTERS = 8
SUMS = (2, 3)  # of the running sums, those that a chain writes
TOKENS = 3  # of an aside and of a thought: the first running sums
ANCHORS = (digit_sums.AT_EQUALS, digit_sums.AT_EQUALS + 1)  # before the two steps
THINKING, BASE, PLAIN = "thoughts", "no thoughts, before training", "no thoughts, as many updates, 4 times the batch"
CLAIMS = (
    Claim(
        f"With thoughts before the steps of written chains, a vote of {VOTERS} is right more often.",
        THINKING,
        (BASE, PLAIN),
        "vote",
    ),
)


def chain_lines(digits: Tensor) -> Tensor:
    """d d d d d = c c and a newline, [lines,9]."""
    direct = digit_sums.direct_lines(digits)
    return torch.cat([direct[:, :-2], digit_sums.running_sums(digits)[:, SUMS], direct[:, -1:]], 1)


def text(digits: Tensor, generator: torch.Generator) -> Tensor:
    """The text to pretrain on, [lines,14]: chains, 60 % with an aside, of which 40 % help and the others repeat digits."""
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    asides = torch.where(luck < digit_sums.HELPFUL, digit_sums.running_sums(digits), digits[:, : digit_sums.STEPS])
    plain, dash = chain_lines(digits), digit_sums.column(digits, digit_sums.DASH)
    fill = digit_sums.column(digits, digit_sums.PAUSE).expand(-1, TOKENS + 2)
    aside = torch.cat([plain[:, :6], dash, asides[:, :TOKENS], dash, plain[:, 6:]], 1)
    return torch.where(kind < digit_sums.DIRECT, torch.cat([plain, fill], 1), aside)


class Lines(Sequence[Example]):
    """Chains without asides, for the training loop, with a thought before each step."""

    def __init__(self, digits: Tensor):
        self.ids = chain_lines(digits)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return {"input_ids": self.ids[index], "anchors": torch.tensor(ANCHORS)}


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    strings, held_out = digit_sums.split_strings(seed)
    digits = held_out[: numbers["lines"]]
    generator = torch.Generator().manual_seed(seed)
    model = digit_sums.new_model(seed)
    read(model, lambda: text(digit_sums.draw(strings, 128, generator), generator), numbers["pretraining"], 3e-3)
    plain = copy.deepcopy(model)
    batch = 4 * SETTING.lines
    read(plain, lambda: chain_lines(digit_sums.draw(strings, batch, generator)), numbers["steps"], 1e-3)
    lines = Lines(digit_sums.draw(strings, SETTING.lines * numbers["steps"], generator))
    qs = trained(model, lines, seed, out, thought_tokens=TOKENS)
    rows = [
        {"run": BASE, **written(model, digits, seed)},
        {"run": PLAIN, **written(plain, digits, seed)},
        {"run": THINKING, **written(qs, digits, seed, seed=seed)},
    ]
    return {"rows": rows}


def read(model: Any, lines: Any, steps: int, peak: float) -> None:
    """Plain training in place."""
    config = TrainConfig(learning_rate=peak, steps=steps, schedule="cosine")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    digit_sums.train_lm(model, lambda _: lines(), optimizer, config.rate, steps)


@torch.no_grad()
def written(model: Any, digits: Tensor, draws: int, **options: Any) -> dict[str, float]:
    """Figures of chains that a model continues lines with, greedy and sampled."""
    prompts = chain_lines(digits)[:, : ANCHORS[0] + 1]
    answers = digit_sums.running_sums(digits)[:, -1]
    model.eval()
    options = {"max_new_tokens": len(SUMS), "attention_mask": torch.ones_like(prompts), **options}
    greedy = model.generate(prompts, do_sample=False, **options)[:, -1]
    torch.manual_seed(draws)
    sampled = model.generate(prompts, do_sample=True, top_k=0, num_return_sequences=VOTERS, **options)[:, -1]
    votes = sampled.unflatten(0, (-1, VOTERS)).mode(1).values
    several = answers.repeat_interleave(VOTERS)
    found = {"greedy": greedy == answers, "accuracy": sampled == several, "vote": votes == answers}
    return {name: float(right.float().mean()) for name, right in found.items()}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    runs = {"before training": BASE, "plain training": PLAIN, "thoughts": THINKING}

    def bars(name: str) -> dict[str, list[float]]:
        return {label: [figure(result, run, name) for result in results] for label, run in runs.items()}

    shown = {"accuracy": "single chains, accuracy", "vote": f"votes of {VOTERS}, accuracy"}
    panels(path, TITLE, [Panel(label, "", bars=bars(name)) for name, label in shown.items()])
    return "Share of right answers of single chains and of votes; dots are seeds"
