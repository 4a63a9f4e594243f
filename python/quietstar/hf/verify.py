"""The self-test: packed and stepwise thoughts of a model must equal ordinary forwards over the text prefix and the thought.

They differ by rounding, which a trained model may amplify a thousandfold. So the unit of a difference is measured in the model
itself: by how much a row of an ordinary forward changes if every module's output is off by one in its last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.hf import adapters
from quietstar.hf.architectures import check_model, convolutions
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.decoder import PackedPass, TextPass, ThoughtStore, decode_rows, decode_step
from quietstar.hf.lm_head import LMHead, find_lm_head
from quietstar.hf.modules import backbone, device_of, dropout_off, embeddings, not_finite, unwrapped
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.delta import CHUNK

_TEXT, _ROWS, _THOUGHTS = 12, 4, 2
_LONGER = CHUNK + 8  # crosses a chunk of recurrent layers
_TEXTS = 3  # on a single one, rounding may choose another expert
_DRAWS = 4
_verified: set[tuple[type, torch.dtype]] = set()


@dataclass(frozen=True)
class VerifyReport:
    """For each part the largest difference of a row's hidden state, in units of the most that rounding changed in that row.

    Attributes:
        text: packed text rows, compared with a forward of the text.
        thoughts: packed thought rows, compared with the text prefix and the thought.
        stepwise: thought rows decoded step by step over stored keys and values, compared with the same.
        bound: 16 in fp32; 2 in fp16 and bf16, where products sum in fp32. A wrong mask or position gives thousands in fp32.
    """

    text: float
    thoughts: float
    stepwise: float
    bound: float

    @property
    def ok(self) -> bool:
        return all(part <= self.bound for part in (self.text, self.thoughts, self.stepwise))  # NaN is not

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {getattr(self, part):.2g}" for part in ("text", "thoughts", "stepwise"))
        return f"{parts} times rounding (bound {self.bound:g}): {'ok' if self.ok else 'differs'}"


@torch.no_grad()
def verify(model: PreTrainedModel) -> VerifyReport:
    """Compare packed and stepwise forwards of ``model`` with ordinary ones, on a text of 12 random tokens, or 40 for hybrids.

    Where they differ, two more texts are tried. Windows and chunks longer than this text are not tested.

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
            for seed in range(_TEXTS):
                report = _compare(model, seed)
                if report.ok:
                    break
            return report
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


def checked_head(model: PreTrainedModel) -> LMHead:
    """The output head of a model, perhaps with adapters; raises ValueError if its rows can't be packed."""
    inner = unwrapped(model)
    check_model(model)
    adapters.check_rows(model)
    hand_on_layout(inner)
    verify_once(inner)
    return find_lm_head(inner)


def _compare(model: PreTrainedModel, seed: int) -> VerifyReport:
    embed = embeddings(model)
    device, V = device_of(model), embed.num_embeddings
    generator = torch.Generator().manual_seed(seed)
    L = _LONGER if convolutions(model) else _TEXT
    text_ids = torch.randint(V, (1, L), generator=generator).to(device)
    anchors = torch.tensor([[0, L // 2, L - 1]], device=device)
    layout = ThoughtLayout.at(anchors, _THOUGHTS, _ROWS, text_length=L)
    thought_ids = torch.randint(V, (1, layout.P, _THOUGHTS, _ROWS), generator=generator).to(device)

    packed_ids = torch.cat([text_ids, thought_ids.flatten(1)], 1)
    packed = decode_rows(model, embed(packed_ids), layout.position_ids(), PackedPass(layout))
    store, rows = ThoughtStore(layout), thought_ids.flatten(1, 2)
    decode_rows(model, embed(text_ids), layout.text_position_ids(), TextPass(store))
    steps = [decode_step(model, embed(rows[:, :, s]), store, s) for s in range(_ROWS)]
    stepwise = torch.stack(steps, 2).flatten(1, 2)

    truth = _alone(model, text_ids, thought_ids, layout)
    with _rounded(model, generator):
        drawn = _alone(model, text_ids, thought_ids, layout, _DRAWS)
    unit = _distance(drawn, truth).amax(0).clamp(min=torch.finfo(torch.float32).tiny)  # [M]
    if not bool(truth.isfinite().all() and unit.isfinite().all()):
        raise not_finite(model, "on random tokens")
    difference = _distance(packed, truth)[0] / unit
    return VerifyReport(
        text=float(difference[:L].max()),
        thoughts=float(difference[L:].max()),
        stepwise=float((_distance(stepwise, truth[:, L:])[0] / unit[L:]).max()),
        bound=16 if truth.dtype in (torch.float32, torch.float64) else 2,  # sharded weights may be of another
    )


def _alone(model: PreTrainedModel, text_ids: Tensor, thought_ids: Tensor, layout: ThoughtLayout, copies: int = 1) -> Tensor:
    """[copies,M,D]: ordinary forwards of the text, and of every thought after its prefix."""
    rows = [_ordinary(model, text_ids.expand(copies, -1))]
    for place, anchor in enumerate(layout.anchor[0].tolist()):
        prefix = text_ids[:, : anchor + 1].expand(copies * _THOUGHTS, -1)
        hidden = _ordinary(model, torch.cat([prefix, thought_ids[0, place].repeat(copies, 1)], 1))
        rows.append(hidden[:, anchor + 1 :].unflatten(0, (copies, _THOUGHTS)).flatten(1, 2))
    return torch.cat(rows, 1)


def _ordinary(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state


def _distance(got: Tensor, truth: Tensor) -> Tensor:
    return (got.float() - truth.float()).norm(dim=-1)


@contextmanager
def _rounded(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """In this context, what the innermost modules return is off by one in the last place, up or down at random."""

    def off_by_one(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(off_by_one, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        last_place = torch.finfo(x.dtype if x.itemsize < 4 else torch.float32).eps  # norms compute fp64 in fp32
        signs = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
        return x + x * (last_place * signs)

    innermost = [module for module in model.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(lambda module, args, out: off_by_one(out)) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
