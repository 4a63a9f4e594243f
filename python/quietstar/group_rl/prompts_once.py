"""Lets ``generate`` read the shared beginnings of prompts once; its rows decode through one cache of text and branches."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from quietstar.hf.decoder import PackedPass, ThoughtStore, decode_rows, decode_step
from quietstar.hf.layouts import layouts_on
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import embeddings, unwrapped
from quietstar_kernels import ThoughtLayout

# Options with which ``generate`` calls the model in another way than once for the prompts and once per token.
_OTHER_CALLS = ("num_beams", "prompt_lookup_num_tokens", "guidance_scale", "cache_implementation", "prefill_chunk_size")


def generates_row_by_row(model: PreTrainedModel) -> bool:
    """Whether ``generate`` calls the model as ``prompts_once`` expects, by the model's own generation config."""
    config = model.generation_config
    return config is not None and all(getattr(config, name, None) in (None, 1) for name in _OTHER_CALLS)


@contextmanager
def prompts_once(model: PreTrainedModel, head: LMHead, prompts: Sequence[Sequence[int]], max_new: int) -> Iterator[None]:
    """In this context, one call of ``model.generate`` for these prompts reads once what they begin with.

    Only the forward is replaced. transformers still samples tokens and ends rows.
    Logits are those of an ordinary forward up to rounding.
    """
    inner = unwrapped(model)
    decoder = _Decoder(inner, head, prompts, max_new)

    @functools.wraps(type(inner).forward)  # ``generate`` reads the signature
    def forward(self: PreTrainedModel, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=decoder(input_ids)[:, None])

    with layouts_on(inner):
        inner.forward = types.MethodType(forward, inner)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del inner.forward


class _TreePass(PackedPass):
    """The tree of the prompts; the store gets what the rows of each prompt left, which are at ``rows`` of the tree."""

    def __init__(self, layout: ThoughtLayout, store: ThoughtStore, rows: Tensor):
        super().__init__(layout)
        self.store, self.rows = store, rows

    def keep(self, *rows: Tensor, width: int | None = None) -> None:
        self.store.take_text(self.calls, *(x[:, :, self.rows] for x in rows), width=width)


class _Decoder:
    """Logits [R,V] after the prompts, and then after each row's next token."""

    def __init__(self, model: PreTrainedModel, head: LMHead, prompts: Sequence[Sequence[int]], max_new: int):
        self.model, self.head, self.step = model, head, -1
        numbers: dict[tuple[int, ...], int] = {}
        of_prompt = torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts])
        lengths = torch.tensor([len(ids) for ids in numbers])
        last = lengths.cumsum(0) - 1
        lo = (last + 1 - lengths).repeat_interleave(lengths)
        order = of_prompt.argsort(stable=True)  # rows of a prompt together, as anchors ascend
        layout = ThoughtLayout.at(last[of_prompt[order]][None], 1, max(1, max_new - 1), lo=lo[None])
        device = model.device
        self.tree, self.tree_ids, rows = ThoughtLayout.from_sequences(list(numbers), device)
        self.rows = torch.cat(rows)
        self.last, self.order, self.back = (x.to(device) for x in (last[of_prompt], order, order.argsort()))
        self.store = ThoughtStore(layout.to(device))

    def __call__(self, input_ids: Tensor) -> Tensor:
        embed = embeddings(self.model)
        if self.step < 0:
            tree_pass = _TreePass(self.tree, self.store, self.rows)
            hidden = decode_rows(self.model, embed(self.tree_ids), self.tree.position_ids(), tree_pass)[0, self.rows[self.last]]
        else:
            rows = embed(input_ids[self.order, -1])[None]
            hidden = decode_step(self.model, rows, self.store, self.step)[0, self.back]
        self.step += 1
        return self.head.logits(hidden)
