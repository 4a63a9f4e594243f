"""Stepwise internalisation of a chain of thought (ICoT-SI, arXiv 2405.14838): the chain is removed token by token.

A model learns to write chains. Then, stage by stage, the rows that it trains on lose one more token from the beginning of the
chain, until the answer directly follows the prompt. What the model can no longer write, it has to compute internally.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.run.batches import mix_seed, texts_of_step
from quietstar.run.lock import alone_in_out
from quietstar.run.metrics import Line
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check, check_at_least, check_positive, check_types
from quietstar_recipes.common.evaluation import grade
from quietstar_recipes.common.log import log_figures
from quietstar_recipes.common.logprobs import check_length, logprob
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.sampling import Completion, rollout
from quietstar_recipes.common.saving import Progress, hashes, load_model, save_model, write_json
from quietstar_recipes.common.training import adamw, train
from quietstar_recipes.tasks import Row, Task

MODEL, STAGES, DIRECT, NAME = "model", "stages", "direct", "internalize"  # what a run writes; the last is .json and .png
EXTRA_TOKENS = 8  # that an answer may be longer than the right one
POINTS = 200  # of the curve of the training loss, roughly


@dataclass
class Config:
    """Which tokens of the chain are removed when, and how the model is trained."""

    out: str = option(
        "runs/internalize", "folder for the model of each stage, the best model, metrics and the report", may_differ=True
    )
    explicit_steps: int = option(1500, "updates with the whole chain, before the first token is removed")
    steps_per_token: int = option(250, "updates after each removed token")
    final_steps: int = option(1250, "updates without a chain")
    smoothing: float = option(4.0, "rows lose o more tokens with probability ~ exp(-smoothing * o); inf: no more")
    reset_optimizer: bool = option(True, "start a new optimizer whenever a token is removed")
    side: Literal["left", "right"] = option("left", "which end of the chain is removed first: left or right")
    remove_all_beyond: int | None = option(None, "the whole chain is removed once this many tokens are; 0: no chain at all")
    keep_position: bool = option(False, "what follows a removed token keeps its position; for chains of equal length")
    compare: bool = option(False, "also train without any chain for as many updates; the result must beat this")
    learning_rate: float = option(1e-3, "learning rate of AdamW, constant; published: 5e-5 for GPT-2, 1e-5 for 4B and 7B")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    batch_size: int = option(64, "rows per update; 32 in the published code")
    rows: int = option(20_000, "problems to train on; fewer where a file has fewer")
    held_out: int = option(200, "problems for the accuracy of each stage, and as many others for the report")
    eval_every: int = option(250, "updates between evaluations once the chain is gone; the best model is kept")
    save_every: int = option(250, "updates between checkpoints", may_differ=True)
    seed: int = option(0, "fixes problems, their order, and which rows lose more tokens")

    def __post_init__(self) -> None:
        check_types("internalize", self, infinite=("smoothing",))
        check_at_least("internalize", self, 0, ("explicit_steps", "steps_per_token", "weight_decay"))
        check_at_least("internalize", self, 1, ("final_steps", "batch_size", "rows", "held_out", "eval_every", "save_every"))
        check("internalize", self, "batch_size", self.batch_size <= 2**16, "65,536 at most")
        check_positive("internalize", self, ("smoothing", "learning_rate", "clip"))
        beyond = self.remove_all_beyond
        check("internalize", self, "remove_all_beyond", beyond is None or beyond >= 0, "None, or 0 or more")
        kept = self.keep_position and self.side == "right"
        check("internalize", self, "side", not kept, "left where keep_position is on")


def stages(config: Config, longest: int) -> list[tuple[int, int]]:
    """For chains of up to ``longest`` tokens: how many of them are gone in each stage, in the last one all, and its updates."""
    last = longest if config.remove_all_beyond is None else min(longest, config.remove_all_beyond)
    kept = [(s, config.steps_per_token if s else config.explicit_steps) for s in range(last)]
    return [*kept, (longest, config.final_steps)]


def removals(rows: int, removed: int, smoothing: float, generator: torch.Generator) -> Tensor:
    """Removal smoothing: int64 [rows], ``removed`` + o with probability (1 - exp(-smoothing)) exp(-smoothing o)."""
    draw = torch.rand(rows, dtype=torch.float64, generator=generator)
    return removed + (-torch.log1p(-draw) / smoothing).floor().long()  # an exponential random variable, rounded down


def shortened(task: Task, row: Row, removed: int, side: str = "left") -> list[int]:
    """The row's completion without ``removed`` tokens of its chain, or without the whole chain if it is shorter."""
    kept = max(0, len(row.cot_ids) - removed)
    chain = row.cot_ids[len(row.cot_ids) - kept :] if side == "left" else row.cot_ids[:kept]
    return task.completion_ids(replace(row, cot_ids=chain))


