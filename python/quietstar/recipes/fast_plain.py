"""The last step of Fast Quiet-STaR: a language model that never thinks is trained against the losses of one that does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar import QuietStar
from quietstar.arguments.fields import check, check_at_least, check_positive, check_types
from quietstar.config import option
from quietstar.evaluation.losses import token_losses
from quietstar.files.writing import replaced
from quietstar.recipes.common.log import LOG
from quietstar.recipes.common.logprobs import evaluating, positions
from quietstar.recipes.common.optimization import adamw, clipped_step
from quietstar.recipes.common.progress import Progress, State
from quietstar.recipes.common.rounds import load_model
from quietstar.run.batches import Example, collate, mix_seed, texts_of_step
from quietstar.run.resume import Settings
from quietstar.run.signals import Signals

MODEL, PLAIN = "model", "plain"  # what it writes: the best checkpoint, and the state to resume from


@dataclass
class Config:
    """What all parts of a run share, and how the plain model is trained; defaults are those of the published code.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/fast", "folder of the run", may_differ=True)
    batch_size: int = option(8, "texts per optimizer step")
    eval_every: int = option(10, "steps between evaluations; the best checkpoint is kept")
    save_every: int = option(50, "steps between checkpoints to resume from", may_differ=True)
    seed: int = option(0, "fixes the order of texts, thoughts and sampled tokens")
    steps: int = option(150, "optimizer steps per stage")
    plain_steps: int | None = option(None, "optimizer steps of the plain model; default: twice those of a stage")
    plain_rate: float = option(1e-6, "learning rate of the plain model, constant")
    plain_weight: float = option(1e6, "factor of the plain model's loss; not for the objective likelihood")
    plain_temperature: float = option(3.0, "temperature of the probabilities in that loss; not for the objective likelihood")
    objective: Literal["sampled", "observed", "likelihood"] = option(
        "sampled", "reinforce a token sampled from the plain model, or the text's; likelihood: plain training, a control"
    )

    def __post_init__(self) -> None:
        check_types("fast", self)
        check_at_least("fast", self, 1, ("batch_size", "eval_every", "save_every", "steps"))
        check("fast", self, "plain_steps", self.plain_steps is None or self.plain_steps >= 1, "None, or 1 or more")
        check_positive("fast", self, ("plain_rate", "plain_weight", "plain_temperature"))

    @property
    def plain_updates(self) -> int:
        """Optimizer steps of the plain model."""
        return 2 * self.steps if self.plain_steps is None else self.plain_steps


class RunState(State):
    """Where a run is; ``best`` is the lowest held-out loss."""

    best: float | None


def train(
    student: PreTrainedModel,
    teacher: QuietStar,
    data: Sequence[Example],
    held_out: Sequence[Example],
    config: Config,
) -> tuple[PreTrainedModel, float]:
    """Train ``student`` in place, without thoughts, against the teacher's loss at each token; keep the best by held-out loss.

    Returns:
        The best model and its held-out loss.
    """
    folder = Path(config.out) / MODEL
    texts = split_documents(data)
    progress = Progress(Path(config.out) / PLAIN, Settings.of(config), {"step": 0, "best": None}, True, RunState)
    optimizer = adamw(student, config.plain_rate, weight_decay=0.0)
    if progress.begun:
        progress.load(student, optimizer)
    state = progress.state
    left = config.plain_updates - state["step"]
    LOG.info("%s: %s updates of a model without thoughts", progress.metrics.path.parent, f"{left:,}")
    losses = teacher_losses(teacher.eval(), texts, config.batch_size) if left else []

    def keep_the_better() -> float:
        value = loss(student, held_out, config.batch_size)
        if state["best"] is None or value < state["best"]:
            state["best"] = value
            with replaced(folder) as temporary:
                student.save_pretrained(temporary)
                if teacher.tokenizer is not None:
                    teacher.tokenizer.save_pretrained(temporary)
        return value

    with Signals() as signals:
        if state["best"] is None:
            keep_the_better()  # the initial model too, since training may only make it worse
        while state["step"] < config.plain_updates:
            line = update(student, optimizer, texts, losses, config, state["step"])
            state["step"] += 1
            if state["step"] % config.eval_every == 0 or state["step"] == config.plain_updates:
                line["held_out"] = keep_the_better()
            progress.metrics.add(line)
            progress.save_if(signals, config.save_every, student, optimizer)
    progress.save(student, optimizer)
    return load_model(folder, student), state["best"]


