"""Fast Quiet-STaR shortens thoughts from six tokens to four, three and two. Each stage continues from the previous one. The
control trains with two tokens from the start, for as many updates. A last stage should then move what was learnt into a plain
model that never thinks; its control is plain training for as many updates.

Down to three tokens nothing is lost. At two, the curriculum is no better than two tokens from the start: one seed of three
finds its own way to think in two tokens, and finds it sooner when it starts with two. The result of the last stage is negative.
The published loss rewards a token only where the plain model predicts it better than the thinking model does, so it teaches
nothing that thoughts are good for. This is not because the sum is out of a plain model's reach: where the answer is the sum of
only the first two digits, plain training learns it and the published loss doesn't.

The text is the digit sums of examples/digit_sums.py, which need a thought. The loss is that of the answer on held-out lines,
where a guess has 2.30 nats. Two tokens are too few for the running sums that the text shows.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_checks import figure, least, most

from quietstar import QuietStar, ThoughtConfig
from quietstar.files.reading import json_lines
from quietstar.recipes import fast_plain as plain
from quietstar.recipes.common.plots import Panel, panels
from quietstar.recipes.fast import BEST, Config, fast, stages
from quietstar.run.batches import Example

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import sums as digit_sums  # noqa: E402, of examples

TITLE = "Shorter thoughts, then none"
CURRICULUM = "6-1,4-1,3-1,2-1"
TOKENS = [T for T, _ in stages(CURRICULUM)]
DIRECT = {"tiny": (2,), "quick": (2,), "full": (6, 4, 3, 2)}  # tokens of thoughts that don't become shorter
PLAIN = {"the published loss": "sampled", "the text's token": "observed", "plain training": "likelihood"}
SUM, FIRST = "sum of five", "sum of the first two"  # of the digits: the answer
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining, of a stage and of the plain model; lines to measure on
    "tiny": {"pretraining": 2, "stage": 2, "plain": 2, "lines": 20},
    "quick": {"pretraining": 600, "stage": 100, "plain": 150, "lines": 1024},
    "full": {"pretraining": 600, "stage": 300, "plain": 300, "lines": 2048},
}


@dataclass
class Text:
    """Lines to train on and held-out ones, as the recipe takes them, and the digits of the held-out lines."""

    training: Sequence[Example]
    held_out: Sequence[Example]
    digits: torch.Tensor

    @property
    def answers(self) -> torch.Tensor:
        return torch.stack([line["input_ids"][digit_sums.AT_EQUALS + 1] for line in self.held_out])


def make_text(seed: int, lines: int, steps: int, answer: str) -> Text:
    training, test = digit_sums.split_strings(seed)
    generator = torch.Generator().manual_seed(seed)
    digits = digit_sums.draw(training, 64 * steps, generator), test[:lines]
    both = [digit_sums.DirectLines(x, digit_sums.EQUALS_ONLY, "own", generator) for x in digits]
    for some, x in zip(both, digits, strict=True) if answer == FIRST else ():
        some.tensors["input_ids"][:, digit_sums.AT_EQUALS + 1] = digit_sums.running_sums(x)[:, 0]
    return Text(*both, digits[1])


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    model, gate = digit_sums.pretrain(*digit_sums.split_strings(seed), seed, numbers["pretraining"])
    text, easier = (make_text(seed, numbers["lines"], numbers["stage"], answer) for answer in (SUM, FIRST))
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
    _, report = fast(model, text.training, text.held_out, thoughts, config, resume=True)
    times = {x["thought_tokens"]: x["times_plain"] for x in report["speeds"]}
    rows: list[dict[str, Any]] = [{"run": "base", "loss": report["base"], "accuracy": right(model, text), "times_plain": 1.0}]

    def add(run: str, found: dict[str, Any], folder: Path) -> None:
        """Add the row of a stage."""
        accuracy = right_with_thoughts(QuietStar.from_pretrained(folder / BEST), text)
        rows.append({"run": run, "loss": found["mixed"], "accuracy": accuracy, "times_plain": times[found["thought_tokens"]]})

    for i, stage in enumerate(report["stages"]):
        add(f"curriculum, {TOKENS[i]} tokens", stage, out / "curriculum" / f"stage-{i + 1}-{TOKENS[i]}-1")
    as_long = replace(config, steps=len(TOKENS) * config.steps, eval_every=len(TOKENS) * config.eval_every, plain_steps=1)
    for T in DIRECT[size]:
        own = replace(as_long, out=str(out / f"direct-{T}"), curriculum=f"{T}-1")
        _, alone = fast(model, text.training, text.held_out, thoughts, own, resume=True)
        add(f"{T} tokens from the start", alone["stages"][0], out / f"direct-{T}" / f"stage-1-{T}-1")

    shortest = replace(config, out=str(out / "easier"), curriculum="2-1", steps=max(1, config.steps // 2))
    fast(model, easier.training, easier.held_out, thoughts, shortest, resume=True)
    curves = {}
    for answer, some, settings in ((SUM, text, config), (FIRST, easier, shortest)):
        (folder,) = Path(settings.out).glob("stage-*-2-1")
        teacher = QuietStar.from_pretrained(folder / BEST)
        for name, objective in PLAIN.items():  # ``fast`` has trained the first of them already
            other = {"out": f"{settings.out}-{objective}", "objective": objective}
            own = replace(settings, **other if objective != settings.objective else {})
            row, curves[f"{answer}, {name}"] = without_thoughts(model, teacher, some, own)
            rows.append({"run": f"{answer}, no thoughts, {name}", **row})
    return {"rows": rows, "pretraining_passed": gate["passed"], "plain": curves}


def without_thoughts(
    model: Any, teacher: QuietStar, text: Text, config: Config
) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """The plain model: loss and accuracy of its best checkpoint, loss at the end, and share of tokens with a reward."""
    best, loss = plain.train(copy.deepcopy(model), teacher, text.training, text.held_out, config)
    lines = [line for _, line in json_lines(Path(config.out) / plain.PLAIN / "metrics.jsonl")]
    curve = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    row = {"loss": loss, "accuracy": right(best, text), "times_plain": 1.0, "loss_at_the_end": curve[-1][1]}
    return row | {"rewarded": fmean(line["rewarded"] for line in lines)}, curve


@torch.no_grad()
def right(model: Any, text: Text) -> float:
    """The share of held-out lines for which the answer is a plain model's most likely token."""
    logits, answers, _ = plain.predictions(model.eval(), [text.held_out[i] for i in range(len(text.held_out))])
    return float((logits.argmax(-1) == answers).float().mean())


