"""Decoder layers like Llama's in few launches, in forwards with thoughts; other forwards run transformers' own code.

A layer becomes one of a subclass, which keeps its weights, hooks and name. What something else has changed runs as it is: of a
layer with adapters, quantized weights, hooks or a kernel of its own, only the rest is fused. ``torch.compile`` fuses by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from quietstar.hf.attention import MaskArguments, thought_forward
from quietstar.hf.decoder import ThoughtPass, running
from quietstar.hf.merged_weights import plain, products, untouched
from quietstar_kernels import gated_activation, rms_norm

# Families, by how the names of their classes begin, and what the weights of their norms are counted from.
FAMILIES = {"Llama": 0.0, "Mistral": 0.0, "Qwen2": 0.0, "Qwen3": 0.0, "Gemma": 1.0, "Gemma2": 1.0, "Gemma3": 1.0}
_STATIC = ("default", "linear", "llama3", "yarn")  # rotary embeddings whose frequencies no position changes
_ACTIVATIONS = {type(ACT2FN["silu"]): "silu", type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh"}


def fuse_layers(model: nn.Module) -> None:
    """Make the decoder layers of these families, their last norm and rotary embedding run in few launches in such forwards."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind: Any = type(child)
            for family in FAMILIES:
                of = FUSED.get((name if name in ("norm", "rotary_emb") else "", kind.__name__.removeprefix(family)))
                file = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
                if of is not None and kind.__module__ == file and not issubclass(kind, Fused):
                    child.__class__ = _fused(of, kind, family)  # as FSDP does: state, hooks and copies stay as they are
                    if isinstance(child, FusedRotary):
                        child.prepare()


@cache
def _fused(of: type[Fused], kind: Any, family: str) -> type[nn.Module]:
    """It has the name of the module's class, by which others choose modules to wrap."""
    names = {"family": family, "unfused": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (of, kind), names)


class Fused:
    """Of a class of transformers, which is ``unfused``."""

    family: str
    unfused: type[nn.Module]

    def __deepcopy__(self, memo: dict) -> Fused:
        copied: Fused = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles name classes, and only transformers' own has a name."""
        return object.__new__, (self.unfused,), self.__dict__


