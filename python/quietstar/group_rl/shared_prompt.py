"""Group RL where what completions share runs once, in TRL's trainers: prompts, first turns, results of tools.

GRPO (arXiv 2402.03300) and RLOO (arXiv 2402.14740) sample a group of completions of each prompt, and TRL repeats the prompt for
each of them. Here prompts with completions are a tree of ``ThoughtLayout.from_sequences``, without padding, in which each
token that several of them begin with is one row. Log-probabilities and entropies come from hidden states, without logits. The
loss is TRL's own, and so are its masks of what tools and environments said.

    class Trainer(SharedPrompts, GRPOTrainer):
        pass
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from quietstar.group_rl.completions import EndTokens, end_logprobs, through, without_padding
from quietstar.group_rl.likelihood_reward import LikelihoodReward
from quietstar.group_rl.shared_logprobs import model_and_head
from quietstar.hf import adapters
from quietstar.hf.architectures import check_model
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.modules import is_sharded, unmark_gguf, unwrapped
from quietstar.hf.positions import check_room, rotary_limits

TESTED = "1.16"  # the release that the tests run
# Values of GRPO's loss_type that give each completion the same weight in any microbatch of an optimizer step.
SUMS = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


class SharedPrompts(Trainer):
    """Put it before ``trl.GRPOTrainer`` or ``trl.RLOOTrainer``: ``class Trainer(SharedPrompts, GRPOTrainer): pass``.

    Each optimizer step is that of the trainer after it, up to rounding, if the model has neither dropout nor learned positions.
    What differs:

    - The model runs with attention "quietstar_wrapped". It is plain sdpa where no prompts are shared, as in ``generate``.
    - TRL shuffles the completions that it has generated before it cuts them into microbatches. Here those that begin alike are
      brought together again within an optimizer step, so that small microbatches share too. Their losses add up to TRL's;
      logged means over a microbatch are over other completions.
    - Where a loss depends on which completions share a microbatch (``loss_type="bnpo"``, ``top_entropy_quantile`` below 1, an
      entropy bonus), microbatches stay as TRL cuts them.
    - Positions count from a prompt's first token, as in generation. TRL counts padding on the left; this matters for learned
      positions only.
    - Attention dropout is ignored, with a warning. Other dropout draws other values, once for a shared token.

    Tested with TRL 1.16.

    Raises:
        ValueError: a model whose attention can't take a layout, a TRL release without the method that this one replaces, or
            an option that shared prompts don't support.
    """

    # Of TRL's trainers.
    model: Any
    args: Any
    ref_model: Any
    temperature: float
    aux_loss_enabled: bool
    reward_funcs: list[Any]
    _buffered_inputs: list[dict[str, Any]]  # the microbatches of a generation
    _step: int  # microbatches so far

    # What ``_check_release`` expects: a method that is replaced, its first parameters, and who has it.
    _hook, _trainers = "_get_per_token_logps_and_entropies", "GRPOTrainer or RLOOTrainer"
    _parameters = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    _parameters += ["compute_entropy", "compute_aux_loss"]
    _window = range(0)  # the values of ``_step`` in the optimizer step under way; none outside ``train``

    def __init__(self, *args: Any, **kwargs: Any):
        self._check_release()
        model = args[0] if args else kwargs.get("model")
        # Accelerate leaves the mixed precision of an earlier trainer around a model's forward.
        if before := getattr(model, "__dict__", {}).pop("_original_forward", None):
            model.forward = before  # type: ignore[union-attr]  # a name has no __dict__
        if isinstance(model, nn.Module):  # transformers trains none that it calls quantized
            unmark_gguf(unwrapped(model))
        super().__init__(*args, **kwargs)
        self._check_options()
        check_model(self.model)
        adapters.check_rows(self.model)
        models = [self.model] + ([] if self.ref_model is None else [self.accelerator.unwrap_model(self.ref_model)])
        for model in models:
            model.set_attn_implementation(WRAPPED_NAME)
            hand_on_layout(unwrapped(model))
        # A reference is sharded already where weights are, and with ZeRO-3 so is the model: the first forward checks them.
        if not is_sharded(self.model):
            model_and_head(type(self).__name__, self.model)
        for reward in self.reward_funcs:
            if isinstance(reward, LikelihoodReward):
                reward.trainer = self

    def _check_release(self) -> None:
        """Without this, another TRL release would silently repeat prompts."""
        stock = getattr(super(), self._hook, None)
        name = type(self).__name__
        if stock is None:
            mixin = next(cls.__name__ for cls in type(self).mro() if "_hook" in vars(cls))
            raise ValueError(f"{name}: put {mixin} before trl's {self._trainers}, whose {self._hook} it replaces")
        found = list(inspect.signature(stock.__func__).parameters)[: len(self._parameters)]
        if found != self._parameters:
            raise ValueError(f"{name}: {self._hook} must be as in trl {TESTED}, got the parameters {', '.join(found)}")

    def _check_options(self) -> None:
        for refused, why in (
            (
                self.is_fsdp_enabled and not self.accelerator.is_fsdp2,
                "FSDP1 can't run here: set fsdp_version: 2 in Accelerate's configuration",
            ),
            (
                any(getattr(self.accelerator.parallelism_config, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")),
                "layers and texts can't be divided over ranks: leave out tensor, context and sequence parallelism",
            ),
            (getattr(self, "_is_vlm", False), "prompts must be text alone, got a processor of images"),
            (self.aux_loss_enabled, "the router's loss counts repeated prompts: set router_aux_loss_coef=0"),
            (self.args.use_liger_kernel, "liger's layers don't take a layout: leave out use_liger_kernel"),
            (self.args.torch_compile, "the packed length changes with every step: leave out torch_compile"),
            (
                getattr(self.args, "use_transformers_continuous_batching", False),
                "paged attention can't be switched on here: leave out use_transformers_continuous_batching",
            ),
        ):
            if refused:
                raise ValueError(f"{type(self).__name__}: {why}")

    def _generate(self, prompts: Any) -> Any:
        """TRL's prompts and completions. It doesn't hand the prompts' tokens on to rewards."""
        made = super()._generate(prompts)  # type: ignore[misc]
        self.prompt_ids = made[0]
        return made

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's microbatches of the next optimizer step."""
        samples = super().get_batch_samples(*args, **kwargs)
        self._window = range(self._step, self._step + len(samples[0]))
        return samples

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """One microbatch of TRL's inputs.

        In training, rows are sorted before across the microbatches of this optimizer step that come from one generation.
        """
        inputs = super()._prepare_inputs(generation_batch)
        if not (self.model.training and self._step in self._window and self._adds_up()):
            return inputs
        steps = len(self._buffered_inputs)
        place = self._step % steps
        first = max(0, place + self._window.start - self._step)
        after = min(steps, place + self._window.stop - self._step)
        return _sort_rows(self._buffered_inputs[first:after])[place - first]

    def _adds_up(self) -> bool:
        """Whether the loss of an optimizer step doesn't depend on which completions share a microbatch."""
        return (
            getattr(self, "loss_type", "grpo") in SUMS  # RLOO's loss is such a sum, and it has none of these options
            and getattr(self, "top_entropy_quantile", 1.0) == 1.0
            and not getattr(self, "_entropy_bonus_enabled", False)
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's method: log-probabilities and entropies [B,T] of completions of T = ``logits_to_keep`` tokens."""
        more = [name for name, value in inputs.items() if value is not None] + ["compute_aux_loss"] * compute_aux_loss
        if more:
            raise ValueError(f"{type(self).__name__}: prompts must be text alone, got {', '.join(more)}")
        inner = unwrapped(self.accelerator.unwrap_model(model))
        limits, row = rotary_limits(inner.config), input_ids.shape[1]
        check_room(type(inner).__name__, limits, row, "prompts and completions, padded as by TRL,")
        input_ids, attention_mask = torch.stack([input_ids, attention_mask]).cpu()  # the one copy from a GPU
        order = _alike_together(input_ids, attention_mask)
        parts: list[Any] = []
        for chunk in order.split(batch_size or len(order)):
            sequences, live = without_padding(input_ids[chunk], attention_mask[chunk], logits_to_keep)
            parts.append(self.end_logprobs(model, sequences, live, float(self.temperature), compute_entropy))
        back = order.argsort()
        logprob, entropy = ([part[i] for part in parts] for i in range(2))
        # In fp32, as TRL's for fp64 models too, which it compares with a quantile of theirs in fp32.
        return torch.cat(logprob)[back], torch.cat(entropy)[back].float() if compute_entropy else None, None

    def end_logprobs(
        self, model: Any, sequences: list[Tensor], live: Tensor, temperature: float = 1.0, return_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``quietstar.group_rl.completions.end_logprobs`` of a model of the trainer, through what wraps it, in its dtypes."""
        in_fp32 = getattr(self.args, "cast_lm_head_to_fp32", False)  # RLOO has no such option
        tokens = EndTokens.of(sequences, live, temperature)
        inner, head = model_and_head(type(self).__name__, model)
        answer = functools.partial(end_logprobs, inner, head, tokens, return_entropy, not in_fp32)
        with self.accelerator.autocast():
            return through(model, inner, answer)


def _alike_together(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """int64 [B], an order in which rows [B,L] that begin alike stand next to each other."""
    _, place = input_ids.masked_fill(attention_mask == 0, -1).unique(dim=0, return_inverse=True)
    return place.argsort(stable=True)


def _sort_rows(microbatches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same inputs with as many rows in each microbatch as before, sorted over all of them."""
    size = len(microbatches[0]["prompt_ids"])
    ids, mask = (
        torch.cat([torch.cat([one[f"prompt_{name}"], one[f"completion_{name}"]], 1) for one in microbatches])
        for name in ("ids", "mask")
    )
    order = _alike_together(ids, mask)
    result: list[dict[str, Any]] = [{} for _ in microbatches]
    for name, value in microbatches[0].items():
        if isinstance(value, Tensor) and value.ndim:
            parts: Sequence[Any] = torch.cat([one[name] for one in microbatches])[order].split(size)
        elif isinstance(value, list):
            rows = [row for one in microbatches for row in one[name]]
            parts = [[rows[i] for i in places.tolist()] for places in order.split(size)]
        else:  # None, or one number for all microbatches
            parts = [one[name] for one in microbatches]
        for one, part in zip(result, parts, strict=True):
            one[name] = part
    return result
