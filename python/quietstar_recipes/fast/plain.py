"""The last step of Fast Quiet-STaR: a language model that never thinks learns from one that does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from quietstar import QuietStar
from quietstar.checkpoints.pretrained import save_model
from quietstar.config import option
from quietstar.evaluation.scoring import one_thought
from quietstar.files.writing import replaced
from quietstar.hf.modules import dropout_off
from quietstar.run.batches import Example, collate, mix_seed, texts_of_step
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check, check_at_least, check_positive, check_types
from quietstar_recipes.common.log import LOG
from quietstar_recipes.common.logprobs import positions
from quietstar_recipes.common.saving import Progress, load_model
from quietstar_recipes.common.training import adamw, train

MODEL, PLAIN = "model", "plain"  # what it writes: the best checkpoint, and the state to resume from
ROWS = 2**13  # thought rows of a packed forward at a time


@dataclass
class PlainConfig:
    """What all parts of a run share, and how the plain model is trained; defaults are those of the published code.

    The paper's own formula (arXiv 2505.17746, by a summary of it: unverified) is ``plain_start="curriculum"``,
    ``objective="observed"`` and ``clamp_reward=False``. The objective distil is ours.
    """

    out: str = option("runs/fast", "folder of the run", may_differ=True)
    batch_size: int = option(8, "texts per optimizer step")
    eval_every: int = option(10, "steps between evaluations; the best checkpoint is kept")
    save_every: int = option(50, "steps between checkpoints to resume from", may_differ=True)
    seed: int = option(0, "fixes the order of texts, thoughts and sampled tokens")
    steps: int = option(150, "optimizer steps per stage")
    plain_start: Literal["base", "curriculum"] = option(
        "base", "what the plain model begins as: the original model, or the last stage's without its thoughts"
    )
    plain_steps: int | None = option(None, "optimizer steps of the plain model; default: twice those of a stage")
    plain_rate: float = option(1e-6, "learning rate of the plain model, constant")
    plain_weight: float = option(1e6, "factor of the plain model's loss; for the objectives sampled and observed")
    plain_temperature: float = option(3.0, "temperature of the probabilities in that loss")
    clamp_reward: bool = option(
        True, "set rewards below 0 to 0; off, a token that the thinking model predicts better becomes less likely"
    )
    objective: Literal["sampled", "observed", "distil", "likelihood"] = option(
        "sampled",
        "reinforce a token sampled from the plain model, or the text's (observed); distil: cross entropy to the thinking "
        "model's predictions; likelihood: plain training, a control",
    )

    def __post_init__(self) -> None:
        check_types("fast", self)
        check_at_least("fast", self, 1, ("batch_size", "eval_every", "save_every", "steps"))
        check("fast", self, "plain_steps", self.plain_steps is None or self.plain_steps >= 1, "None, or 1 or more")
        check_positive("fast", self, ("plain_rate", "plain_weight", "plain_temperature"))

    @property
    def reinforces(self) -> bool:
        """Whether the objective rewards tokens; the others are cross entropies."""
        return self.objective in ("sampled", "observed")

    @property
    def plain_updates(self) -> int:
        """Optimizer steps of the plain model."""
        return 2 * self.steps if self.plain_steps is None else self.plain_steps


def initial(model: PreTrainedModel, teacher: QuietStar, config: PlainConfig) -> PreTrainedModel:
    """The plain model before its training: a copy of ``model``, with the teacher's weights if ``plain_start`` says so."""
    student = copy.deepcopy(model)
    if config.plain_start == "curriculum":
        student.load_state_dict(teacher.model.state_dict())
    return student


def train_plain(
    student: PreTrainedModel, teacher: QuietStar, data: Sequence[Example], held_out: Sequence[Example], config: PlainConfig
) -> tuple[PreTrainedModel, float]:
    """Train ``student`` in place, without thoughts, on the teacher's predictions.

    Returns:
        The best model by held-out loss, and that loss.
    """
    folder, texts = Path(config.out) / MODEL, split_documents(data)
    progress = Progress(Path(config.out) / PLAIN, Settings.of(config), {"step": 0, "best": None}, True)
    state, optimizer = progress.state, adamw(student, config.plain_rate, weight_decay=0.0)
    progress.load(student, optimizer)
    left = f"{config.plain_updates - state['step']:,}"
    LOG.info("%s: %s updates of a model without thoughts", progress.metrics.path.parent, left)
    teacher.eval()

    def keep_the_better() -> float:
        """Measure the model, and save it if it is the best so far."""
        value = loss(student, held_out, config.batch_size)
        if state["best"] is None or value < state["best"]:
            state["best"] = value
            with replaced(folder) as temporary:
                save_model(student, teacher.tokenizer, temporary)
        return value

    def after(line: dict[str, Any]) -> None:
        if state["step"] % config.eval_every == 0 or state["step"] == config.plain_updates:
            line["held_out"] = keep_the_better()

    if state["best"] is None:
        keep_the_better()  # the initial model too, since training may only make it worse
    gradient = partial(plain_gradient, student, teacher, texts, config)
    options: dict[str, Any] = {"progress": progress, "save_every": config.save_every}
    train(student, optimizer, config.plain_updates, gradient, name="fast", after=after, **options)
    return load_model(folder, student), state["best"]


