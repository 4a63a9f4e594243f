"""Quiet-STaR in four functions: wrap a model, train it to think, sample its thoughts, predict with them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.evaluation.scoring import one_thought
from quietstar.run.batches import Example
from quietstar.training import Loss, train
from sums.runs import Run, Setting
from sums.task import AT_EQUALS, DASH, STEPS, direct_lines


def think_with(model: LlamaForCausalLM, setting: Setting, run: Run, seed: int) -> QuietStar:
    """A copy of the model that can think. Its start and end vectors begin as the dash around an aside in the text."""
    config = ThoughtConfig(
        thoughts=setting.thoughts,
        thought_tokens=STEPS,
        lookahead=setting.lookahead,
        policy_weight=setting.policy_weight if run.reinforce else 0,
        embedding_scale=run.embedding_scale,
        embedding_init=DASH,
    )
    torch.manual_seed(seed)  # for the mixing head
    return QuietStar(copy.deepcopy(model), config).eval()


def train_to_think(
    qs: QuietStar,
    lines: Sequence[Example],
    setting: Setting,
    out: Path,
    seed: int,
    loss: Loss,
    evaluate: Callable[[QuietStar], dict[str, float]],
) -> list[dict[str, float]]:
    """Train ``qs`` in place; returns the metrics of each step, ten of which include those of ``evaluate``."""
    config = TrainConfig(
        out=str(out),
        steps=setting.steps,
        batch_size=setting.lines,
        learning_rate=1e-3,
        warmup=20,
        seed=seed,
        eval_every=max(1, setting.steps // 10),
        save_every=setting.steps,
        keep=1,
    )
    return train(qs, lines, config, loss=loss, evaluate=evaluate, progress=sys.stderr.isatty())


def own_thoughts(qs: QuietStar, digits: Tensor, anchors: Sequence[int] = (AT_EQUALS,), seed: int | None = None) -> Tensor:
    """One thought per position, ids [lines,P,1,4]: sampled with a seed, greedy without."""
    places = torch.tensor(anchors).expand(len(digits), -1)
    return one_thought(qs).think(direct_lines(digits), anchors=places, seed=seed, greedy=seed is None).thought_ids


@dataclass
class Prediction:
    """Log-probabilities [lines,P,14] of a token: without the thought, mixed, from the thought alone; and w [lines,P]."""

    base: Tensor
    mixed: Tensor
    thought: Tensor
    weight: Tensor


def predict(qs: QuietStar, digits: Tensor, thought_ids: Tensor, anchors: Sequence[int] = (AT_EQUALS,)) -> Prediction:
    """Predict the token after each anchor of the lines without an aside, from thoughts [lines,P,1,4]."""
    return predict_lines(qs, direct_lines(digits), thought_ids, anchors)


@torch.no_grad()
def predict_lines(qs: QuietStar, lines: Tensor, thought_ids: Tensor, anchors: Sequence[int], ahead: int = 1) -> Prediction:
    """Predict the token ``ahead`` positions after each anchor, given the tokens between."""
    thinker = qs.with_config(replace(one_thought(qs).thought_config, lookahead=ahead)).thinker
    layout = thinker.layout(lines, anchors=torch.tensor(anchors).expand(len(lines), -1))
    text, thought = thinker.states(layout, lines, thought_ids)
    h_base = thinker.base_states(layout, text)[:, :, -1]
    h_thought = thinker.end_states(thought, None)[:, :, 0, -1]
    return Prediction(
        base=thinker.logprobs(h_base),
        mixed=thinker.mixed_logprobs(h_base, h_thought),
        thought=thinker.logprobs(h_thought),
        weight=thinker.mix(h_base, h_thought).weight,
    )
