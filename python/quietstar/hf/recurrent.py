"""Recurrent layers of hybrid models: what transformers' functions for them do in a forward with a layout.

A layer of transformers calls its convolution and its recurrence as functions of its file, and hands keyword arguments on to
them, ``thought_layout`` too. They would drop it without a word. So they are replaced, once in each file: now where it has been
imported, else when it is. A call without a layout is passed on as it came.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from quietstar.hf.architectures import RECURRENT_FILES, WITHOUT_ATTENTION, convolutions, wrong_with_layout
from quietstar.hf.decoder import PackedPass, ThoughtPass
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import refusal
from quietstar_kernels.imports import when_imported
from quietstar_kernels.reference import wide


def _convolution(
    thought_pass: ThoughtPass, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """hidden_states [B,D,rows], weight [D,W]."""
    thought_pass.convolutions += 1
    out = thought_pass.convolve(hidden_states.transpose(1, 2).to(weight.dtype), weight, bias).transpose(1, 2)
    return (out if activation is None else ACT2FN[activation](out)).to(hidden_states.dtype)


def _delta_rule(
    thought_pass: ThoughtPass, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query and key [B,rows,G,K], value [B,rows,H,E], beta [B,rows,H], g too, or [B,rows,H,K]."""
    _refuse_cache(initial_state)
    q, k = (wide(x).transpose(1, 2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    out = thought_pass.recur(q, k, *(x.transpose(1, 2) for x in (value, g, beta)))
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _mamba_scan(
    thought_pass: ThoughtPass, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
    D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), **_: Any,
) -> Tensor:  # fmt: skip
    """hidden_states [B,rows,H,E], dt [B,rows,H], A [H], B and C [B,rows,G,K], D [H]: Mamba-2 (arXiv 2405.21060)."""
    _refuse_cache(initial_states)
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = wide(softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    x = wide(hidden_states)
    v = (x * dt[..., None]).transpose(1, 2)
    q, k = (wide(y).transpose(1, 2) for y in (C, B))
    out = thought_pass.recur(q, k, v, (dt * A.to(dt.dtype)).transpose(1, 2), None).transpose(1, 2)
    return (out if D is None else out + D[:, None] * x).contiguous()


def _lost(_: ThoughtPass, model: PreTrainedModel, *__: Any, **___: Any) -> None:
    raise wrong_with_layout(model.config) or ValueError(
        f"{type(model).__name__} doesn't hand thought_layout on: give it to model.backbone, and call the head yourself"
    )


def _cached_step(thought_pass: ThoughtPass, *_: Any, **__: Any) -> None:
    _refuse_cache(True)


# By the name that a file has for it.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _cached_step,
    "chunk_kimi_delta_attention": _delta_rule,
    "recurrent_kimi_delta_attention": _cached_step,
    "mamba2_chunk_scan": _mamba_scan,
    "mamba2_selective_state_update": _cached_step,
    # A layer runs its parts where the kernel for all of them returns nothing.
    "mamba2_split_conv1d_scan_combined": lambda *_, **__: None,
}


_TAKES_LAYOUTS = "_quietstar_takes_layouts"  # an attribute, which functools.wraps hands on to what a user puts around


def _refuse_cache(state: Any) -> None:
    if state is not None:
        raise ValueError("with a thought layout there can be no cache: leave out past_key_values and set use_cache=False")


def _with_layouts(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, thought_layout: Any = None, **kwargs: Any) -> Any:
        if thought_layout is None:
            return original(*args, **kwargs)
        if any(kwargs.get(name) is not None for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx")):
            raise ValueError("with a thought layout there can be no cu_seqlens or seq_idx: documents are in the layout")
        thought_pass = PackedPass(thought_layout) if isinstance(thought_layout, ThoughtLayout) else thought_layout
        if not isinstance(thought_pass, ThoughtPass):
            raise refusal("thought_layout", "a ThoughtLayout", thought_layout)
        return ours(thought_pass, *args, **kwargs)

    setattr(function, _TAKES_LAYOUTS, True)
    return function


def given_layout() -> PreTrainedModel | None:
    """The model further up the call stack that was given a ``thought_layout``; at attention without one, it got lost.

    In every call of a torch module, the module is a local named ``self`` and its keywords one named ``kwargs``. Only
    transformers' models count: a caller's own functions and modules may hold a layout for another call.
    """
    if torch.compiler.is_compiling():
        return None
    frame = sys._getframe(1).f_back
    while frame is not None:
        module, keywords = frame.f_locals.get("self"), frame.f_locals.get("kwargs")
        if isinstance(module, PreTrainedModel) and isinstance(keywords, dict) and keywords.get("thought_layout") is not None:
            return module
        frame = frame.f_back
    return None


def _checked_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every forward of these models asks for the mask of its recurrent layers: the place to look at what is asked for.

    None is needed: padding is in the layout, and CUDA graphs can't read a mask, as transformers does.
    """

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if (model := given_layout()) is not None:
            _refuse_cache(kwargs.get("past_key_values"))
            check_layers(model)
            return None
        return original(*args, **kwargs)

    return function


def _without_mask(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's padding. With a layout a mask comes here only if the caller prepared one for each kind of layer."""

    @functools.wraps(original)
    def function(hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and given_layout() is not None:
            raise ValueError("with a thought layout attention_mask must be None or [B,M], got a prepared mask tensor")
        return original(hidden_states, attention_mask)

    return function


def take_layouts(file: ModuleType) -> None:
    """Replace the functions of one of transformers' files."""
    file.apply_mask_to_padding_states = _without_mask(file.apply_mask_to_padding_states)  # type: ignore[attr-defined]
    file.create_recurrent_attention_mask = _checked_mask(file.create_recurrent_attention_mask)  # type: ignore[attr-defined]
    for name, ours in _FUNCTIONS.items():
        if original := getattr(file, name, None):
            setattr(file, name, _with_layouts(original, ours))
    if head := getattr(file, "Mamba2ForCausalLM", None):
        head.forward = _with_layouts(head.forward, _lost)


def refuse_layouts(file: ModuleType) -> None:
    """Of a file whose models have no attention, where a layout that they drop would show."""
    for model in list(vars(file).values()):
        if isinstance(model, type) and issubclass(model, PreTrainedModel) and model.__module__ == file.__name__:
            model.forward = _with_layouts(model.forward, _lost)  # type: ignore[method-assign]


def _check_functions(layer: nn.Module) -> None:
    """Raises ValueError if a layer's forward is not that of a file whose functions take a layout, as they are now."""
    name = next(cls.__module__ for cls in type(layer).__mro__ if "forward" in vars(cls))  # FSDP's classes have no forward
    if name not in FILES:
        raise ValueError(f"{type(layer).__name__}: its forward is not transformers', and may drop the layout")
    file = sys.modules[name]
    for function in _FUNCTIONS:
        if not getattr(getattr(file, function, None), _TAKES_LAYOUTS, not hasattr(file, function)):
            raise ValueError(f"{name}.{function} was replaced after quietstar was imported: do so before")


def check_layers(model: nn.Module) -> None:
    """Raises ValueError if a recurrent layer, which has a convolution, would not call its file's functions with a layout."""
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Conv1d))
    own = [name.removesuffix(".original_module") for name in found if ".modules_to_save." not in name]  # peft's copies
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in own]
    for layer in layers:
        forward = vars(layer).get("_old_forward", vars(layer).get("forward"))  # the former is that of accelerate's hooks
        if forward is not None and getattr(forward, "__func__", None) is not type(layer).forward:
            raise ValueError(f"{type(layer).__name__}: something else runs the layer, and no layout: leave out use_kernels")
        _check_functions(layer)
    if len(layers) != convolutions(model):
        raise ValueError(f"{type(model).__name__}: a kernel replaces its recurrent layers, and takes no layout")


FILES = frozenset(f"transformers.models.{name}.modeling_{name}" for name in RECURRENT_FILES)
for _file in FILES:
    when_imported(_file, take_layouts)
for _name in WITHOUT_ATTENTION:
    when_imported(f"transformers.models.{_name}.modeling_{_name}", refuse_layouts)