class FusedNorm(Fused):
    """The last norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or running.get() is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        return _norm(cast(nn.Module, self), self.family, hidden_states)[1]


class FusedRotary(Fused):
    """cos and sin of a forward, where its frequencies never change."""

    rope_type: Any
    inv_freq: Tensor
    frequencies: Tensor  # fp32 [K], of both halves of a head, where there is no meta device and none ever changes
    attention_scaling: float
    register_buffer: Any

    def prepare(self) -> None:
        if isinstance(self.rope_type, str) and self.rope_type in _STATIC and not self.inv_freq.is_meta:
            self.register_buffer("frequencies", self.inv_freq.float().repeat(2), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        thoughts = None if torch.compiler.is_compiling() or args else running.get()
        if thoughts is None or not hasattr(self, "frequencies"):
            return super().forward(x, position_ids, *args)  # type: ignore[misc]
        cos, sin = thoughts.angles(self.frequencies.float(), position_ids)
        scale = self.attention_scaling
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


class FusedLayer(Fused):
    """x + attention(norm(x)), and then that + mlp(norm(that)). Gemma 2 and 3 also have norms of what is added."""

    self_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        thoughts, known = kwargs.get("thought_layout"), isinstance(kwargs.get("attention_mask"), MaskArguments) and not args
        if not isinstance(thoughts, ThoughtPass) or not known or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        before = getattr(self, "pre_feedforward_layernorm", None)
        # 1. Attention.
        _, normed = self._norm(self.input_layernorm, hidden_states, into_product=True)
        added = self._attention(normed, **kwargs)
        if before is not None:
            _, added = self._norm(self.post_attention_layernorm, added)
        # 2. The MLP. ``hidden_states`` is a new tensor from here on.
        norm = self.post_attention_layernorm if before is None else before
        hidden_states, normed = self._norm(norm, hidden_states, added, into_product=True)
        wide = self._gated(normed, thoughts)
        if wide is None:
            added = self.mlp(normed)
        elif before is None and _adds(self.mlp.down_proj, wide, hidden_states):
            hidden_states.flatten(0, -2).addmm_(wide.flatten(0, -2), self.mlp.down_proj.weight.T)
            return hidden_states
        else:
            added = self.mlp.down_proj(wide)
        if before is not None:
            _, added = self._norm(self.post_feedforward_layernorm, added)  # type: ignore[attr-defined]
        return hidden_states + added

    def merged_groups(self) -> Iterator[tuple[nn.Linear, ...]]:
        """Layers whose products have the same input."""
        if self._ours(self.self_attn, "Attention"):
            yield self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj
        if self._ours(self.mlp, "MLP"):
            yield self.mlp.gate_proj, self.mlp.up_proj

    def _ours(self, module: nn.Module, kind: str) -> bool:
        """Whether a part of the layer is what transformers made."""
        return type(module).__name__ == self.family + kind and untouched(module)

    def _norm(
        self, norm: nn.Module, x: Tensor, added: Tensor | None = None, into_product: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""
        if not self._ours(norm, "RMSNorm") or isinstance(norm.weight, DTensor):
            total = x if added is None else x + added
            return total, norm(total)
        return _norm(norm, self.family, x, added, into_product)

    def _attention(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        attn = self.self_attn
        norms = [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
        cos, sin = position_embeddings
        ours = self._ours(attn, "Attention") and all(self._ours(norm, "RMSNorm") for norm in norms)
        if not ours or cos.shape[-1] != attn.head_dim:
            return attn(x, position_embeddings=position_embeddings, **kwargs)[0]
        # 1. Queries, keys and values.
        thoughts = kwargs["thought_layout"]
        q, *others = products(x, thoughts.merged, attn.q_proj, attn.k_proj, attn.v_proj)
        widths = [y.shape[-1] for y in (q, *others)] if others else [attn.q_proj.out_features, attn.k_proj.out_features]
        heads, options = (widths[0] // attn.head_dim, widths[1] // attn.head_dim), {}
        if norms:
            weights = {"q_weight": norms[0].weight, "k_weight": norms[1].weight}
            options = weights | {"eps": _epsilon(norms[0]), "offset": FAMILIES[self.family]}
        q, k, v = thoughts.rotate(q, *(others or (None, None)), cos, sin, heads, **options)
        # 2. As in transformers' layer.
        softcap = attn.attn_logit_softcapping if self.family == "Gemma2" else None
        dropout = attn.attention_dropout if attn.training else 0.0
        mask = kwargs.pop("attention_mask")
        out, _ = thought_forward(attn, q, k, v, mask, scaling=attn.scaling, dropout=dropout, softcap=softcap, **kwargs)
        return attn.o_proj(out.flatten(2))

    def _gated(self, x: Tensor, thoughts: ThoughtPass) -> Tensor | None:
        """The input of the MLP's last product; None for an MLP that isn't known."""
        mlp = self.mlp
        activation = _ACTIVATIONS.get(type(mlp.act_fn))
        if activation is None or not self._ours(mlp, "MLP") or not untouched(mlp.act_fn):
            return None
        gate, *up = products(x, thoughts.merged, mlp.gate_proj, mlp.up_proj)
        return gated_activation(gate, up[0] if up else None, activation)


def _norm(
    norm: nn.Module, family: str, x: Tensor, added: Tensor | None = None, into_product: bool = False
) -> tuple[Tensor, Tensor]:
    """x + added, and its norm, which is cast for a product if autocast does that."""
    offset, weight = FAMILIES[family], cast(Tensor, norm.weight)
    dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
    if into_product and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return rms_norm(x, weight, _epsilon(norm), added, offset, dtype)


def _epsilon(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps  # type: ignore[return-value]


def _adds(linear: nn.Module, x: Tensor, total: Tensor) -> bool:
    """Whether a product can be added where ``total`` is."""
    if torch.is_grad_enabled() or not plain(linear) or linear.bias is not None:
        return False
    return total.dtype == x.dtype == linear.weight.dtype and not torch.is_autocast_enabled(x.device.type)


# By the name of a module, where it matters, and its class's without the family.
FUSED = {("", "DecoderLayer"): FusedLayer, ("norm", "RMSNorm"): FusedNorm, ("rotary_emb", "RotaryEmbedding"): FusedRotary}
