"""Stepwise internalisation of a chain of thought (ICoT-SI, arXiv 2405.14838): the chain is removed token by token.

A model learns to write chains. Then, stage by stage, the rows that it trains on lose one more token from the beginning of the
chain, until the answer directly follows the prompt. What the model can no longer write, it has to compute internally.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.arguments.fields import check, check_at_least, check_positive, check_types
from quietstar.config import option
from quietstar.files.writing import write_whole
from quietstar.recipes import internalize_report as icot_report
from quietstar.recipes.common.log import log_figures
from quietstar.recipes.common.logprobs import check_length, logprob
from quietstar.recipes.common.optimization import adamw, clipped_step
from quietstar.recipes.common.progress import Count, Progress, State
from quietstar.recipes.common.rounds import load_model, save_model
from quietstar.recipes.common.sampling import rollout
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed, texts_of_step
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar.run.signals import Signals

__all__ = ["Config", "internalize"]

MODEL, STAGES, DIRECT, NAME = "model", "stages", "direct", "internalize"  # what a run writes; the last is .json and .png
EXTRA_TOKENS = 8  # that an answer may be longer than the right one


@dataclass
class Config:
    """Which tokens of the chain are removed when, and how the model is trained.

    Raises:
        ValueError: a value outside its range, by name.
    """

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
    gate: float = option(0.0, "a stage, or a phase of kd, lasts until this share of held-out answers is right; 0: no gate")
    gate_rounds: int = option(4, "with a gate, a stage takes at most this many times its scheduled length")
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
        at_least_one = ("final_steps", "gate_rounds", "batch_size", "rows", "held_out", "eval_every", "save_every")
        check_at_least("internalize", self, 0, ("explicit_steps", "steps_per_token", "weight_decay"))
        check_at_least("internalize", self, 1, at_least_one)
        check_positive("internalize", self, ("smoothing", "learning_rate", "clip"))
        beyond = self.remove_all_beyond
        check("internalize", self, "remove_all_beyond", beyond is None or beyond >= 0, "None, or 0 or more")
        check("internalize", self, "gate", 0 <= self.gate <= 1, "from 0 to 1")
        kept = self.keep_position and self.side == "right"
        check("internalize", self, "side", not kept, "left where keep_position is on")


class RunState(State):
    """Where a run is.

    Attributes:
        stage, done: finished stages, and updates of the current one.
        best: figures of the best model of the last stage.
        lines: figures of the finished stages.
        chainless: whether no row of the latest batch had a chain left.
    """

    stage: Count
    done: Count
    best: icot_report.Figures | None
    lines: list[icot_report.StageFigures]
    chainless: bool


@dataclass(frozen=True)
class Stage:
    """``steps`` updates on rows that lose ``removed`` tokens of their chains."""

    removed: int
    steps: int


def stages(config: Config, longest: int) -> list[Stage]:
    """The schedule for chains of up to ``longest`` tokens; the last stage has no chain."""
    last = longest if config.remove_all_beyond is None else min(longest, config.remove_all_beyond)
    kept = [Stage(s, config.steps_per_token if s else config.explicit_steps) for s in range(last)]
    return [*kept, Stage(longest, config.final_steps)]


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
    """Grade greedy answers of a model of the stage in which ``removed`` tokens are gone.

    Returns:
        What ``internalize_report.figures`` returns.
    """
    longest = max(len(shortened(task, row, removed, config.side)) for row in rows) + EXTRA_TOKENS
    shift = min(removed, max(len(row.cot_ids) for row in rows)) if config.keep_position else 0
    began = time.perf_counter()
    found = rollout(model, task, [row.prompt_ids for row in rows], temperature=0.0, max_new=longest, shift=shift)
    return icot_report.figures(task, rows, [completions[0] for completions in found], time.perf_counter() - began)


@alone_in_out(Config)
def internalize(
    model: PreTrainedModel, task: Task, config: Config | None = None, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run all stages, or those that a stopped run lacks; ``model`` is changed.

    Writes the model after each stage (stages/removed-NNN), the best one of the last stage (model), metrics.jsonl with a line
    per update, and the report (internalize.json and, with matplotlib, internalize.png) into ``config.out``. SIGTERM and Ctrl-C
    finish the current update and save.

    Args:
        name: the model's name; a resumed run must have started with the same one.
        resume: continue the run in ``config.out``, if there is one.

    Returns:
        The best model of the last stage, and the report. "stages": for each stage removed, steps and what ``evaluate`` returns
        on the split "valid". "full chain", "internalized" and, with ``config.compare``, "no chain": what it returns on "test".
        "training": the training loss over the run.

    Raises:
        ValueError: rows without chains, or with chains of different lengths where ``keep_position`` is on; a task that rejects
            its own answers; no right answer after the explicit stage; or a run in ``config.out`` that has other settings or was
            not to be resumed.
        Interrupted: after a signal, once everything is saved.
    """
    config = config or Config()
    generator = torch.Generator().manual_seed(config.seed)
    training, valid, test = (
        task.sample(n, split, generator)
        for n, split in ((config.rows, "train"), (config.held_out, "valid"), (config.held_out, "test"))
    )
    longest = check_rows(model, task, [*training, *valid, *test], config)
    fresh = copy.deepcopy(model) if config.compare else None
    run = Training(model, task, config, stages(config, longest), training, valid, name, resume)
    report: dict[str, Any] = {"stages": run.run(), "training": icot_report.losses(run.progress.metrics.lines)}

    out = Path(config.out)
    folders = {"full chain": (out / STAGES / "removed-000", 0), "internalized": (out / MODEL, longest)}
    if fresh is not None:
        steps = sum(stage["steps"] for stage in report["stages"])
        direct = replace(config, out=str(out / DIRECT), remove_all_beyond=0, final_steps=steps, compare=False)
        Training(fresh, task, direct, stages(direct, longest), training, valid, name, resume).run()
        folders["no chain"] = (out / DIRECT / MODEL, longest)
    for row, (folder, removed) in folders.items():
        if folder.is_dir():  # a run without any chain has no model with the full chain
            report[row] = evaluate(load_model(folder, model), task, test, removed, config)
    write_whole(out / f"{NAME}.json", json.dumps(report, indent=2) + "\n")
    icot_report.plot(out / f"{NAME}.png", report, task.name)
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


