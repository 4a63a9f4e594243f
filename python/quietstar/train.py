"""The training loop: one optimizer step after the other on the Quiet-STaR loss.

Everything random follows from (seed, step): the order of the texts, the thoughts' counters and dropout. So a run that was
stopped and resumed gives the losses of the unbroken one, bitwise where the machine allows. Several processes share a step's
texts, and what a loss is divided by is counted over all of them: their number changes rounding, and dropout, alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, distributed
from torch.nn.functional import pad
from tqdm.auto import tqdm

from quietstar.config import TrainConfig
from quietstar.model import QuietStar
from quietstar.objective import Counts
from quietstar.output import QuietStarOutput
from quietstar.run import snapshots
from quietstar.run.batches import Batch, Example, collate, mix_seed, texts_of_step
from quietstar.run.metrics import Metrics, process_state
from quietstar.run.optimizers import make_optimizer
from quietstar.run.sharding import find_strategy, shard, whole
from quietstar.run.signals import Interrupted, Signals

__all__ = ["Interrupted", "Loss", "thought_loss", "train"]

# (model, batch, counts of the whole step, seed of the step) to the loss of this part and the output it came from.
Loss = Callable[[Any, Batch, Counts, int], tuple[Tensor, QuietStarOutput]]


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

    Writes ``config.out/metrics.jsonl``, one line a step, and checkpoints. SIGTERM and Ctrl-C finish the step and save,
    whichever process they reach. Processes that torchrun or accelerate launch started all call this with the same arguments.

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
        ValueError: no data, more processes than texts in a step, or a checkpoint that is damaged or of another config.
        OSError: a file could not be written; checkpoints that were whole stay whole. ConnectionError, which is one: another
            process ended; the steps that were done are saved if weights are not cut over the processes.
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
    process_state()
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with=config.tracker or None,
        project_dir=config.out if config.tracker else None,
    )
    strategy = find_strategy(config)
    _check_processes(accelerator.num_processes, config, strategy)
    settings = {"train": config.__dict__.copy(), "thoughts": qs.thought_config.to_dict()}
    checkpoint = _find_checkpoint(config, settings, resume)
    done = snapshots.load(checkpoint, qs) if checkpoint else 0
    _check_same_step(accelerator, done, config)
    if strategy != "no":
        shard(qs, strategy, config.precision)
    weights = [p for p in qs.parameters() if p.requires_grad]
    optimizer = make_optimizer(config.optimizer, weights, config.learning_rate, config.weight_decay)
    if checkpoint:
        snapshots.load_optimizer(checkpoint, optimizer)
    model: Any = qs
    if strategy == "no":
        model, optimizer = accelerator.prepare(qs, optimizer)
    else:
        optimizer = accelerator.prepare_optimizer(optimizer)
    if config.tracker:
        accelerator.init_trackers("quietstar", config=settings["train"])
    metrics = Metrics(Path(config.out) / "metrics.jsonl", done, write=accelerator.is_main_process)
    save = partial(snapshots.save, config.out, qs=qs, optimizer=optimizer, config=settings, keep=config.keep)

    with (
        Signals() as signals,
        tqdm(total=config.steps, initial=done, unit="step", disable=not (progress and accelerator.is_main_process)) as bar,
    ):
        finished = done
        try:
            with _naming_lost_processes():
                for step in range(done, config.steps):
                    started = time.perf_counter()
                    line = _step(accelerator, model, optimizer, data, config, loss, step)
                    finished = step + 1
                    line["seconds"] = time.perf_counter() - started
                    line["tokens_per_second"] = line.pop("tokens") / line["seconds"]
                    line["thoughts_per_second"] = line.pop("thoughts") / line["seconds"]
                    last = step + 1 == config.steps
                    if evaluate is not None and config.eval_every and ((step + 1) % config.eval_every == 0 or last):
                        with accelerator.autocast():
                            line |= _evaluate(qs, evaluate)
                    metrics.add({"step": step + 1, **line})
                    accelerator.log(line, step=step + 1)
                    _show(bar, line)
                    stop = _any(accelerator, signals.caught)
                    if (step + 1) % config.save_every == 0 or last or stop:
                        save(step + 1, write=accelerator.is_main_process)
                        accelerator.wait_for_everyone()
                    if stop:
                        break
                stop = _any(accelerator, signals.caught)  # perhaps only while the last step was saved
        except ConnectionError:
            whole = strategy == "no" and config.updates == 1  # or else weights may be between two steps
            unsaved = finished > done and not snapshots.folder(config.out, finished).exists()
            if whole and unsaved and accelerator.is_main_process:
                save(finished)
            raise
    _end_trackers(accelerator)
    if stop:  # behind the last step too: what called this may have more to do
        raise Interrupted(finished, snapshots.folder(config.out, finished))
    return metrics.lines


SHOWN = {
    "loss_ce": "{:.3f}",
    "policy_loss": "{:.2e}",
    "reward": "{:.3f}",
    "weight": "{:.3f}",
    "tokens_per_second": "{:.0f}",
    "thoughts_per_second": "{:.0f}",
}


def _show(bar: tqdm, line: dict[str, float]) -> None:
    bar.set_postfix_str(" ".join(f"{name} {form.format(line[name])}" for name, form in SHOWN.items() if name in line))
    bar.update()


def _end_trackers(accelerator: Accelerator) -> None:
    """Accelerate's own way of ending also takes the processes apart, and another run may follow."""
    for tracker in accelerator.trackers:
        tracker.finish()


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
    # As many for each process, and none is empty: where weights are gathered all must run the model as often.
    each = min(config.accumulation, len(chosen) // ranks)
    parts = collate([data[i] for i in chosen], chosen, ranks * each)[rank::ranks]
    parts = [{name: x.to(accelerator.device) for name, x in part.items()} for part in parts]
    qs = accelerator.unwrap_model(model)
    seed = mix_seed(config.seed, step)
    torch.manual_seed(mix_seed(seed, rank))  # for dropout
    model.train()
    if qs.thought_config.anchors != "all":
        with accelerator.autocast():
            parts = _same_width(accelerator, [part | {"anchors": _choose_anchors(qs, part, seed)} for part in parts])
    if qs.thought_config.stop_threshold is not None:  # how many tokens there are shows when the thoughts are made
        with accelerator.autocast():
            parts = [part if "thought_ids" in part else part | _think(qs, part, seed) for part in parts]
    counts = _counts(accelerator, [_count(qs, part) for part in parts])

    sums: dict[str, Tensor] = {}
    figures: dict[str, float] = {}
    for update in range(config.updates):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            # Gradients of weights that are cut are summed at once: until then each process has all of them.
            waits = model is not qs and i + 1 < len(parts)
            with accelerator.no_sync(model) if waits else nullcontext(), accelerator.autocast():
                value, out = loss(model, part, counts, seed)
                # DDP and FSDP average over ranks what is already divided by the counts of all.
                accelerator.backward(value * ranks)
            if update == 0:  # later updates go on with the same thoughts, and their figures would be of old ones
                parts[i] = _thoughts(out) | part  # thoughts that came with their old_logprob keep it
                for name, x in _figures(value, out, part).items():
                    sums[name] = sums.get(name, 0) + x.double()
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        if update == 0:  # before the weights change, so that they are whole steps where another process is lost
            figures = _read(accelerator, sums, counts, whole(norm))
            if not math.isfinite(figures["loss"]):
                raise FloatingPointError(f"train: the loss is {figures['loss']} at step {step + 1}")
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        qs.update_reference()

    if config.updates > 1:
        figures["grad_norm"] = float(whole(norm))
    return figures | {"learning_rate": config.rate(step)}


def _figures(value: Tensor, out: QuietStarOutput, part: Batch) -> dict[str, Tensor]:
    """Sums over one part, which add up over parts and ranks; the loss parts are already divided by the step's counts.

    They stay on the device: each that the host read would wait for it.
    """
    figures = {
        "loss": value.detach(),
        "loss_ce": out.loss_ce.detach(),
        "policy_loss": out.policy_loss.detach(),
        "reward": out.reward.sum(),
        "advantage": out.advantage.sum(),
        "weight": out.weight.detach()[..., 0].where(out.nll_mix[..., 0] != 0, 0).sum(),
        "tokens": part["attention_mask"].sum(),
        "thoughts": torch.full_like(value.detach(), out.reward.numel(), dtype=torch.float64),
    }
    if out.base_logprob is not None:
        figures["divergence"] = (out.logprob - out.base_logprob).sum()
    if out.anchors is not None:
        figures["anchors"] = (out.anchors >= 0).sum()
        figures["thoughts"] = figures["anchors"] * out.reward.shape[2]
    return figures


def _read(accelerator: Accelerator, sums: dict[str, Tensor], counts: Counts, norm: Tensor) -> dict[str, float]:
    """The figures of all ranks from the sums of this one, in one copy from the device."""
    names = sorted(sums)
    values = accelerator.reduce(torch.stack([sums[name] for name in names]))
    others = [x.to(values) for x in (counts.mix[0], counts.places, counts.tokens, norm)]
    *numbers, mix, places, tokens, grad_norm = torch.cat([values, torch.stack(others)]).tolist()
    figures = dict(zip(names, numbers, strict=True))
    figures["weight"] /= max(1, mix)
    for name in ("reward", "advantage"):
        figures[name] /= max(1, places)
    if "divergence" in figures:
        figures["divergence"] /= max(1, tokens)
    if "anchors" in figures:
        figures["anchor_share"] = figures["anchors"] / figures["tokens"]
    return figures | {"grad_norm": grad_norm}


def _thoughts(out: QuietStarOutput) -> Batch:
    """What ``forward`` takes to see the same thoughts again."""
    kept = {"thought_ids": out.thought_ids, "thought_lengths": out.thought_lengths, "old_logprob": out.logprob}
    return {name: x for name, x in kept.items() if x is not None}


def _choose_anchors(qs: QuietStar, part: Batch, seed: int) -> Tensor:
    return qs.choose_anchors(part["input_ids"], part["attention_mask"], part.get("document_ids"), part["sequence_ids"], seed)


def _same_width(accelerator: Accelerator, parts: list[Batch]) -> list[Batch]:
    """As many places for anchors in each part of each process, so that all make as many chunks of them."""
    width = torch.tensor(max(part["anchors"].shape[1] for part in parts), device=accelerator.device)
    most = int(accelerator.gather(width).max())
    return [part | {"anchors": pad(part["anchors"], (0, most - part["anchors"].shape[1]), value=-1)} for part in parts]


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


def _check_processes(processes: int, config: TrainConfig, strategy: str) -> None:
    if processes > config.batch_size:
        raise ValueError(f"train: batch_size must be at least the number of processes, {processes}, got {config.batch_size}")
    if strategy != "no" and not distributed.is_initialized():
        raise ValueError(f"train: sharding must be 'no' where neither torchrun nor accelerate launch started, got {strategy!r}")
    if strategy != "no" and config.anchor_chunk == "auto":
        raise ValueError("train: anchor_chunk must be a number where weights are sharded, the same in each process, got 'auto'")


def _check_same_step(accelerator: Accelerator, done: int, config: TrainConfig) -> None:
    steps = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"train: all processes must see one folder out={config.out}, got checkpoints of steps {steps} there")


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it holds in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    """What is left of a run ends when one of its processes does, as ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError("train: another process ended, without which this one can't go on") from error


def _find_checkpoint(config: TrainConfig, settings: dict[str, Any], resume: str | os.PathLike | None) -> Path | None:
    """What to go on from. "auto" passes over damaged checkpoints, aloud; one that is named must be whole."""
    if resume is None:
        return None
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
        return path
    if candidates:
        raise ValueError(f"train: every checkpoint of {config.out} is damaged")
    return None


# What may differ between a run and its continuation: nothing that the numbers depend on.
_FREE = {"out", "eval_every", "save_every", "keep", "tracker", "accumulation", "anchor_chunk", "sharding"}


def _same_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    saved = saved | {"train": asdict(TrainConfig()) | saved["train"]}  # older checkpoints lack newer fields
    for group in ("train", "thoughts"):
        for name, value in now[group].items():
            if name not in _FREE and saved[group].get(name) != value:
                raise ValueError(f"{path}: it was made with {name}={saved[group].get(name)!r}, not {value!r}")