def right_with_thoughts(qs: QuietStar, text: Text) -> float:
    found = digit_sums.predict(qs.eval(), text.digits, digit_sums.own_thoughts(qs, text.digits))
    return float((found.mixed[:, 0].argmax(-1) == text.answers).float().mean())


def check(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def loss(run: str) -> list[float]:
        return [figure(result, run, "loss") for result in results]

    def less(run: str, other: str) -> list[float]:
        return [y - x for x, y in zip(loss(run), loss(other), strict=True)]

    published, likelihood = ({answer: f"{answer}, no thoughts, {name}" for answer in (SUM, FIRST)} for name in list(PLAIN)[::2])
    return [
        least(
            "two tokens, nats less after the curriculum than from the start",
            less("curriculum, 2 tokens", "2 tokens from the start"),
            0.02,
        ),
        most("six tokens, loss", loss("curriculum, 6 tokens"), 0.6),
        least("negative: plain training, nats less than the published loss", less(likelihood[SUM], published[SUM]), 0.02),
        most("the sum of the first two digits is in reach: plain training, loss", loss(likelihood[FIRST]), 0.2),
        least("negative there too: plain training, nats less", less(likelihood[FIRST], published[FIRST]), 0.02),
        most(
            "share of tokens that the published loss rewards there",
            [figure(result, published[FIRST], "rewarded") for result in results],
            0.05,
        ),
    ]


def plot(results: list[dict[str, Any]], path: Path) -> str:
    measured = {row["run"] for row in results[0]["rows"]}
    ways = {"curriculum": "curriculum, {} tokens", "from the start": "{} tokens from the start", "base": "base"}
    ways |= {f"no thoughts, {name}": f"{SUM}, no thoughts, {name}" for name in list(PLAIN)[::2]}

    def curves(across: str, up: str) -> dict[str, Any]:
        """For each way of training, its points over the lengths of thoughts that were measured."""
        found: dict[str, Any] = {}
        for name, form in ways.items():
            runs = [run for run in dict.fromkeys(form.format(T) for T in TOKENS) if run in measured]
            found[name] = [[point(result, run, across, up) for run in runs] for result in results]
        return found

    tokens = "tokens of a thought"
    panels(
        path,
        TITLE,
        [
            Panel(tokens, "loss of the answer, nats", curves(tokens, "loss")),
            Panel(tokens, "accuracy", curves(tokens, "accuracy")),
            Panel("seconds a token, times those without thoughts", "accuracy", curves("times_plain", "accuracy")),
            Panel(
                "update of the plain model",
                "loss of the answer, nats",
                {name: [result["plain"][name] for result in results] for name in results[0]["plain"]},
            ),
        ],
    )
    return (
        "Loss and accuracy of the answer on held-out lines against the length of thoughts and against their cost, and the "
        "plain model's loss during training; thin lines are seeds, thick lines their mean"
    )


def point(result: dict[str, Any], run: str, across: str, up: str) -> tuple[float, float]:
    number = next((word for word in run.split() if word.isdigit()), "0")
    return float(number) if across.startswith("tokens") else figure(result, run, across), figure(result, run, up)
