"""From the last hidden state to logits: the linear layer, scale and soft cap of a model, found once and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.hf.modules import backbone, device_of, dropout_off, not_finite, unwrapped
from quietstar_kernels import linear_logprob, sample_token


@dataclass(frozen=True)
class LMHead:
    """logits = softcap(scale * (hidden · weightᵀ + bias)), with the parameters of the model's own output layer."""

    linear: nn.Linear
    scale: float | None = None
    softcap: float | None = None

    def of(self, model: PreTrainedModel) -> LMHead:
        """The same of the layer that the model has now: casts, added tokens and adapters put another there."""
        return replace(self, linear=output_layer(model))

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden [...,D] as rows, weight and bias, all in one dtype: the weight's, or on a GPU autocast's where it is on.

        On a CPU these ops compute in fp32, and would cast a weight back.
        """
        device, dtype = hidden.device.type, self.linear.weight.dtype
        if device != "cpu" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
        return hidden.flatten(0, -2).to(dtype), self.linear.weight.to(dtype), bias

    def apply(self, op: Callable[..., Any], hidden: Tensor, *inputs: Any, **options: Any) -> Any:
        """What an operation of ``quietstar_kernels`` on rows and an output layer returns for hidden [...,D]."""
        rows, weight, bias = self.operands(hidden)
        return op(rows, weight, *inputs, bias=bias, scale=self.scale, softcap=self.softcap, **options)

    def sample(
        self, hidden: Tensor, counters: Tensor, seed: int | Tensor, temperature: float, banned: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """hidden [...,D] and counters [...,4] to ids and log-probabilities [...]; ``quietstar_kernels.sample_token``."""
        counters = counters.flatten(0, -2)
        ids, logprob = self.apply(sample_token, hidden, counters, seed, temperature=temperature, banned=banned)
        return ids.view(hidden.shape[:-1]), logprob.view(hidden.shape[:-1])

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, banned: Sequence[int] = ()) -> Tensor:
        """Log-probabilities of ``targets`` [...] given hidden [...,D]; fp32, 0 where the target is -100."""
        out = self.apply(linear_logprob, hidden, targets.flatten(), temperature=temperature, banned=banned)
        return out.view(targets.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] to logits [...,V]."""
        logits = self.linear(hidden.to(self.linear.weight.dtype))  # Mamba-2's is fp32
        logits = logits if self.scale is None else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits. Raises ValueError if it isn't linear, or has adapters that its weight doesn't show."""
    name, layer = type(unwrapped(model)).__name__, unwrapped(model).get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # peft's, around a copy that is trained as a whole
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if isinstance(layer, nn.Linear):
        return layer
    if hasattr(layer, "base_layer"):
        raise ValueError(f"{name}: only the own weight of its output head is read: leave that out of target_modules")
    raise ValueError(f"{name}: its output head must be one linear layer, got {type(layer).__name__}")


def note_tie(model: PreTrainedModel) -> None:
    """Make the config say whether output layer and embeddings are one tensor, by which what is saved is loaded."""
    head, embed = (getattr(x, "weight", None) for x in (model.get_output_embeddings(), model.get_input_embeddings()))
    tied = head is embed
    for config in (model.config, model.config.get_text_config()):
        if model._tied_weights_keys and head is not None and getattr(config, "tie_word_embeddings", tied) != tied:
            config.tie_word_embeddings = tied


def find_lm_head(model: PreTrainedModel) -> LMHead:
    """Read the scale and soft cap from the config, and check them against the model's own logits on four tokens.

    Of a sharded model inside a forward, which gathers the weights outside of layers.
    """
    linear = output_layer(model)
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    factor = getattr(config, "logit_scale", None)
    scaling = getattr(config, "logits_scaling", None)
    scales = [factor, 1 / scaling if scaling else None, scaling, None]
    layer: Any = unwrapped(model).get_output_embeddings()  # its call gathers the weight, peft's around it too
    candidates = [LMHead(layer, scale or None, cap or None) for cap in (softcap, None) for scale in scales]

    ids = torch.arange(4, device=device_of(model))[None] % linear.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad(), dropout_off(model):
        hidden = backbone(model)(**inputs).last_hidden_state
        truth = model.forward(**inputs).logits.float()
        if not bool(truth.isfinite().all()):
            raise not_finite(model, "on its first tokens")
        tolerance = 1e-2 if hidden.dtype in (torch.float16, torch.bfloat16) else 1e-4
        for head in candidates:
            if (head.logits(hidden).float() - truth).abs().max() <= tolerance * truth.abs().max():
                return replace(head, linear=linear)
    raise ValueError(f"{type(model).__name__} cannot think: its logits are not a linear map of its last hidden state")
