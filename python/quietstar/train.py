"""The training loop: one optimizer step after the other on the Quiet-STaR loss.

Everything random follows from (seed, step): the order of the texts, the thoughts' counters and, after a resume, dropout. So a
run that was stopped and resumed gives the losses of the unbroken one, bitwise where the machine allows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from quietstar import snapshots
from quietstar.batches import Batch, Example, collate, mix_seed, texts_of_step
from quietstar.config import TrainConfig
from quietstar.model import QuietStar, QuietStarOutput
from quietstar.objective import Counts
from quietstar.runs import Metrics, Signals

# (model, batch, counts of the whole step, seed of the step) to the loss of this part and the output it came from.
Loss = Callable[[Any, Batch, Counts, int], tuple[Tensor, QuietStarOutput]]


class Interrupted(Exception):
    """A signal ended the run; its last step is saved in ``checkpoint``."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped by a signal after step {step}; resume from {checkpoint}")
        self.checkpoint = checkpoint


def thought_loss(model: Any, batch: Batch, counts: Counts, seed: int) -> tuple[Tensor, QuietStarOutput]:
    """The published objective on one part of a step's texts."""
    out = model(**batch, counts=counts, seed=seed)
    return out.loss, out


def train(
    qs: QuietStar,
    data: Sequence[Example],
    config: TrainConfig,
    loss: Loss = thought_loss,
    evaluate: Callable[[QuietStar], dict[str, float]] | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``qs`` in place.

    Writes ``config.out/metrics.jsonl``, one line a step, and checkpoints. SIGTERM and Ctrl-C finish the step and save.

    Args:
        data: examples by index: input_ids [L] and, where wanted, labels, anchors, document_ids, thought_ids [P,N,T]; texts of
            different lengths are padded on the right.
        loss: what a part of a step is trained on; default the Quiet-STaR objective.
        evaluate: called every ``config.eval_every`` steps, without a gradient and in evaluation mode.
        resume: "auto" for the newest whole checkpoint of ``config.out``, if there is one, or the path of one.

    Returns:
        The metrics of every step since the start of the run.

    Raises:
        Interrupted: after a signal, once the checkpoint is written.
        ValueError: no data, or a checkpoint that is damaged or of another config.
        OSError: a file could not be written; checkpoints that were whole stay whole.
    """
    if not len(data):
        raise ValueError("train: there is no text to train on")
    if config.updates > 1 and not qs.thought_config.ratio_clip:
        raise ValueError(f"train: updates must be 1 where ratio_clip is 0, got {config.updates}")
    policy = qs.thought_config.anchors
    if policy != "all" and not {"anchors", "thought_ids"}.isdisjoint(data[0]):
        raise ValueError(f"train: anchors must be 'all' where the texts bring their own anchors or thoughts, got {policy!r}")
    set_seed(config.seed)
    qs.anchor_chunk = config.anchor_chunk
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with=config.tracker or None,
        project_dir=config.out if config.tracker else None,
    )
    optimizer = torch.optim.AdamW(
        [p for p in qs.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    settings = {"train": config.__dict__.copy(), "thoughts": qs.thought_config.to_dict()}
    done = _resume(qs, optimizer, config, settings, resume)
    model, optimizer = accelerator.prepare(qs, optimizer)
    if config.tracker:
        accelerator.init_trackers("quietstar", config=settings["train"])
    metrics = Metrics(Path(config.out) / "metrics.jsonl", done, write=accelerator.is_main_process)

    with (
        Signals() as signals,
        tqdm(total=config.steps, initial=done, unit="step", disable=not (progress and accelerator.is_main_process)) as bar,
    ):
        for step in range(done, config.steps):
            started = time.perf_counter()
            line = _step(accelerator, model, optimizer, data, config, loss, step)
            line["seconds"] = time.perf_counter() - started
            line["tokens_per_second"] = line.pop("tokens") / line["seconds"]
            line["thoughts_per_second"] = line.pop("thoughts") / line["seconds"]
            last = step + 1 == config.steps
            if evaluate is not None and config.eval_every and ((step + 1) % config.eval_every == 0 or last):
                line |= _evaluate(qs, evaluate)
            metrics.add({"step": step + 1, **line})
            accelerator.log(line, step=step + 1)
            shown = {
                "loss_ce": "{:.3f}",
                "policy_loss": "{:.2e}",
                "reward": "{:.3f}",
                "weight": "{:.3f}",
                "tokens_per_second": "{:.0f}",
                "thoughts_per_second": "{:.0f}",
            }
            bar.set_postfix_str(" ".join(f"{name} {form.format(line[name])}" for name, form in shown.items() if name in line))
            bar.update()
            if (step + 1) % config.save_every == 0 or last or signals.caught:
                if accelerator.is_main_process:
                    saved = snapshots.save(config.out, step + 1, qs, optimizer, settings, config.keep)
                accelerator.wait_for_everyone()
            if signals.caught and not last:
                accelerator.end_training()
                raise Interrupted(step + 1, saved)
    accelerator.end_training()
    return metrics.lines


def _step(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    data: Sequence[Example],
    config: TrainConfig,
    loss: Loss,
    step: int,
) -> dict[str, float]:
    """One optimizer step over this process's parts of the step's texts; returns summed or averaged figures."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    chosen = texts_of_step(len(data), config.batch_size, config.seed, step)
    parts = collate([data[i] for i in chosen], chosen, ranks * config.accumulation)[rank::ranks]
    parts = [{name: x.to(accelerator.device) for name, x in part.items()} for part in parts]
    qs = accelerator.unwrap_model(model)
    seed = mix_seed(config.seed, step)
    model.train()
    if qs.thought_config.anchors != "all":
        with accelerator.autocast():
            parts = [part | {"anchors": _choose_anchors(qs, part, seed)} for part in parts]
    if qs.thought_config.stop_threshold is not None:  # how many tokens there are shows when the thoughts are made
        with accelerator.autocast():
            parts = [part if "thought_ids" in part else part | _think(qs, part, seed) for part in parts]
    counts = _counts(accelerator, [_count(qs, part) for part in parts])

    sums: dict[str, float] = {}
    for update in range(config.updates):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext(), accelerator.autocast():
                value, out = loss(model, part, counts, seed)
                # DDP averages over ranks what is already divided by the counts of all.
                accelerator.backward(value * ranks)
            if update == 0:  # later updates go on with the same thoughts, and their figures would be of old ones
                parts[i] = part | _thoughts(out)
                for name, x in _figures(value, out, part).items():
                    sums[name] = sums.get(name, 0.0) + x
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        qs.update_reference()

    names = sorted(sums)
    totals = accelerator.reduce(torch.tensor([sums[name] for name in names], dtype=torch.float64, device=accelerator.device))
    sums = dict(zip(names, totals.tolist(), strict=True))
    sums["weight"] /= max(1, int(counts.mix[0]))
    for name in ("reward", "advantage"):
        sums[name] /= max(1, int(counts.places))
    if "divergence" in sums:
        sums["divergence"] /= max(1, int(counts.tokens))
    if "anchors" in sums:
        sums["anchor_share"] = sums["anchors"] / sums["tokens"]
    if not math.isfinite(sums["loss"]):
        raise FloatingPointError(f"train: the loss is {sums['loss']} at step {step + 1}")
    return sums | {"grad_norm": float(norm), "learning_rate": config.rate(step)}


def _figures(value: Tensor, out: QuietStarOutput, part: Batch) -> dict[str, float]:
    """Sums over one part, which add up over parts and ranks; the loss parts are already divided by the step's counts."""
    figures = {
        "loss": float(value.detach()),
        "loss_ce": float(out.loss_ce.detach()),
        "policy_loss": float(out.policy_loss.detach()),
        "reward": float(out.reward.sum()),
        "advantage": float(out.advantage.sum()),
        "weight": float(out.weight.detach()[..., 0].where(out.nll_mix[..., 0] != 0, 0).sum()),
        "tokens": float(part["attention_mask"].sum()),
        "thoughts": float(out.reward.numel()),
    }
    if out.base_logprob is not None:
        figures["divergence"] = float((out.logprob - out.base_logprob).sum())
    if out.anchors is not None:
        figures["anchors"] = float((out.anchors >= 0).sum())
        figures["thoughts"] = figures["anchors"] * out.reward.shape[2]
    return figures


def _thoughts(out: QuietStarOutput) -> Batch:
    """What ``forward`` takes to see the same thoughts again."""
    kept = {"thought_ids": out.thought_ids, "thought_lengths": out.thought_lengths, "old_logprob": out.logprob}
    return {name: x for name, x in kept.items() if x is not None}


def _choose_anchors(qs: QuietStar, part: Batch, seed: int) -> Tensor:
    return qs.choose_anchors(part["input_ids"], part["attention_mask"], part.get("document_ids"), part["sequence_ids"], seed)


def _think(qs: QuietStar, part: Batch, seed: int) -> Batch:
    names = ("input_ids", "attention_mask", "anchors", "document_ids", "sequence_ids")
    given: dict[str, Any] = {name: part[name] for name in names if name in part}
    thoughts = qs.think(**given, seed=seed)
    assert thoughts.thought_lengths is not None
    return {"thought_ids": thoughts.thought_ids, "thought_lengths": thoughts.thought_lengths}


def _count(qs: QuietStar, part: Batch) -> Counts:
    names = ("input_ids", "attention_mask", "labels", "anchors", "document_ids", "thought_lengths")
    return qs.count_targets(**{name: part[name] for name in names if name in part})


def _counts(accelerator: Accelerator, parts: list[Counts]) -> Counts:
    """The counts of the whole step, over parts and ranks."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Counts(*(accelerator.reduce(x) for x in (total.base, total.mix, total.places, total.tokens)))


def _evaluate(qs: QuietStar, evaluate: Callable[[QuietStar], dict[str, float]]) -> dict[str, float]:
    qs.eval()
    with torch.no_grad():
        figures = evaluate(qs)
    return {f"eval_{name}": value for name, value in figures.items()}


def _resume(
    qs: QuietStar,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    settings: dict[str, Any],
    resume: str | os.PathLike | None,
) -> int:
    """Steps that are done. "auto" passes over damaged checkpoints, aloud; one that is named must be whole."""
    if resume is None:
        return 0
    if resume != "auto":
        candidates = [Path(resume)]
        if not candidates[0].is_dir():
            raise ValueError(f"train: no checkpoint at {resume}")
    else:
        candidates = snapshots.every(config.out)[::-1]
    for path in candidates:
        try:
            snapshots.check(path)
        except ValueError as error:
            if resume != "auto":
                raise
            tqdm.write(f"{error}; trying the one before")
            continue
        _same_settings(path, json.loads((path / snapshots.RUN).read_text())["config"], settings)
        return int(snapshots.load(path, qs, optimizer)["step"])
    if candidates:
        raise ValueError(f"train: every checkpoint of {config.out} is damaged")
    return 0


# What may differ between a run and its continuation: nothing that the numbers depend on.
_FREE = {"out", "eval_every", "save_every", "keep", "tracker", "accumulation", "anchor_chunk"}


def _same_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for group in ("train", "thoughts"):
        for name, value in now[group].items():
            if name not in _FREE and saved[group].get(name) != value:
                raise ValueError(f"{path}: it was made with {name}={saved[group].get(name)!r}, not {value!r}")
