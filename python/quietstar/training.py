"""The training loop: optimizer steps on the Quiet-STaR loss.

Everything random is a function of (seed, step): the order of the texts, the sampled thoughts and dropout. A run that was
stopped and resumed has the losses of an uninterrupted one, bitwise where the machine allows. Several processes share the texts
of a step, and losses are divided by counts over all of them, so their number changes nothing but rounding and dropout.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from quietstar.checkpoints import places
from quietstar.config import TrainConfig, step_size_warning
from quietstar.hf.linear import fast_linear
from quietstar.hf.modules import state
from quietstar.model import QuietStar
from quietstar.objective import Counts
from quietstar.run import figures, processes, snapshots, trackers
from quietstar.run.batches import Batch, Example, check_data, check_example, collate, mix_seed, texts_of_step
from quietstar.run.lock import alone_in_out
from quietstar.run.metrics import Display, Metrics, TrainingLine
from quietstar.run.optimizers import clear_gradients, load_optimizer, make_optimizer
from quietstar.run.parts import prepare_parts
from quietstar.run.resume import find_checkpoint
from quietstar.run.sharding import gathered, shard, whole
from quietstar.run.step_graphs import StepGraphs
from quietstar.texts import Texts
from quietstar.thinking.forward import QuietStarOutput
from quietstar_kernels.checks import file_path, flag, function, instance

# (model, texts, counts of the whole step, seed of the step) to the loss of this part and the output it was computed from.
Loss = Callable[[Any, Texts, Counts, int], tuple[Tensor, QuietStarOutput]]
Evaluate = Callable[[QuietStar], dict[str, float]]


def thought_loss(model: Any, texts: Texts, counts: Counts, seed: int) -> tuple[Tensor, QuietStarOutput]:
    """The Quiet-STaR objective on one part of a step's texts, as ``QuietStar.texts`` makes it."""
    out = model(instance("thought_loss: texts", texts, Texts), counts=counts, seed=seed)
    return out.loss, out


@alone_in_out(TrainConfig)
def train(
    qs: QuietStar,
    data: Sequence[Example],
    config: TrainConfig,
    loss: Loss = thought_loss,
    evaluate: Evaluate | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
    evaluate_first: bool = False,
) -> list[dict[str, float]]:
    """Train ``qs`` in place.

    Writes ``config.out/metrics.jsonl``, one line per step, and checkpoints. After SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C in any
    process the current step is finished and saved. All processes started by torchrun or accelerate launch call this with the
    same arguments.

    Args:
        data: examples by index: input_ids [L] and optionally labels, anchors, document_ids, thought_ids [P,N,T]. Texts of
            different lengths are padded on the right.
        loss: the loss of one part of a step; default the Quiet-STaR objective.
        evaluate: called every ``config.eval_every`` steps, without gradients and in evaluation mode.
        resume: "auto" for the newest whole checkpoint of ``config.out``, if there is one, or the path of a checkpoint.
        progress: show a bar, or on a stderr that is no terminal a line every ten seconds, and a line for each evaluation.
        evaluate_first: call ``evaluate`` before the first step too, unless ``config.eval_every`` is 0; the line of step 1 has
            the results as eval_0_*.

    Returns:
        The metrics of every step since the start of the run.

    Raises:
        Interrupted: after a signal, once the checkpoint is written.
        ValueError: no data, more processes than texts in a step, a checkpoint that is damaged or has other settings, or another
            run is writing to ``config.out``.
        FloatingPointError: the loss is not finite. It comes a step later, before anything is saved.
        OSError: a file could not be written; older checkpoints are not affected. ConnectionError, a subclass, if another
            process ended; finished steps are saved unless weights are sharded or updated several times per step.
    """
    _check(qs, data, config, loss, evaluate, resume, progress)
    flag("train: evaluate_first", evaluate_first)
    if warning := step_size_warning(qs.thought_config, config.learning_rate):
        warnings.warn(f"train: {warning}", stacklevel=3)
    run = Run(qs, config, data, loss, evaluate, resume)
    with Display(config.steps, run.done, progress and run.main) as display, processes.Signals() as signals:
        stop = run.go(display, signals, evaluate_first)
    for tracker in run.accelerator.trackers:  # accelerator.end_training would also end the process group
        tracker.finish()
    if stop:  # even after the last step: the caller may have more to do
        raise processes.Interrupted(run.finished, run.checkpoint)
    return run.metrics.lines


