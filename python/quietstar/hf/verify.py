"""The self-test: packed and stepwise thoughts of a model must equal ordinary forwards over the text prefix and the thought."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.hf.architectures import check_model
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.decoder import PackedPass, ThoughtStore, decode_rows
from quietstar.hf.lm_head import find_lm_head
from quietstar.hf.modules import backbone, dropout_off, embeddings, not_finite
from quietstar_kernels import ThoughtLayout

_TEXT, _ROWS, _THOUGHTS = 12, 4, 2
_verified: set[tuple[type, torch.dtype]] = set()


@dataclass(frozen=True)
class VerifyReport:
    """For each part the largest difference of hidden states, relative to the largest hidden state, and the bound on it.

    Attributes:
        text: packed text rows, compared with the text alone.
        thoughts: packed thought rows, compared with the text prefix and the thought.
        stepwise: thought rows decoded step by step over stored keys and values, compared with the same.
        bound: the largest difference that rounding can explain at the model's dtype.
    """

    text: float
    thoughts: float
    stepwise: float
    bound: float

    @property
    def ok(self) -> bool:
        return max(self.text, self.thoughts, self.stepwise) <= self.bound

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {getattr(self, part):.1e}" for part in ("text", "thoughts", "stepwise"))
        return f"{parts} (bound {self.bound:.0e}): {'ok' if self.ok else 'differs'}"


@torch.no_grad()
def verify(model: PreTrainedModel) -> VerifyReport:
    """Compare packed and stepwise forwards of ``model`` with ordinary ones, on a text of 12 random tokens.

    Windows and chunks longer than this text are not tested.

    Raises:
        ValueError: the model type can't think, or its attention loses the layout.
    """
    check_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(WRAPPED_NAME)
    hand_on_layout(model)
    try:
        with dropout_off(model):
            find_lm_head(model)
            return _compare(model)
    finally:
        model.set_attn_implementation(before)


def verify_once(model: PreTrainedModel) -> None:
    """Run ``verify`` on the first model of each class and dtype; raises ValueError if a part differs."""
    key = (type(model), model.dtype)
    if key in _verified:
        return
    report = verify(model)
    if not report.ok:
        raise ValueError(f"{type(model).__name__} cannot think: its rows differ from ordinary forwards: {report}")
    _verified.add(key)


def _compare(model: PreTrainedModel) -> VerifyReport:
    embed = embeddings(model)
    device, V = embed.weight.device, len(embed.weight)
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(V, (1, _TEXT), generator=generator).to(device)
    anchors = torch.tensor([[0, _TEXT // 2, _TEXT - 1]], device=device)
    layout = ThoughtLayout.at(anchors, _THOUGHTS, _ROWS, text_length=_TEXT)
    thought_ids = torch.randint(V, (1, layout.P, _THOUGHTS, _ROWS), generator=generator).to(device)

    packed_ids = torch.cat([text_ids, thought_ids.flatten(1)], 1)
    packed = decode_rows(model, embed(packed_ids), layout.position_ids(), PackedPass(layout))
    text, thoughts = packed[0, :_TEXT], packed[0, _TEXT:].unflatten(0, thought_ids.shape[1:])
    stepwise = _stepwise(model, text_ids, thought_ids, layout)

    true_text = _ordinary(model, text_ids)[0]
    alone = [
        _ordinary(model, torch.cat([text_ids[:, : anchor + 1], thought[None]], 1))[0, anchor + 1 :]
        for place, anchor in enumerate(anchors[0].tolist())
        for thought in thought_ids[0, place]
    ]
    true_thoughts = torch.stack(alone).unflatten(0, (layout.P, layout.N))
    if not bool(true_text.isfinite().all() and true_thoughts.isfinite().all()):
        raise not_finite(model, "on random tokens")
    return VerifyReport(
        text=_difference(text, true_text),
        thoughts=_difference(thoughts, true_thoughts),
        stepwise=_difference(stepwise, true_thoughts),
        bound=1e-4 if model.dtype in (torch.float32, torch.float64) else 0.1,
    )


def _stepwise(model: PreTrainedModel, text_ids: Tensor, thought_ids: Tensor, layout: ThoughtLayout) -> Tensor:
    embed = embeddings(model)
    store = ThoughtStore(layout)
    decode_rows(model, embed(text_ids), layout.text_position_ids(), store.prefill())
    positions = layout.position_ids()[:, layout.L :].view(1, -1, _ROWS)
    rows = thought_ids.flatten(1, 2)
    steps = [decode_rows(model, embed(rows[:, :, s]), positions[:, :, s], store.decode(s))[0] for s in range(_ROWS)]
    return torch.stack(steps, 1).unflatten(0, (layout.P, layout.N))


def _ordinary(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state


def _difference(got: Tensor, truth: Tensor) -> float:
    return float((got.float() - truth.float()).abs().max() / truth.float().abs().max())