def plain_gradient(
    student: PreTrainedModel, teacher: QuietStar, texts: Sequence[Example], config: PlainConfig, step: int
) -> dict[str, Any]:
    """Leave the gradient of an update in the student; returns its figures, the loss without its weight."""
    chosen = [texts[i] for i in texts_of_step(len(texts), config.batch_size, config.seed, step)]
    thinking = next_token_logprobs(teacher, chosen)
    torch.manual_seed(mix_seed(config.seed, step))
    with dropout_off(student):  # no dropout: tokens are scored by the model that they were sampled from
        logits, targets, _ = predictions(student, chosen)
    logprob = logits.log_softmax(-1)
    value, earned = objective(logprob, targets, thinking.to(logprob.device), config)
    value.backward()
    weight = config.plain_weight if config.reinforces else 1.0
    rewards = {"reward": float(earned.mean()), "rewarded": float((earned > 0).float().mean())}
    return {"loss": float(value.detach()) / weight, **rewards}


def objective(logprob: Tensor, targets: Tensor, teacher: Tensor, config: PlainConfig) -> tuple[Tensor, Tensor]:
    """The training loss, and the reward [tokens] for predicting a token better than the thinking model does.

    The published loss is minus the mean of the reward times the log-probability, at a temperature, of a token sampled from the
    model, so not always the text's.

    Args:
        logprob: [tokens,V], with a gradient.
        targets: int64 [tokens], the text's tokens.
        teacher: [tokens,V], the thinking model's log-probabilities.
    """
    nll, thinking = (-x.gather(1, targets[:, None])[:, 0] for x in (logprob, teacher))
    earned = thinking - nll.detach()
    earned = torch.relu(earned) if config.clamp_reward else earned
    if config.objective == "likelihood":
        return nll.mean(), earned
    if config.objective == "distil":
        return -(teacher.exp() * logprob).sum(1).mean(), earned
    action = targets if config.objective == "observed" else logprob.detach().exp().multinomial(1)[:, 0]
    chosen = (logprob / config.plain_temperature).log_softmax(-1).gather(1, action[:, None])[:, 0]
    return -config.plain_weight * (earned * chosen).mean(), earned


def predictions(model: PreTrainedModel, texts: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fp32 [tokens,V], targets [tokens] and the index of the text [tokens], one text after another."""
    ids, mask, on = padded(texts, model.device)
    logits = model(ids, attention_mask=mask, position_ids=positions(mask, 1), use_cache=False).logits[:, :-1]
    return logits[on].float(), ids[:, 1:][on], on.nonzero()[:, 0]


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


@torch.no_grad()
def loss(model: PreTrainedModel, texts: Sequence[Example], batch_size: int) -> float:
    """Loss of a model without thoughts, nats: the mean over texts of each text's mean, as for the model with thoughts."""
    parts = []
    with dropout_off(model):
        for start in range(0, len(texts), batch_size):
            chosen = range(start, min(start + batch_size, len(texts)))
            logits, targets, row = predictions(model, [texts[i] for i in chosen])
            nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            parts.append((nll.double().cpu(), start + row.cpu()))
    nll, text_index = (torch.cat(column) for column in zip(*parts, strict=True))
    counts = text_index.bincount()
    return float((text_index.bincount(nll)[counts > 0] / counts[counts > 0]).mean())


@torch.no_grad()
def next_token_logprobs(teacher: QuietStar, texts: Sequence[Example]) -> Tensor:
    """Log-probabilities fp32 [tokens,V] of the token after each greedy thought: one thought before each target.

    They are mixed and normalised, as in generation. Made for one batch at a time, so that nothing needs room for all texts.
    """
    one = one_thought(teacher)
    ids, mask, on = padded(texts, teacher.start_embedding.device)
    anchors = pad_sequence([row.nonzero()[:, 0] for row in on], True, -1)
    parts = []
    for some in anchors.split(max(1, ROWS // (len(texts) * one.thought_config.rows)), 1):
        thoughts = one.think(ids, mask, anchors=some, seed=0, greedy=True)
        layout = one.thinker.layout(ids, mask, some, thought_lengths=thoughts.thought_lengths)
        text, thought = one.thinker.states(layout, ids, thoughts.thought_ids)
        parts.append(one.thinker.end_states(thought, thoughts.thought_lengths)[:, :, 0, 0])
    h_thought = torch.cat(parts, 1)[anchors >= 0]
    return one.thinker.mixed_logprobs(text[:, :-1][on], h_thought).float().log_softmax(-1)


def padded(texts: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and attention mask, int64 [B,L], and where the next token is a target, bool [B,L-1]."""
    rows: list[Example] = [{name: x[name] for name in ("input_ids", "attention_mask") if name in x} for x in texts]
    (batch,) = collate(rows, list(range(len(rows))), 1)
    on = pad_sequence([target_mask(text) for text in texts], True, False)
    return batch["input_ids"].to(device), batch["attention_mask"].to(device), on.to(device)


def target_mask(text: Example) -> Tensor:
    """bool [L-1], the positions whose next token is a target, as in training with thoughts."""
    ids = text["input_ids"]
    on = (text.get("labels", ids)[1:] != -100) & (text.get("attention_mask", torch.ones_like(ids))[1:] != 0)
    if "anchors" in text:
        thinks = torch.zeros(len(ids), dtype=torch.bool)
        thinks[text["anchors"][text["anchors"] >= 0].long()] = True
        on &= thinks[:-1]
    return on