def evaluate(model: PreTrainedModel, task: Task, rows: Sequence[Row], removed: int, config: Config) -> dict[str, Any]:
    """The ``figures`` of greedy answers of a model of the stage in which ``removed`` tokens are gone."""
    longest = max(len(shortened(task, row, removed, config.side)) for row in rows) + EXTRA_TOKENS
    shift = min(removed, max(len(row.cot_ids) for row in rows)) if config.keep_position else 0
    began = time.perf_counter()
    found = rollout(model, task, [row.prompt_ids for row in rows], temperature=0.0, max_new=longest, shift=shift)
    return figures(task, rows, [completions[0] for completions in found], time.perf_counter() - began)


def figures(task: Task, rows: Sequence[Row], written: Sequence[Completion], seconds: float) -> dict[str, Any]:
    """Accuracy and speed of these answers.

    Without chain_right: a chain of which only the end is written can't be checked.
    """
    graded = grade(task, rows, written)
    del graded["chain_right"]
    tokens = sum(len(one.ids) for one in written)
    speeds = {"problems_per_second": len(rows) / seconds, "tokens_per_second": tokens / seconds}
    return {**graded, "tokens": tokens / len(rows), **speeds}


@alone_in_out(Config)
def internalize(
    model: PreTrainedModel, task: Task, config: Config | None = None, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run all stages, or those that a stopped run lacks; ``model`` is changed.

    Writes the model after each stage (stages/removed-NNN), the best one of the last stage (model), metrics.jsonl with a line
    per update, and the report (internalize.json and, with matplotlib, internalize.png) into ``config.out``.

    Returns:
        The best model of the last stage, and the report. "stages": for each stage removed, steps and what ``evaluate`` returns
        on the split "valid". "full chain", "internalized" and, with ``config.compare``, "no chain": what it returns on "test".
        "training": the training loss over the run.

    Raises:
        ValueError: rows without chains, or with chains of different lengths where ``keep_position`` is on; a task that rejects
            its own answers; or no right answer after the explicit stage.
    """
    config = config or Config()
    generator = torch.Generator().manual_seed(config.seed)
    training, valid, test = (
        task.sample(n, split, generator)
        for n, split in ((config.rows, "train"), (config.held_out, "valid"), (config.held_out, "test"))
    )
    longest = check_rows(model, task, [*training, *valid, *test], config)
    fresh = copy.deepcopy(model) if config.compare else None
    run = Stages(model, task, config, stages(config, longest), training, valid, name, resume)
    run.run()
    report: dict[str, Any] = {"stages": run.state["lines"], "training": losses(run.progress.metrics.lines)}

    # The control, and all models on test problems.
    out = Path(config.out)
    folders = {"full chain": (out / STAGES / "removed-000", 0), "internalized": (out / MODEL, longest)}
    if fresh is not None:
        steps = sum(stage["steps"] for stage in report["stages"])
        direct = replace(config, out=str(out / DIRECT), remove_all_beyond=0, final_steps=steps, compare=False)
        Stages(fresh, task, direct, stages(direct, longest), training, valid, name, resume).run()
        folders["no chain"] = (out / DIRECT / MODEL, longest)
    for row, (folder, removed) in folders.items():
        if folder.is_dir():  # a run without any chain has no model with the full chain
            report[row] = evaluate(load_model(folder, model), task, test, removed, config)
    write_json(out / f"{NAME}.json", report)
    plot(out / f"{NAME}.png", report, task.name)
    return load_model(out / MODEL, model), report


def check_rows(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config) -> int:
    """Number of tokens of the longest chain; raises ValueError if these rows have nothing to internalise."""
    lengths = {len(row.cot_ids) for row in rows}
    if lengths == {0}:
        raise ValueError(f"internalize: none of the {len(rows):,} problems has a chain of thought")
    if config.keep_position and len(lengths) > 1:
        raise ValueError(
            "internalize: keep_position needs chains of one length, since the length of a new problem's chain is unknown, got "
            f"{min(lengths)} to {max(lengths)} tokens"
        )
    if not any(task.check(row, task.completion_ids(row)) for row in rows[: config.batch_size]):
        raise ValueError(f"internalize: {type(task).__name__} rejects its own answers, so nothing would count as right")
    check_length(model, max(len(row.prompt_ids) + len(task.completion_ids(row)) for row in rows) + EXTRA_TOKENS)
    return max(lengths)


class Stages:
    """All stages of a run: what it trains, on what, and where it is.

    ``state`` has the number of finished stages (stage) and of updates of the current one (done), the figures of the best model
    of the last stage (best) and of the finished stages (lines), and whether the latest batch had no chain left (chainless).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        config: Config,
        plan: Sequence[tuple[int, int]],
        training: Sequence[Row],
        valid: Sequence[Row],
        name: str,
        resume: bool,
    ):
        self.model, self.task, self.config = model, task, config
        self.plan, self.training, self.valid = plan, training, valid
        begin: dict[str, Any] = {"step": 0, "stage": 0, "done": 0, "best": None, "lines": [], "chainless": False}
        settings = Settings.of(config, recipe="internalize", model=name, task=task.name, inputs=hashes(task, model, name))
        self.progress = Progress(config.out, settings, begin, resume, Update)
        self.state, self.optimizer = self.progress.state, adamw(model, config.learning_rate, config.weight_decay)
        self.progress.load(model, self.optimizer)

    def run(self) -> None:
        """Run all stages, or those that a stopped run lacks."""
        config, state = self.config, self.state
        while state["stage"] < len(self.plan):
            removed, updates = self.plan[state["stage"]]
            # As published, not after a batch without chains: with few long chains left, a token more changes little.
            if config.reset_optimizer and state["done"] == 0 and not state["chainless"]:
                self.optimizer = adamw(self.model, config.learning_rate, config.weight_decay)
            if updates:
                options: dict[str, Any] = {"name": "internalize", "clip": config.clip, "save_every": config.save_every}
                steps = state["step"] - state["done"] + updates
                train(self.model, self.optimizer, steps, self.gradient, after=self.after, progress=self.progress, **options)
            else:
                self.finish(self.measure())
                self.progress.save(self.model, self.optimizer)
            if removed == 0 < updates and state["lines"][-1]["accuracy"] == 0:
                raise ValueError(
                    f"internalize: after {state['step']} updates with the whole chain no held-out answer is right, so "
                    "there is nothing to internalise: train longer, or with another learning rate"
                )

    @property
    def removed(self) -> int:
        """How many tokens are gone in the current stage."""
        return self.plan[self.state["stage"]][0]

    @property
    def is_last(self) -> bool:
        """Whether the current stage is the last one, which has no chain."""
        return self.state["stage"] == len(self.plan) - 1

    def gradient(self, step: int) -> dict[str, Any]:
        """Leave the gradient of an update in the model; returns its figures."""
        config, seed = self.config, mix_seed(self.config.seed, step)
        torch.manual_seed(seed)  # for dropout
        chosen = texts_of_step(len(self.training), config.batch_size, config.seed, step)
        rows = [self.training[i] for i in chosen]
        lost = removals(len(rows), self.removed, config.smoothing, torch.Generator().manual_seed(seed))
        lengths = torch.tensor([len(row.cot_ids) for row in rows])
        lost, self.state["chainless"] = torch.minimum(lost, lengths), bool((lost >= lengths).all())
        completions = [shortened(self.task, *pair, config.side) for pair in zip(rows, lost.tolist(), strict=True)]
        self.model.train()
        prompts = [row.prompt_ids for row in rows]
        values, mask = logprob(self.model, prompts, completions, lost if config.keep_position else 0)
        loss = -values.sum() / mask.sum()
        loss.backward()
        # A failing stage shows in the first token: the answer follows from the rest of the chain, but that from nothing.
        first = -float(values[:, 0].detach().mean())
        figures = {"loss": float(loss.detach()), "first_token_loss": first, "tokens": int(mask.sum())}
        return {"removed": self.removed, **figures}

    def after(self, line: dict[str, Any]) -> None:
        """Measure the model at the end of each stage, and in the last one every ``eval_every`` updates."""
        self.state["done"] += 1
        done, updates = self.state["done"], self.plan[self.state["stage"]][1]
        if done == updates or (self.is_last and done % self.config.eval_every == 0):
            found = self.measure()
            line["accuracy"] = found["accuracy"]
            if done == updates:
                self.finish(found)

    def measure(self) -> dict[str, Any]:
        """Only a model without a chain can be the best one: while it still writes the chain it is better."""
        found, best = evaluate(self.model, self.task, self.valid, self.removed, self.config), self.state["best"]
        if self.is_last and (best is None or found["accuracy"] > best["accuracy"]):
            self.state["best"] = found
            save_model(Path(self.config.out) / MODEL, self.model, self.task, found)
        return found

    def finish(self, found: dict[str, Any]) -> None:
        """Save the stage's model and figures, and go on to the next stage."""
        figures = self.state["best"] if self.is_last else found
        line = {"removed": self.removed, "steps": self.state["done"], **figures}
        folder = Path(self.config.out) / STAGES / f"removed-{self.removed:03d}"
        self.state["lines"].append(line)
        self.state.update(stage=self.state["stage"] + 1, done=0)
        save_model(folder, self.model, self.task, line)
        log_figures(self.config.out, line)