def update(
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    texts: Sequence[Example],
    losses: Sequence[Tensor],
    config: Config,
    step: int,
) -> dict[str, Any]:
    """One update of the plain model; returns its figures, with the loss before it is multiplied by its weight."""
    began = time.perf_counter()
    chosen = texts_of_step(len(texts), config.batch_size, config.seed, step)
    torch.manual_seed(mix_seed(config.seed, step))
    with evaluating(student):  # no dropout: tokens are scored by the model that they were sampled from
        logits, targets, _ = predictions(student, [texts[i] for i in chosen])
    logprob = logits.log_softmax(-1)
    value, reward = objective(logprob, targets, torch.cat([losses[i] for i in chosen]).to(logprob.device), config)
    optimizer.zero_grad()
    value.backward()
    norm = clipped_step(optimizer, student, 1.0, f"fast: step {step + 1} of the plain model")
    weight = 1.0 if config.objective == "likelihood" else config.plain_weight
    figures = {
        "loss": float(value.detach()) / weight,
        "reward": float(reward.mean()),
        "rewarded": float((reward > 0).float().mean()),
    }
    return {"step": step + 1, **figures, "grad_norm": norm, "seconds": time.perf_counter() - began}


def objective(logprob: Tensor, targets: Tensor, teacher: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The training loss, and the reward [tokens] for predicting a token better than the thinking model does.

    The published loss is minus the mean of the reward times the log-probability, at a temperature, of a token sampled from the
    model, so not always the text's.

    Args:
        logprob: [tokens,V], with a gradient.
        targets: int64 [tokens], the text's tokens.
        teacher: [tokens], the thinking model's loss, nats.
    """
    nll = -logprob.gather(1, targets[:, None])[:, 0]
    reward = torch.relu(teacher - nll.detach())
    if config.objective == "likelihood":
        return nll.mean(), reward
    action = targets if config.objective == "observed" else logprob.detach().exp().multinomial(1)[:, 0]
    chosen = (logprob / config.plain_temperature).log_softmax(-1).gather(1, action[:, None])[:, 0]
    return -config.plain_weight * (reward * chosen).mean(), reward


def predictions(model: PreTrainedModel, texts: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fp32 [tokens,V], targets [tokens] and the index of the text [tokens], one text after another."""
    (batch,) = collate([{"input_ids": x["input_ids"], **_mask(x)} for x in texts], list(range(len(texts))), 1)
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    on = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool, device=ids.device)
    for row, text in enumerate(texts):
        on[row, : len(text["input_ids"]) - 1] = target_mask(text).to(on.device)
    logits = model(ids, attention_mask=mask, position_ids=positions(mask, 1), use_cache=False).logits[:, :-1]
    return logits[on].float(), ids[:, 1:][on], on.nonzero()[:, 0]


def target_mask(text: Example) -> Tensor:
    """bool [L-1], the positions whose next token is a target, as in training with thoughts."""
    ids = text["input_ids"]
    on = (text.get("labels", ids)[1:] != -100) & (text.get("attention_mask", torch.ones_like(ids))[1:] != 0)
    if "anchors" in text:
        thinks = torch.zeros(len(ids), dtype=torch.bool)
        thinks[text["anchors"][text["anchors"] >= 0].long()] = True
        on &= thinks[:-1]
    return on


def split_documents(data: Sequence[Example]) -> list[Example]:
    """Packed examples split into their documents, without those that are too short to predict anything."""
    texts: list[Example] = []
    for example in data:
        of_all = example.get("document_ids", torch.zeros_like(example["input_ids"]))
        begin, lengths = 0, of_all.unique_consecutive(return_counts=True)[1]
        for end in lengths.cumsum(0).tolist():
            text = {name: x[begin:end] for name, x in example.items() if name not in ("document_ids", "thought_ids", "anchors")}
            if "anchors" in example:
                anchors = example["anchors"]
                text["anchors"] = anchors[(anchors >= begin) & (anchors < end)] - begin
            texts.append(text)
            begin = end
    return [text for text in texts if len(text["input_ids"]) >= 3 and bool(target_mask(text).any())]


def teacher_losses(teacher: QuietStar, texts: Sequence[Example], batch_size: int) -> list[Tensor]:
    """The loss of each target token after a greedy thought, fp32, for each text.

    Only these losses are kept, not the logits.
    """
    found = token_losses(teacher, texts, batch_size, controls=False)
    return list(found.mixed.float().split(found.text.bincount(minlength=len(texts)).tolist()))


def loss(model: PreTrainedModel, texts: Sequence[Example], batch_size: int) -> float:
    """Loss of a model without thoughts, nats: the mean over texts of each text's mean, as for the model with thoughts."""
    nll, text_index = token_nll(model, texts, batch_size)
    counts = text_index.bincount()
    return float((text_index.bincount(nll)[counts > 0] / counts[counts > 0]).mean())


@torch.no_grad()
def token_nll(model: PreTrainedModel, texts: Sequence[Example], batch_size: int) -> tuple[Tensor, Tensor]:
    """fp64 [tokens], the loss of each target token without thoughts, and the index of its text; as ``token_losses``."""
    parts = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            chosen = range(start, min(start + batch_size, len(texts)))
            logits, targets, row = predictions(model, [texts[i] for i in chosen])
            nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            parts.append((nll.double().cpu(), start + row.cpu()))
    nll, text_index = (torch.cat(column) for column in zip(*parts, strict=True))
    return nll, text_index


def _mask(text: Example) -> Example:
    return {"attention_mask": text.get("attention_mask", torch.ones_like(text["input_ids"]))}
