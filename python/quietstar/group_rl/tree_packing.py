"""TRL's AsyncGRPO on any GPU with Triton and on CPUs: its packed rows as a ``ThoughtLayout``.

AsyncGRPO runs what its samples have in common once: the samples of a microbatch are one row, their prefix trie, cut into
segments in depth-first order. Its own attention gathers keys and values along the path of each segment, for kernels that
transformers loads from the Hub, which know no sinks. Here each key is read where it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quietstar.group_rl.shared_prompt import TESTED
from quietstar.hf.architectures import wrong_with_layout
from quietstar.hf.attention import thought_forward
from quietstar.hf.decoder import ThoughtPass
from quietstar_kernels import ThoughtLayout, thought_attention

# What the constructor of TRL's trainer looks at to refuse sinks.
REFUSAL = 'any(name.endswith(".sinks") for name, _ in model.named_parameters())'


class TreeRowPass(ThoughtPass):
    """The attention calls of one forward over a row of TRL's ``TreeRow.pack``, which says what the tensors hold."""

    def __init__(self, kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_path: int):
        super().__init__(longest_path)
        device = kv_index.device
        first, paths = cu_seqlens_q.long(), cu_seqlens_k.long()
        length = first.diff()
        depth = paths.diff() - length
        above = kv_index[paths[:-1] + depth - 1]  # the row before a segment on its path; of a root it means nothing
        # One wait for the device in a forward, for four numbers of each segment.
        first, length, depth, above = torch.stack([first[:-1], length, depth, above]).cpu()
        # Roots are documents of the text, which comes first in a layout.
        root = depth == 0
        ends = length[root].cumsum(0)
        anchors = (ends[root.cumsum(0) - 1] - 1)[~root]
        parent = torch.searchsorted(first, above, right=True) - 1
        parents = torch.where(root[parent], -1, (~root).cumsum(0)[parent] - 1)[~root]
        lo = (ends - length[root]).repeat_interleave(length[root])
        self.layout = ThoughtLayout.tree(anchors[None], parents[None], length[~root][None], lo=lo[None]).to(device)
        self.order = self.back = None
        if (root[1:] & ~root[:-1]).any():
            order = (~root).int().repeat_interleave(length).argsort(stable=True)
            self.order, self.back = order.to(device), order.argsort().to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        if self.order is None:
            return thought_attention(q, k, v, self.layout, **options)
        q, k, v = (x.index_select(2, self.order) for x in (q, k, v))
        return thought_attention(q, k, v, self.layout, **options).index_select(2, self.back)


_passes = WeakTensorKeyDictionary()  # by the tree_kv_index of a forward, which all its layers get


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    tree_max_seqlen_q: int,
    tree_max_seqlen_k: int,
    **options: Any,
) -> tuple[Tensor, None]:
    """Instead of TRL's function: query [1,H,N,K] to [1,N,H,E]."""
    if tree_kv_index not in _passes:
        if error := wrong_with_layout(module.config, in_attention_only=True):  # TRL asks for the types of layers alone
            raise error
        _passes[tree_kv_index] = TreeRowPass(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, tree_max_seqlen_k)
    return thought_forward(module, query, key, value, attention_mask, thought_layout=_passes[tree_kv_index], **options)


def register_tree_attention() -> str:
    """Let TRL's ``AsyncGRPOTrainer`` pack trees without kernels from the Hub: on any GPU with Triton and on CPUs.

    Call it before the trainer is made. It replaces the attention that TRL registers with transformers, for the whole process.
    Models with attention sinks, such as GPT-OSS, are then no longer refused.

    Returns:
        The name that TRL registers, "tree_fa3".

    Raises:
        ValueError: TRL isn't there, or a release that packs trees in another way; tested with TRL 1.16.
    """
    op = "register_tree_attention"
    try:
        from trl.experimental.async_grpo import async_grpo_trainer, packing
        from trl.trainer import utils

        trainer: Any = async_grpo_trainer
        name, replaced = packing.TREE_ATTENTION, packing.tree_attention
        peak, count, load = utils.get_peak_flops_per_device, utils.compute_flops_per_token, utils.create_model_from_path
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{op}: trl must be release {TESTED}, whose AsyncGRPO packs trees, got: {error}") from error
    wanted, found = ([*inspect.signature(x).parameters][:10] for x in (tree_attention, replaced))
    if found != wanted:
        raise ValueError(f"{op}: tree_attention must be as in trl {TESTED}, got the parameters {', '.join(found)}")
    packing.tree_attention = tree_attention  # the trainer registers it again
    packing.register_tree_attention()
    trainer.get_peak_flops_per_device = partial(_peak_flops, peak)
    trainer.compute_flops_per_token = partial(_flops_per_token, count)
    if REFUSAL in inspect.getsource(trainer.AsyncGRPOTrainer.__init__):
        trainer.create_model_from_path = partial(_with_sinks_hidden_once, load)
    return name


def _peak_flops(peak: Callable[..., float | None], accelerator: Any, dtype: str) -> float | None:
    """TRL's, which asks CUDA for the name of the device; None where there is no CUDA."""
    return peak(accelerator, dtype) if accelerator.device.type == "cuda" else None


def _flops_per_token(count: Callable[..., int], config: Any, length: int) -> int:
    """TRL's, which expects names in a config of experts that GPT-OSS doesn't have."""
    config = copy(config)
    config.moe_intermediate_size = getattr(config, "moe_intermediate_size", getattr(config, "intermediate_size", None))
    config.decoder_sparse_step = getattr(config, "decoder_sparse_step", 1)
    return count(config, length)


def _with_sinks_hidden_once(load: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A model whose sinks the trainer's refusal doesn't see, which is the first to ask for its parameters."""
    model: Any = load(*args, **kwargs)

    def without_sinks() -> Iterator[tuple[str, nn.Parameter]]:
        del model.named_parameters
        return ((name, x) for name, x in model.named_parameters() if not name.endswith(".sinks"))

    model.named_parameters = without_sinks
    return model