class Run:
    """A run between its steps: what it holds, and what it does before, in and after each.

    Attributes:
        done: steps that were finished before this call; ``finished``, by now.
        checkpoint: the newest one; None before the first.
        saved: steps that the newest checkpoint of this call has.
        pending: number, figures, learning rate and seconds of the last step, whose figures the device may still be computing.
        first_scores: what the evaluation before the first step found.
    """

    def __init__(
        self,
        qs: QuietStar,
        config: TrainConfig,
        data: Sequence[Example],
        loss: Loss,
        evaluate: Evaluate | None,
        resume: str | os.PathLike | None,
    ):
        self.qs, self.config, self.data = qs, config, data
        self.evaluation = evaluate if config.eval_every else None
        # 1. The processes, and how they share the weights.
        trackers.check(config)
        set_seed(config.seed)
        qs.anchor_chunk = config.anchor_chunk
        if config.fast_linear:
            fast_linear(qs)
        processes.process_state()
        tracked = {"log_with": config.tracker, "project_dir": config.out} if config.tracker else {}
        self.accelerator = accelerator = Accelerator(mixed_precision=config.precision, **tracked)
        self.main = accelerator.is_main_process
        self.strategy = strategy = processes.find_strategy(config)
        processes.check_processes(accelerator.num_processes, config, strategy)
        # 2. The checkpoint to continue from, before weights are sharded.
        self.checkpoint = checkpoint = find_checkpoint(resume, config, qs.thought_config)
        self.done = done = snapshots.load(checkpoint, qs) if checkpoint else 0
        steps = processes.in_each_process(accelerator, done)
        if len(set(steps)) > 1:
            raise ValueError(f"train: all processes must see the same out={config.out}, but found checkpoints of steps {steps}")
        places.check_free(config.out, done, config.steps)
        # 3. The model and its optimizer.
        if strategy != "no":
            shard(qs, strategy, config.precision)
        weights = [p for p in qs.parameters() if p.requires_grad]
        optimizer = make_optimizer(config.optimizer, weights, config.learning_rate, config.weight_decay)
        if checkpoint:
            load_optimizer(checkpoint, optimizer)
        prepared: Any = accelerator.prepare_optimizer(optimizer) if strategy != "no" else accelerator.prepare(qs, optimizer)
        self.model: Any
        self.model, self.optimizer = (qs, prepared) if strategy != "no" else prepared
        eager_because = None
        if accelerator.num_processes > 1 or strategy != "no":
            eager_because = "several processes share it"
        elif loss is not thought_loss:
            eager_because = "the loss is a function of yours"
        self.graphs = StepGraphs(qs, self.model, accelerator, loss, eager_because)
        # 4. What is written.
        self.settings = {"train": config.__dict__.copy(), "thoughts": qs.thought_config.to_dict()}
        if config.tracker:
            trackers.begin(accelerator, config, resume is not None, done)
        if checkpoint and resume == "auto" and self.main:
            # If the last save was killed before it did, and no other follows.
            places.remove_others(checkpoint, config.keep, later=False)
        self.metrics = Metrics(Path(config.out) / "metrics.jsonl", done, self.main, TrainingLine)
        self.finished = self.saved = done
        self.first_scores: dict[str, float] = {}
        self.pending: tuple[int, figures.Reading, float, float] | None = None

    def go(self, display: Display, signals: processes.Signals, evaluate_first: bool) -> bool:
        """All steps that are left; whether a signal ended them."""
        self.display, self.signals, config = display, signals, self.config
        try:
            with processes.naming_lost_processes():
                self.evaluate_at_start(evaluate_first)
                stop = self.stopped()
                for step in range(self.done, self.done if stop else config.steps):
                    began = time.perf_counter()
                    reading, rate = self.step(step)
                    self.finished = step + 1
                    self.finish_step()  # the step before: meanwhile the device has this one to do
                    saves = self.finished % config.save_every == 0 or self.finished == config.steps
                    due = saves or self.evaluation_due(self.finished)
                    if due:
                        reading.figures()  # waits for the device, so that the step's time is whole
                    self.pending = self.finished, reading, rate, time.perf_counter() - began
                    if due:
                        self.finish_step()
                    stop = self.stopped()
                    if saves or stop:
                        self.finish_step()
                        self.save()
                        self.accelerator.wait_for_everyone()
                    if stop:
                        break
                return self.stopped()  # also while the last step was saved
        except ConnectionError:
            self.finish_step()
            intact = self.strategy == "no" and config.updates == 1  # otherwise weights may be between two steps
            if intact and self.finished > self.saved and self.main:
                self.save()
            raise

    def step(self, step: int) -> tuple[figures.Reading, float]:
        """One optimizer step, or ``config.updates`` of them on the same thoughts: figures of all processes, and learning rate.

        It waits for a GPU only where ``prepare_parts`` or ``reward="match"`` has to.
        """
        accelerator, model, optimizer, config = self.accelerator, self.model, self.optimizer, self.config
        seed, rate = mix_seed(config.seed, step), config.rate(step)
        torch.manual_seed(mix_seed(seed, accelerator.process_index))  # for dropout
        model.train()
        parts, counts = prepare_parts(accelerator, self.qs, self.parts(step), seed, config.rollout_weights == "gathered")

        total: dict[str, Tensor] = {}
        for update in range(config.updates):
            self.graphs.zero_grad(optimizer)
            sums = []
            for i, part in enumerate(parts):
                # DDP reduces gradients at the last part only. Sharded ones are reduced after each: otherwise each process would
                # hold all of them.
                sync_later = model is not self.qs and i + 1 < len(parts)
                with accelerator.no_sync(model) if sync_later else nullcontext(), accelerator.autocast():
                    value, out = self.graphs(part, counts, seed)
                if update == 0:  # later updates reuse these thoughts, so their figures would be of old ones
                    old = out.logprob if part.old_logprob is None else part.old_logprob  # of thoughts that were given
                    parts[i] = replace(part, thought_ids=out.thought_ids, thought_lengths=out.thought_lengths, old_logprob=old)
                    sums.append(figures.sums_of(value, out, part))
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            if update == 0:  # before the weights change: if another process is lost here, no step is half done
                total = figures.reduced(accelerator, figures.add_up(sums))
            for group in optimizer.param_groups:
                group["lr"] = rate
            # A loss that is not finite must not change the weights; the error comes later, when it is read.
            clear_gradients(model, ~total["loss"].isfinite())
            optimizer.step()
            self.qs.update_base_model()
        return figures.Reading(total, counts, whole(norm)), rate

    def parts(self, step: int) -> list[Batch]:
        """This process's share of the texts of a step."""
        config, ranks = self.config, self.accelerator.num_processes
        chosen = texts_of_step(len(self.data), config.batch_size, config.seed, step)
        # As many parts in each process, none of them empty: to gather sharded weights, all must run the model as often.
        each = min(config.accumulation, len(chosen) // ranks)
        parts = collate([self.data[i] for i in chosen], chosen, ranks * each, "train: data")
        return parts[self.accelerator.process_index :: ranks]

    def finish_step(self) -> None:
        """Read the figures of the last step, if that wasn't done, evaluate where that is due, and write its line.

        Raises FloatingPointError for a loss that is not finite.
        """
        if self.pending is None:
            return
        (finished, reading, rate, seconds), self.pending = self.pending, None
        line = reading.figures()
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(f"train: the loss is {line['loss']} at step {finished}: the model's {state(self.qs)}")
        line |= {"learning_rate": rate, "seconds": seconds}
        line["tokens_per_second"] = line.pop("tokens") / seconds
        line["thoughts_per_second"] = line.pop("thoughts") / seconds
        self.display.step(line)
        if self.evaluation_due(finished):
            with suppress(processes.Abandoned):
                line |= self.evaluate(finished, "eval_")
        self.metrics.add({"step": finished, **line, **(self.first_scores if finished == 1 else {})})
        self.accelerator.log(line, step=finished)

    def evaluation_due(self, finished: int) -> bool:
        """Whether an evaluation follows this step."""
        return self.evaluation is not None and (finished % self.config.eval_every == 0 or finished == self.config.steps)

    def evaluate_at_start(self, first: bool) -> None:
        """The evaluation before the first step, or the last step's where that was abandoned."""
        with suppress(processes.Abandoned):
            if self.evaluation is not None and first and not self.done:
                self.first_scores = self.evaluate(0, "eval_0_")
            elif self.evaluation_due(self.done) and self.metrics.lacks_evaluation():
                self.metrics.complete(self.evaluate(self.done, "eval_"))

    def evaluate(self, step: int, prefix: str) -> dict[str, float]:
        """The results after ``step`` steps, which are also shown, by name with ``prefix``."""
        assert self.evaluation is not None
        self.qs.eval()
        whole_weights = gathered(self.qs) if self.config.rollout_weights == "gathered" else nullcontext()
        with torch.no_grad(), self.accelerator.autocast(), processes.watching(self.watch), whole_weights:
            scores = self.evaluation(self.qs)
        self.display.evaluation(step, scores)
        return {f"{prefix}{name}": value for name, value in scores.items()}

    def watch(self, done: int, total: int) -> None:
        """Called before each batch of an evaluation; abandons it after a signal."""
        self.display.evaluating(done, total)
        # Sharded weights are gathered in every forward, so that all processes must leave at the same one.
        if self.signals.caught if self.strategy == "no" else self.stopped():
            raise processes.Abandoned

    def save(self) -> None:
        keep, main = self.config.keep, self.main
        self.checkpoint = snapshots.save(self.config.out, self.finished, self.qs, self.optimizer, self.settings, keep, main)
        self.saved = self.finished

    def stopped(self) -> bool:
        """Whether a signal came to any process."""
        return any(processes.in_each_process(self.accelerator, self.signals.caught))


def _check(qs: Any, data: Sequence[Example], config: Any, loss: Any, evaluate: Any, resume: Any, progress: Any) -> None:
    instance("train: qs", qs, QuietStar)
    instance("train: config", config, TrainConfig)
    check_data("train: data", data)
    if not len(data):
        raise ValueError("train: data: there is no text to train on")
    check_example("train: data", data[0])
    function("train: loss", loss)
    if evaluate is not None:
        function("train: evaluate", evaluate)
    if resume is not None:
        file_path("train: resume", resume)
    flag("train: progress", progress)
    if config.updates > 1 and not qs.thought_config.ratio_clip:
        raise ValueError(f"train: updates must be 1 where ratio_clip is 0, got {config.updates}")
    anchors = qs.thought_config.anchors
    if anchors != "all" and not {"anchors", "thought_ids"}.isdisjoint(data[0]):
        raise ValueError(f"train: anchors must be 'all' where the texts bring their own anchors or thoughts, got {anchors!r}")
