"""transformers' Trainer for the wrapper: its objective over a whole step, its figures in the log, its checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainerCallback, default_data_collator

from quietstar.checkpoints import native
from quietstar.config import step_size_warning
from quietstar.evaluation.alarms import alarms
from quietstar.evaluation.losses import TokenLosses, at_chosen_anchors, can_swap, figures_of, measure, with_thoughts_of_another
from quietstar.files.reading import reason_of
from quietstar.files.writing import write_whole
from quietstar.hf.modules import state
from quietstar.model import OF_TRL, QuietStar
from quietstar.objective import Counts
from quietstar.run import figures
from quietstar.run.batches import Batch, Example, collate, make_sequence_ids, mix_seed
from quietstar.run.parts import prepare_parts, same_length
from quietstar.texts import Texts
from quietstar.thinking.forward import QuietStarOutput
from quietstar_kernels.checks import flag, instance, items, refusal

EVALUATED = ("input_ids", "attention_mask", "labels", "anchors", "document_ids")


def pad_texts(examples: list[Mapping[str, Any]]) -> Batch:
    """A data collator: pads texts of different lengths on the right, labels with -100.

    Args:
        examples: what ``quietstar.train`` takes, as tensors or lists: input_ids [L] and optionally attention_mask,
            labels, anchors, document_ids, thought_ids [P,N,T].

    Raises:
        ValueError: examples that can't be padded and stacked.
    """
    rows = [_as_tensors(example) for example in items("pad_texts: examples", examples, least=1)]
    (batch,) = collate(rows, list(range(len(rows))), 1, "pad_texts: examples")
    return batch


def _as_tensors(example: Mapping[str, Any]) -> Example:
    if not isinstance(example, Mapping):
        raise refusal("pad_texts: examples: each", "a dict with input_ids", example)
    try:
        found = {name: torch.as_tensor(x) for name, x in example.items()}
        # An empty list has no numbers from which to tell a dtype.
        return {name: x if len(x) or name == "old_logprob" else x.long() for name, x in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"pad_texts: examples: a column must be numbers: {reason_of(error)}") from error


class ThoughtTrainer(Trainer):
    """``transformers.Trainer`` for a ``QuietStar``; arguments as there. For TRL, inherit from this first:
    ``class ThoughtSFTTrainer(ThoughtTrainer, SFTTrainer): pass``.

    Checkpoints are what ``QuietStar.save_pretrained`` writes, beside the Trainer's own files. Thoughts are sampled from
    ``args.seed``, the step and the text's place in it, and losses are means over the whole step: neither a resumed run nor
    other numbers of accumulation steps or processes change them by more than rounding and dropout.

    The log has, for the steps since its last line, the figures of ``metrics.jsonl``: loss_ce, policy_loss, reward, advantage,
    weight, leak_rate, dead_groups, thoughts_per_second, ... Evaluation has those of ``quietstar.evaluate``, with eval_loss for
    the loss of the next token after one greedy thought, and eval_mixing and eval_content from a second pass with another
    text's thoughts. When one of them crosses a bound of docs/online.md, a warning says so, once of a kind. ``predict`` returns
    both losses and the number of tokens of each text, [texts,3].

    Args:
        data_collator: default ``pad_texts``; under TRL its own.
        controls: whether evaluations tell the gain of content from that of mixing.

    Raises:
        ValueError: a model that isn't a QuietStar, or an option that has no meaning for its objective; sharded weights.
        FloatingPointError: the loss is not finite when it is logged.
    """

    model: Any

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, *more: Any, controls: bool = True, **options: Any
    ):
        with _seen_by_trl(model):
            super().__init__(model, args, data_collator, *more, **options)
        name = type(self).__name__
        instance(f"{name}: model", self.model, QuietStar)
        self.controls = flag(f"{name}: controls", controls)
        self._found: list[tuple[int, TokenLosses, list[Example]]] = []  # by this process in an evaluation: of each batch
        self._first: dict[str, float] = {}  # figures of the first line of the log
        self._said: set[str] = set()
        for refused, why in (
            (self.is_fsdp_enabled or self.is_deepspeed_enabled, "weights can't be sharded here, but `quietstar train` does it"),
            (self.args.n_gpu > 1, "several GPUs need a process each: start with torchrun or accelerate launch"),
            (getattr(self, "padding_free", False), "a row must hold one text: turn packing and padding_free off"),
            (getattr(self.args, "loss_type", "nll") != "nll", "the loss is the thought objective's: leave out loss_type"),
            (self.compute_loss_func, "the loss is the thought objective's: leave out compute_loss_func"),
            (self.args.neftune_noise_alpha, "thoughts are sampled and scored without noise: leave out neftune_noise_alpha"),
            (self.label_smoother, "the loss is the thought objective's: leave out label_smoothing_factor"),
        ):
            if refused:
                raise ValueError(f"{name}: {why}")
        # Trainer's own defaults don't pad labels.
        if self.data_collator is default_data_collator or (
            data_collator is None and isinstance(self.data_collator, DataCollatorWithPadding)
        ):
            self.data_collator = pad_texts
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # every weight is used
        self.model_accepts_loss_kwargs = True  # so that a loss that is divided by counts of the step isn't divided again
        self.add_callback(_FollowWeights())
        self._interval = Interval()

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **options: Any) -> Any:
        """As in ``Trainer``. True resumes from the newest checkpoint that was written to its end."""
        self._interval = Interval()
        if warning := step_size_warning(self.model.thought_config, self.args.learning_rate):
            warnings.warn(f"{type(self).__name__}: {warning}", stacklevel=2)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(str(self.args.output_dir)))
        if resume_from_checkpoint and not os.path.exists(os.path.join(resume_from_checkpoint, "optimizer.pt")):
            what = "has no state of the optimizer (save_only_model=True), which begins anew: losses will be others"
            warnings.warn(f"{type(self).__name__}: {resume_from_checkpoint} {what}", stacklevel=2)
        return super().train(resume_from_checkpoint, *more, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The parts of a step, and what its losses are divided by."""
        batches = [self._prepare_inputs(batch) for batch in islice(epoch_iterator, num_batches)]
        if not batches:
            return [], None
        least = self.model.thought_config.lookahead + 2
        parts = [{"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for batch in batches]
        parts = [self._numbered(i, part) for i, part in enumerate(same_length(self.accelerator, parts, least))]
        self.model.train()
        texts, counts = prepare_parts(self.accelerator, self.model, parts, self._seed())
        self._interval.begin_step(counts)
        # The Trainer counts tokens by the columns.
        return [part | {"texts": checked} for part, checked in zip(parts, texts, strict=True)], counts

    def _numbered(self, i: int, part: Batch) -> Batch:
        """This process's part ``i`` of a step, its texts numbered as in one batch of the whole step."""
        first = (i * self.accelerator.num_processes + self.accelerator.process_index) * self.args.train_batch_size
        rows = first + torch.arange(len(part["input_ids"]), device=part["input_ids"].device)
        return part | {"sequence_ids": make_sequence_ids(rows, part.get("document_ids"))}

    def _seed(self) -> int:
        return mix_seed(self.args.seed, self.state.global_step)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The thought objective on a part of a step.

        Args:
            num_items_in_batch: the ``Counts`` of the step, which divide the losses; None for the part's own means.
        """
        texts = inputs["texts"] if "texts" in inputs else self.model.texts(**inputs, seed=self._seed())
        out = model(texts, counts=num_items_in_batch, seed=self._seed())
        loss = out.loss
        if num_items_in_batch is not None:
            self._interval.add(out, texts)
            loss = loss * self.accelerator.num_processes  # DDP averages, but the loss is divided by counts of all processes
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        if "loss" in logs:  # neither an evaluation nor the summary at the end
            found = self._interval.end(self.accelerator)
            if not math.isfinite(found.pop("loss")):
                at = f"at step {self.state.global_step} or before"
                raise FloatingPointError(f"{type(self).__name__}: the loss is not finite {at}: the model's {state(self.model)}")
            logs.update(found)
            self._first = self._first or found
            self._warn(found, self._first)
        super().log(logs, *more, **options)

    def _warn(self, found: Mapping[str, float], first: Mapping[str, float] | None = None) -> None:
        for sentence in alarms(found, first):
            kind = sentence.split()[0]
            if kind not in self._said:
                self._said.add(kind)
                warnings.warn(f"{type(self).__name__}, step {self.state.global_step}: {sentence}", stacklevel=3)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each text the loss of the next token without a thought and with one, and the number of tokens: [B,3]."""
        inputs = self._prepare_inputs(inputs)
        texts = {name: x.cpu() for name, x in inputs.items() if name in EVALUATED}
        B = len(inputs["input_ids"])
        with self.accelerator.autocast():
            examples = [{name: x[i] for name, x in texts.items()} for i in range(B)]
            chosen = at_chosen_anchors(self.model, examples, B)
            losses, thought = measure(self.model, chosen, B, progress=False, keep=self.controls)
        self._found.append((B, losses, thought))
        tokens = losses.text.bincount(minlength=B)
        means = [losses.text.bincount(x, minlength=B) / tokens.clamp(min=1) for x in (losses.base, losses.mixed)]
        rows = torch.stack([*means, tokens], 1).to(self.args.device, torch.float32)
        labels = inputs.get("labels", inputs["input_ids"]) if self.compute_metrics else None
        return rows[:, 1].mean(), rows, labels

    def _losses(self, texts: int) -> TokenLosses:
        """Those of all batches and processes, in the order of the data, with another text's thoughts if two texts think."""
        first, parts, examples = 0, list[TokenLosses](), list[Example]()
        for size, losses, thought in _in_turn(gather_object([self._found])):
            parts.append(replace(losses, text=losses.text + first))
            examples += thought
            first += size
        if not parts:
            return TokenLosses(*torch.zeros(2, 0).double(), *torch.zeros(2, 0).long())
        columns = ("base", "mixed", "text", "place", "leaks", "length")
        found = TokenLosses(**{name: torch.cat([getattr(part, name) for part in parts]) for name in columns})
        kept = found.text < texts  # the last ones may be repeated
        found = TokenLosses(**{name: getattr(found, name)[kept] for name in columns})
        examples = examples[:texts]
        if not (self.controls and can_swap(examples)):
            return found
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = with_thoughts_of_another(examples)[rank::ranks]
        with self.accelerator.autocast():
            losses, _ = measure(self.model, own, self.args.eval_batch_size, progress=False, keep=False)
        each = [losses.mixed[losses.text == i] for i in range(len(own))]
        return replace(found, another=torch.cat(_in_turn(gather_object([each]))))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._found = []
        output: Any = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        losses = self._losses(output.num_samples)
        if len(losses.text):
            found = figures_of(losses)
            self._warn(found)
            found["loss"] = found["mixed"]
            output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in found.items()})
        self._found = []
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        contents = self.model.contents()
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            contents = replace(contents, tokenizer=self.processing_class)
        native.save(contents, folder)
        arguments = BytesIO()
        torch.save(self.args, arguments)
        write_whole(os.path.join(folder, "training_args.bin"), arguments.getvalue())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        native.restore_all(self.model.contents(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        native.restore_all(self.model.contents(), self.state.best_model_checkpoint or "")


class Interval:
    """What adds up between two lines of the log."""

    def __init__(self) -> None:
        self.began = 0.0
        self.steps = 0
        self.counts: Counts | None = None
        self.sums: dict[str, Tensor] | None = None

    def begin_step(self, counts: Counts) -> None:
        if self.counts is None:
            self.began = time.perf_counter()  # not at the last line, after which there may be an evaluation
        self.counts = counts if self.counts is None else self.counts + counts
        self.steps += 1

    def add(self, out: QuietStarOutput, part: Texts) -> None:
        sums = figures.sums_of(out.loss, out, part)
        self.sums = figures.add_up([sums] if self.sums is None else [self.sums, sums])

    def end(self, accelerator: Accelerator) -> dict[str, float]:
        """The figures of all processes, per step, text or second; begins anew."""
        assert self.counts is not None and self.sums is not None
        line = figures.Reading(figures.reduced(accelerator, self.sums), self.counts, torch.zeros(())).figures()
        seconds = time.perf_counter() - self.began
        sums = {"loss", "loss_ce", "policy_loss", "anchors"}
        found = {name: x / self.steps if name in sums else x for name, x in line.items() if name != "grad_norm"}
        found |= {f"{name}_per_second": found.pop(name) / seconds for name in ("tokens", "thoughts")}
        self.__init__()  # type: ignore[misc]
        return found


class _FollowWeights(TrainerCallback):
    """Lets an averaged base model follow the weights."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        model.update_base_model()


def newest_checkpoint(folder: str | os.PathLike) -> Path:
    """The Trainer's newest checkpoint that is whole: its trainer_state.json, written last, can be read."""
    steps = {int(found[1]): path for path in Path(folder).glob("checkpoint-*") if (found := re.search(r"-(\d+)$", path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    raise ValueError(f"{folder}: there is no whole checkpoint to resume from")


def _in_turn(lists: list[list]) -> list:
    """The items of several lists, one of each at a time: the order in which they were dealt to processes."""
    return [item for items in zip_longest(*lists) for item in items if item is not None]


@contextmanager
def _seen_by_trl(model: Any) -> Iterator[None]:
    """TRL's trainers set ids and tags in a transformers model, and give it a forward for their own loss: here both are the
    language model's, and the wrapper keeps its forward."""
    if not isinstance(model, QuietStar):
        yield
        return
    vars(model).update({name: getattr(model.model, name) for name in OF_TRL})
    try:
        yield
    finally:
        for name in (*OF_TRL, "forward"):
            vars(model).pop(name, None)