class Training:
    """A run through the stages, from wherever it stopped to the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        config: Config,
        plan: Sequence[Stage],
        training: Sequence[Row],
        valid: Sequence[Row],
        name: str,
        resume: bool,
    ):
        self.model, self.task, self.config, self.plan = model, task, config, plan
        self.training, self.valid = training, valid
        begin: dict[str, Any] = {"step": 0, "stage": 0, "done": 0, "best": None, "lines": [], "chainless": False}
        settings = Settings.of(config, recipe="internalize", model=name, task=task.name)
        self.progress = Progress(config.out, settings, begin, resume, RunState)
        self.optimizer = self._new_optimizer()
        if self.progress.begun:
            self.progress.load(model, self.optimizer)

    def run(self) -> list[dict[str, Any]]:
        """Run the remaining stages; returns the figures of each stage."""
        state = self.progress.state
        with Signals() as signals:
            while state["stage"] < len(self.plan):
                stage = self.plan[state["stage"]]
                figures = self._stage(stage, signals)
                state["lines"].append({"removed": stage.removed, "steps": state["done"], **figures})
                state |= {"stage": state["stage"] + 1, "done": 0}
                folder = Path(self.config.out) / STAGES / f"removed-{stage.removed:03d}"
                save_model(folder, self.model, self.task, state["lines"][-1])
                log_figures(self.config.out, state["lines"][-1])
                self.progress.save_if(signals, 1, self.model, self.optimizer)
                if stage.removed == 0 < stage.steps and figures["accuracy"] == 0:
                    raise ValueError(
                        f"internalize: after {state['step']} updates with the whole chain no held-out answer is right, so "
                        "there is nothing to internalise: train longer, or with another learning rate"
                    )
        return state["lines"]

    def _stage(self, stage: Stage, signals: Signals) -> dict[str, Any]:
        config, state, last = self.config, self.progress.state, stage is self.plan[-1]
        # As in the published code, not after a batch without chains: with few long chains left, a token more changes little.
        if config.reset_optimizer and state["done"] == 0 and not state["chainless"]:
            self.optimizer = self._new_optimizer()
        gated = config.gate > 0 and not last
        most = stage.steps * (config.gate_rounds if gated else 1)
        every = stage.steps if gated else config.eval_every if last else most
        figures: dict[str, Any] = {}
        while state["done"] < most:
            line = self._update(stage)
            if state["done"] % every == 0 or state["done"] == most:
                figures = self._evaluate(stage, keep_best=last)
                line["accuracy"] = figures["accuracy"]
            self.progress.metrics.add(line)
            if state["done"] == most or (gated and figures and figures["accuracy"] >= config.gate):
                break
            self.progress.save_if(signals, config.save_every, self.model, self.optimizer)
        return state["best"] if last else figures or self._evaluate(stage)

    def _update(self, stage: Stage) -> dict[str, Any]:
        config, state = self.config, self.progress.state
        began, step = time.perf_counter(), state["step"]
        seed = mix_seed(config.seed, step)
        torch.manual_seed(seed)  # for dropout
        rows = [self.training[i] for i in texts_of_step(len(self.training), config.batch_size, config.seed, step)]
        removed = removals(len(rows), stage.removed, config.smoothing, torch.Generator().manual_seed(seed))
        lengths = torch.tensor([len(row.cot_ids) for row in rows])
        removed, state["chainless"] = torch.minimum(removed, lengths), bool((removed >= lengths).all())
        completions = [shortened(self.task, *pair, config.side) for pair in zip(rows, removed.tolist(), strict=True)]
        self.model.train()
        values, mask = logprob(
            self.model, [row.prompt_ids for row in rows], completions, removed if config.keep_position else 0
        )
        loss = -values.sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        norm = clipped_step(self.optimizer, self.model, config.clip, f"internalize: update {step + 1}")
        state["step"], state["done"] = step + 1, state["done"] + 1
        return {
            "step": step + 1,
            "removed": stage.removed,
            "loss": float(loss.detach()),
            # A failing stage shows here: the answer follows from the rest of the chain, but its first token from nothing.
            "first_token_loss": -float(values[:, 0].detach().mean()),
            "grad_norm": norm,
            "tokens": int(mask.sum()),
            "seconds": time.perf_counter() - began,
        }

    def _evaluate(self, stage: Stage, keep_best: bool = False) -> dict[str, Any]:
        """Evaluate on the held-out problems.

        Only a model without a chain can be the best one: while it still writes the chain it is better.
        """
        figures = evaluate(self.model, self.task, self.valid, stage.removed, self.config)
        best = self.progress.state["best"]
        if keep_best and (best is None or figures["accuracy"] > best["accuracy"]):
            self.progress.state["best"] = figures
            save_model(Path(self.config.out) / MODEL, self.model, self.task, figures)
        return figures

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.model, self.config.learning_rate, self.config.weight_decay)
