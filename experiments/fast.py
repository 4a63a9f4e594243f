"""Thoughts that become shorter in stages reach the answer in two of five fresh seeds, where thoughts as short from the start do
in none; in the other three, thoughts are lost in the first stage. A model that never thinks learns what a thinking one
predicts, but plain training on the text teaches it as much, and the published reward nothing.

Fast Quiet-STaR makes thoughts shorter from stage to stage, here from eight tokens to four. Each stage continues from the
previous one. The control has thoughts of four tokens from the start, for as many updates at the same learning rate. The text
that the base is pretrained on writes every running sum twice and leaves out a first copy now and then. So it thinks in eight
tokens, and almost none of the four-token thoughts that it samples has all sums. Each stage of the curriculum asks for one token
less. What is left at four tokens does not have all sums; where no stage was lost, it is mostly right all the same.

Every stage is a race, since lines without an aside make the model forget how to write one. On the fresh seeds it is decided
within thirty updates of the first stage (the `metrics.jsonl` that the run writes there). In updates 21 to 30 the mean reward of
a thought is 0.60 and 0.67 nats where the stage is won, and 0.02, 0.04 and 0.08 where it is lost; then all thoughts about a line
earn the same and the loss goes back to that of a guess. In the first ten updates, when hardly anything is learnt, it was
already 0.016 and 0.017 where the stage is won, and 0.010, 0.010 and 0.014 where it is lost. The policy weight, 30, and the
learning rate, 5e-4, were chosen on three seeds, too few: there weight 10 and 1e-3 lost two. Of these two are kept. Seed 1 ends
at 0.81. Seed 0 ended at 0.93 in a run that is in the log alone, and at 0.25 in the ablations with the same settings, lost in
the last stage: the seed alone does not decide either.

In a last step a plain model that never thinks learns from one that does. Here the answer is the sum of only the first two
digits, which is within a plain model's reach. The plain model starts as the base, as in the released script, or as the
checkpoint with its thoughts left out, as in the paper by a summary of it. Distilling trains it on the thinking model's
predictions, and works from either. The published loss rewards a token only where the plain model predicts it better than the
thinking model does, so it teaches nothing that thoughts are good for: almost no token is rewarded, and the best model is the
start. The paper's formula, by that summary, also has rewards below zero. These make the text's tokens less likely where the
thinking model is better, so the loss only grows. Plain training on the text alone does as well as distilling. The thinking
model is not needed on this problem; what the comparison shows is what each loss can carry over.

The loss is that of the answer on held-out lines, where a guess has 2.30 nats. Checkpoints are chosen by other held-out lines.
Complete thoughts are those with all running sums in order; a short one can do without some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import fast_text
import torch
from digit_thoughts import digit_sums
from experiments_claims import Claim, figure
from torch import Tensor

from quietstar import QuietStar, ThoughtConfig
from quietstar.files.reading import json_lines
from quietstar.run.batches import Example
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.fast import plain
from quietstar_recipes.fast.run import BEST, Config, fast, stages

TITLE = "Shorter thoughts, then none"
CURRICULUM = "8-1,7-1,6-1,5-1,4-1"
TOKENS = [T for T, _ in stages(CURRICULUM)]
SHORTEST = TOKENS[-1]
DIRECT = f"{SHORTEST} tokens from the start"
SIZES: dict[str, dict[str, int]] = {  # steps of pretraining, of a stage and of the plain model; lines to choose and measure by
    "tiny": {"pretraining": 1, "stage": 1, "plain": 1, "valid": 4, "test": 20},
    "quick": {"pretraining": 600, "stage": 150, "plain": 100, "valid": 256, "test": 1024},
    "full": {"pretraining": 600, "stage": 150, "plain": 300, "valid": 256, "test": 2048},
}

# The last step, on the sum of the first two digits: what the plain model starts as, and what it learns from.
BASE, THINKING, CHECKPOINT = "first two, base", "first two, thinking", "first two, the checkpoint as it is"
PUBLISHED, DISTILLED = "first two, published loss", "first two, distilled"
PLAIN = "first two, plain training"
LAST: dict[str, dict[str, Any]] = {
    PUBLISHED: {"objective": "sampled"},
    DISTILLED: {"objective": "distil"},
    PLAIN: {"objective": "likelihood"},
}
MORE: dict[str, dict[str, Any]] = {  # of size full
    "first two, checkpoint and published loss": {"objective": "sampled", "plain_start": "curriculum"},
    "first two, checkpoint and paper's formula": {"objective": "observed", "plain_start": "curriculum", "clamp_reward": False},
    "first two, checkpoint distilled": {"objective": "distil", "plain_start": "curriculum"},
}
CLAIMS = (
    Claim(
        "Thoughts that become shorter step by step still reach the answer where thoughts as short from the start don't.",
        f"curriculum, {SHORTEST} tokens",
        (DIRECT, "base"),
    ),
    Claim(
        "A model that never thinks learns more from the predictions of one that does than by the published reward or plainly.",
        DISTILLED,
        (BASE, PUBLISHED, PLAIN),
    ),
)


@dataclass
class Text:
    """Lines to train on, held-out lines to choose checkpoints by, and others to measure on, with their answers [lines]."""

    training: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]
    digits: Tensor
    answers: Tensor


def make_text(seed: int, size: str, first_two: bool = False) -> Text:
    """Lines without an aside; their answer is the sum of all five digits or of the first two."""
    numbers, (strings, held_out) = SIZES[size], digit_sums.split_strings(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = digit_sums.draw(strings, 64 * numbers["stage"] * len(TOKENS), generator)
    digits = drawn, *held_out[: numbers["valid"] + numbers["test"]].split([numbers["valid"], numbers["test"]])
    lines = [digit_sums.DirectLines(x, digit_sums.EQUALS_ONLY) for x in digits]
    answer = digit_sums.AT_EQUALS + 1
    for some, x in zip(lines, digits, strict=True):
        some.tensors["input_ids"][:, answer] = digit_sums.running_sums(x)[:, 0 if first_two else -1]
    return Text(*lines, digits[-1], lines[-1].tensors["input_ids"][:, answer])


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    model = fast_text.pretrained(seed, numbers["pretraining"], out / "base")
    thoughts = ThoughtConfig(thoughts=4, policy_weight=30.0, embedding_scale=1.0, embedding_init=digit_sums.DASH)
    config = Config(
        out=str(out / "curriculum"),
        curriculum=CURRICULUM,
        steps=numbers["stage"],
        batch_size=64,
        learning_rate=5e-4,
        later_rate=1.0,
        eval_every=max(1, numbers["stage"] // 4),
        save_every=numbers["stage"],
        plain_steps=1,  # on this text there is nothing that a plain model could learn
        plain_rate=1e-3,
        plain_weight=1.0,
        seed=seed,
    )
    text = make_text(seed, size)
    as_long = replace(config, out=str(out / "direct"), curriculum=f"{SHORTEST}-1", steps=len(TOKENS) * config.steps)
    ways = {"curriculum, {} tokens": config, "{} tokens from the start": as_long}
    rows: list[dict[str, Any]] = [{"run": "base", **without_thoughts(model, text), "times_plain": 1.0}]
    for name, settings in ways.items():
        _, report = fast(model, text.training, text.valid, thoughts, settings, resume=True)
        times = {x["thought_tokens"]: x["times_plain"] for x in report["speeds"]}
        for folder, (T, _) in zip(folders(settings), stages(settings.curriculum), strict=True):
            qs = QuietStar.from_pretrained(folder)
            complete = fast_text.complete_thoughts(qs, text.digits, seed)
            figures = {**with_thoughts(qs, text), "complete_thoughts": complete, "times_plain": times[T]}
            rows.append({"run": name.format(T), **figures})
    config = replace(config, out=str(out), plain_steps=numbers["plain"])
    ways_of_last = LAST | (MORE if size == "full" else {})
    last, curves = last_step(model, make_text(seed, size, first_two=True), thoughts, config, ways_of_last)
    return {"rows": rows + last, "plain": curves}


def last_step(
    model: Any, text: Text, thoughts: ThoughtConfig, config: Config, ways: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, list[tuple[int, float]]]]:
    """Rows and loss curves of the plain models, where the answer is the sum of the first two digits, and of their controls."""
    out = Path(config.out)
    thinking = replace(config, out=str(out / "first-two"), curriculum="2-1", plain_steps=1)
    fast(model, text.training, text.valid, thoughts, thinking, resume=True)
    teacher = QuietStar.from_pretrained(folders(thinking)[0])
    as_it_is = plain.initial(model, teacher, replace(config, plain_start="curriculum"))
    rows = [
        {"run": BASE, **without_thoughts(model, text)},
        {"run": THINKING, **with_thoughts(teacher, text)},
        {"run": CHECKPOINT, **without_thoughts(as_it_is, text)},
    ]
    curves = {}
    for number, (name, changes) in enumerate(ways.items()):
        own = replace(config, out=str(out / f"plain-{number}"), **changes)
        best, _ = plain.train_plain(plain.initial(model, teacher, own), teacher, text.training, text.valid, own)
        lines = [line for _, line in json_lines(Path(own.out) / plain.PLAIN / "metrics.jsonl")]
        curves[name] = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
        rewarded = {"rewarded": fmean(line["rewarded"] for line in lines)} if own.reinforces else {}
        rows.append({"run": name, **without_thoughts(best, text), "loss_at_the_end": curves[name][-1][1], **rewarded})
    return rows, curves


def folders(config: Config) -> list[Path]:
    """The best checkpoint of each stage of a run."""
    return [Path(config.out) / f"stage-{i}-{T}-{J}" / BEST for i, (T, J) in enumerate(stages(config.curriculum), 1)]


@torch.no_grad()
def without_thoughts(model: Any, text: Text) -> dict[str, float]:
    logits, _, _ = plain.predictions(model.eval(), [text.test[i] for i in range(len(text.test))])
    return score(logits.log_softmax(-1), text.answers)


def with_thoughts(qs: QuietStar, text: Text) -> dict[str, float]:
    found = digit_sums.predict(qs.eval(), text.digits, digit_sums.own_thoughts(qs, text.digits))
    return score(found.mixed[:, 0], text.answers)


def score(logprob: Tensor, answers: Tensor) -> dict[str, float]:
    """Loss in nats and accuracy of log-probabilities [lines,V]."""
    right = logprob.argmax(-1) == answers
    return {"loss": -float(logprob.gather(1, answers[:, None]).mean()), "accuracy": float(right.float().mean())}


def plot(results: list[dict[str, Any]], path: Path) -> str:
    ways = {"curriculum": [f"curriculum, {T} tokens" for T in TOKENS], "from the start": [DIRECT], "no thoughts": ["base"]}

    def curves(up: str, across: str = "") -> dict[str, Any]:
        """For each way of training, its points over the lengths of thoughts, or over another figure."""
        return {
            name: [
                [(figure(result, run, across) if across else tokens(run), figure(result, run, up)) for run in runs]
                for result in results
            ]
            for name, runs in ways.items()
        }

    without = [BASE, CHECKPOINT, *LAST]
    panels(
        path,
        TITLE,
        [
            Panel("tokens of a thought", "accuracy, sum of five digits", curves("accuracy"), share=True),
            Panel("seconds per token, times those without thoughts", "accuracy", curves("accuracy", "times_plain"), share=True),
            Panel(
                "accuracy without thoughts, first two",
                "",
                bars={run.partition(", ")[2]: [figure(result, run) for result in results] for run in without},
            ),
        ],
    )
    return (
        "Accuracy on held-out lines against the length of thoughts and against their cost, and without thoughts after the last "
        "step; thin lines and dots are seeds, thick lines and bars their mean"
    )


def tokens(run: str) -> int:
    """The number in a run's name; 0 without one."""
    return next((int(word) for word in run.split() if word.isdigit()), 0)