class Update(Line):
    """What ``losses`` reads in a line of metrics."""

    removed: int
    loss: float
    first_token_loss: float


def losses(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The training loss of a run's metrics, averaged over a few updates at a time, never across stages.

    "step" is the last of these updates.
    """
    width = max(1, math.ceil(len(lines) / POINTS))
    parts = [list(some) for _, some in groupby(lines, lambda line: (line["removed"], (line["step"] - 1) // width))]
    return [
        {name: some[-1][name] for name in ("step", "removed")}
        | {name: fmean(line[name] for line in some) for name in ("loss", "first_token_loss")}
        for some in parts
    ]


def plot(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a run's report."""
    stages, training = report["stages"], report["training"]
    last = {name: report[name] for name in ("full chain", "internalized", "no chain") if name in report}
    speed = {"each stage": [[(x["problems_per_second"], x["accuracy"]) for x in stages]]}
    speed |= {f"{name}, test": [[(x["problems_per_second"], x["accuracy"])]] for name, x in last.items()}
    removals = [a["step"] for a, b in zip(training, training[1:], strict=False) if a["removed"] != b["removed"]]
    curves = {name.replace("_", " "): [[(x["step"], x[name]) for x in training]] for name in ("first_token_loss", "loss")}
    drawn = [
        Panel("tokens removed", "accuracy", {"held-out problems": [[(x["removed"], x["accuracy"]) for x in stages]]}),
        Panel("problems per second", "accuracy", speed),
        Panel("update; lines where a token is removed", "training loss, nats", curves, marks=removals),
    ]
    panels(path, title, drawn)
