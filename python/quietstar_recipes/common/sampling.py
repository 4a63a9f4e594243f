"""Completions of many prompts, from the model's own cached ``generate``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from quietstar.config import option
from quietstar.hf.ends import end_ids
from quietstar.hf.modules import dropout_off
from quietstar.run.batches import mix_seed
from quietstar.run.metrics import Pace
from quietstar_kernels.checks import check, check_at_least
from quietstar_recipes.common.branches import Ids, sharing_prompts
from quietstar_recipes.common.log import LOG
from quietstar_recipes.common.logprobs import check_length, cuda_devices, padded, positions
from quietstar_recipes.tasks import Task


@dataclass
class Sampling:
    """How a recipe samples its solutions."""

    temperature: float = option(1.0, "sampling temperature of solutions; 0 is greedy")
    top_p: float = option(1.0, "sample from the most likely tokens with this total probability")
    max_new: int = option(96, "most tokens in a solution")
    batch_size: int = option(256, "solutions to generate at once", may_differ=True)
    seed: int = option(0, "fixes problems, solutions and the order of training")

    def __post_init__(self) -> None:
        check_at_least("Sampling", self, 1, ("max_new", "batch_size"))
        check_at_least("Sampling", self, 0, ("temperature",))
        check("Sampling", self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of ``rollout``, except the seed."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "max_new", "batch_size")}


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt."""

    ids: list[int]  # up to and including the end-of-text token, or as long as allowed
    logprob: list[float]  # of each id under the model itself, not at the sampling temperature


Solutions = Sequence[Sequence[Completion]]  # of each problem


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    task: Task,
    prompts: Ids,
    k: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    shift: int = 0,
    ends: Collection[int] = (),
) -> list[list[Completion]]:
    """``k`` completions of each prompt. What prompts begin with is read once where that is faster; samples are the same.

    Args:
        temperature: 0 is greedy.
        seed: together with the batch size it fixes the samples; torch's random state stays as it was.
        batch_size: rows at once, ``k`` rows per prompt; prompts of similar length share a batch.
        shift: added to the positions of the completion.
        ends: tokens that end a completion, besides the end-of-text token; such as ``Task.step_ids``, for a single step.

    Raises:
        ValueError: a prompt that, with ``max_new`` tokens, is longer than the model's positions.
    """
    check_length(model, max(map(len, prompts), default=0) + max_new + shift)
    task.ends = {task.end_id, *end_ids(task.tokenizer, model)}
    stops = {*task.ends, *ends}
    # Long prompts first, so that those of a batch need little padding.
    rows = sorted((i for i in range(len(prompts)) for _ in range(k)), key=lambda i: -len(prompts[i]))
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if task.stop:
        options |= {"stop_strings": list(task.stop), "tokenizer": task.tokenizer}
    found: list[list[Completion]] = [[] for _ in prompts]
    pace = Pace()
    with dropout_off(model), shifted(model, shift), torch.random.fork_rng(cuda_devices(model)):
        for start in range(0, len(rows), batch_size):
            if pace.due():
                LOG.info("sampling: %s of %s completions", f"{start:,}", f"{len(rows):,}")
            chosen = rows[start : start + batch_size]
            torch.manual_seed(mix_seed(seed, start))
            begun = [prompts[i] for i in chosen]
            ids, mask = (x.to(model.device) for x in padded(begun, left=True, fill=task.end_id))
            recorder = Recorder()
            # What is generated after the last token that ends a row is dropped below.
            with sharing_prompts(model, begun, max_new):
                out = cast(Any, model).generate(
                    ids,
                    attention_mask=mask.long(),
                    position_ids=positions(mask, len(ids[0])),
                    max_new_tokens=max_new,
                    eos_token_id=list(stops),
                    pad_token_id=task.end_id,
                    logits_processor=LogitsProcessorList([recorder]),
                    **options,
                )
            logprobs = recorder.finish(out).tolist()
            for i, written, logprob in zip(chosen, out[:, ids.shape[1] :].tolist(), logprobs, strict=True):
                length = next((j for j, x in enumerate(written, 1) if x in stops), len(written))
                found[i].append(Completion(written[:length], logprob[:length]))
    return found


class Recorder(LogitsProcessor):
    """Records the log-probability of each token that ``generate`` chooses, without keeping all logits."""

    def __init__(self) -> None:
        self.before: Tensor | None = None  # log-probabilities [R,V] of the next token
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._record(input_ids)
        self.before = scores.float().log_softmax(-1)
        return scores

    def finish(self, ids: Tensor) -> Tensor:
        """Log-probabilities [R,T], given all ids at the end."""
        self._record(ids)
        return torch.cat(self.chosen, 1)

    def _record(self, ids: Tensor) -> None:
        if self.before is not None:
            self.chosen.append(self.before.gather(1, ids[:, -1:]))


def shifted(model: PreTrainedModel, shift: int) -> AbstractContextManager[Any]:
    """In this context, the positions of what ``generate`` decodes after a prompt are ``shift`` larger.

    The model raises ValueError where it isn't given positions and a cache, which tells a prompt from what comes after it.
    """

    def shift_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)  # versions of transformers name it differently
        if cache is None or kwargs.get("position_ids") is None:
            raise ValueError(f"{type(model).__name__} can't shift positions: generate gave it no position_ids, or no cache")
        return args, kwargs | ({"position_ids": kwargs["position_ids"] + shift} if cache.get_seq_length() > 0 else {})

    return model.register_forward_pre_hook(shift_positions, with_kwargs=True) if shift else nullcontext()
