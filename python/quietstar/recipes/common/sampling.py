"""Completions of many prompts, from a model's own cached ``generate`` or from vLLM, and log-probabilities of given ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from quietstar.config import option
from quietstar.recipes.common.log import LOG, Pace
from quietstar.recipes.tasks import Task
from quietstar.run.batches import mix_seed


@dataclass
class Sampling:
    """How a recipe writes its solutions.

    Raises:
        ValueError: a value outside its range, by name.
    """

    temperature: float = option(1.0, "of solutions; 0 takes the likeliest token each time")
    top_p: float = option(1.0, "sample from the likeliest tokens of this probability")
    max_new: int = option(96, "tokens of a solution at most")
    batch_size: int = option(256, "solutions to write at once", may_differ=True)
    seed: int = option(0, "fixes problems, solutions and the order of training")

    def __post_init__(self) -> None:
        for name in ("max_new", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Sampling: {name} must be 1 or more, got {getattr(self, name)!r}")
        if self.temperature < 0:
            raise ValueError(f"Sampling: temperature must be 0 or more, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be above 0 and at most 1, got {self.top_p!r}")

    @property
    def sampling(self) -> dict[str, Any]:
        """What ``rollout`` takes, but the seed."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "max_new", "batch_size")}


@dataclass(frozen=True)
class Completion:
    """What was generated behind one prompt.

    Attributes:
        ids: up to the end-of-text token, with it, or as long as allowed.
        logprob: of each id, under the model itself, not at the sampling temperature.
    """

    ids: list[int]
    logprob: list[float]


class VLLM:
    """The same samples from vLLM, where it is installed: pass it to ``rollout`` in the place of the model.

    Args:
        path: a checkpoint's folder or a hub name.
        options: of ``vllm.LLM``, such as gpu_memory_utilization.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, path: str, **options: Any):
        try:
            import vllm
        except ImportError as error:
            raise ValueError("the engine vllm needs the vllm package: pip install vllm, or use transformers") from error
        self.vllm = vllm
        self.engine = vllm.LLM(model=path, **options)

    def rollout(
        self, task: Task, prompts: Sequence[list[int]], k: int, temperature: float, top_p: float, max_new: int, seed: int
    ) -> list[list[Completion]]:
        sampling = self.vllm.SamplingParams(
            n=k,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new,
            seed=seed,
            stop=list(task.stop),
            stop_token_ids=[task.end_id],
            include_stop_str_in_output=True,
            logprobs=0,  # of the token that was chosen alone
        )
        out = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [
            [
                Completion(list(x.token_ids), [values[i].logprob for i, values in zip(x.token_ids, x.logprobs, strict=True)])
                for x in answers.outputs
            ]
            for answers in out
        ]


@torch.no_grad()
def rollout(
    model: PreTrainedModel | VLLM,
    task: Task,
    prompts: Sequence[list[int]],
    k: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    shift: int = 0,
) -> list[list[Completion]]:
    """``k`` completions of each prompt.

    Args:
        temperature: 0 takes the likeliest token each time.
        seed: with the batch size it fixes the samples; the random states of torch stay as they were.
        batch_size: rows at once, a prompt being ``k`` rows; prompts of like length go together.
        shift: added to the positions of what follows a prompt; not with vLLM.

    Raises:
        ValueError: a prompt that with ``max_new`` tokens passes the model's positions.
    """
    if isinstance(model, VLLM):
        return model.rollout(task, prompts, k, temperature, top_p, max_new, seed)
    check_room(model, max(map(len, prompts), default=0) + max_new + shift)
    rows = sorted((i for i in range(len(prompts)) for _ in range(k)), key=lambda i: -len(prompts[i]))
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if options["do_sample"]:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if task.stop:
        options |= {"stop_strings": list(task.stop), "tokenizer": task.tokenizer}
    found: list[list[Completion]] = [[] for _ in prompts]
    cuda = [model.device] if model.device.type == "cuda" else []
    pace = Pace()
    with evaluating(model), shifted(model, shift), torch.random.fork_rng(cuda):
        for start in range(0, len(rows), batch_size):
            if pace.due():
                LOG.info("sampling: %s of %s completions", f"{start:,}", f"{len(rows):,}")
            chosen = rows[start : start + batch_size]
            torch.manual_seed(mix_seed(seed, start))
            ids, mask = (x.to(model.device) for x in padded([prompts[i] for i in chosen], left=True, fill=task.end_id))
            recorder = Recorder()
            out = cast(Any, model).generate(
                ids,
                attention_mask=mask.long(),
                position_ids=positions(mask, len(ids[0])),
                max_new_tokens=max_new,
                eos_token_id=task.end_id,
                pad_token_id=task.end_id,
                logits_processor=LogitsProcessorList([recorder]),
                **options,
            )
            logprobs = recorder.finish(out).tolist()
            for i, written, logprob in zip(chosen, out[:, ids.shape[1] :].tolist(), logprobs, strict=True):
                length = written.index(task.end_id) + 1 if task.end_id in written else len(written)
                found[i].append(Completion(written[:length], logprob[:length]))
    return found


class Recorder(LogitsProcessor):
    """Notes the log-probability of each token that ``generate`` chooses, without keeping all logits."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._note(input_ids)
        self.before = scores.float().log_softmax(-1)
        return scores

    def finish(self, ids: Tensor) -> Tensor:
        """[R,T], given all ids at the end."""
        self._note(ids)
        return torch.cat(self.chosen, 1)

    def _note(self, ids: Tensor) -> None:
        if self.before is not None:
            self.chosen.append(self.before.gather(1, ids[:, -1:]))


def logprob(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    shift: Tensor | int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions' tokens in one forward, with a gradient.

    Args:
        shift: integer [R] or one for all, added to the completions' positions.

    Returns:
        logprob: [R,T] fp32, from each completion's first token on, 0 behind its last.
        mask: bool [R,T], where there is a token.
    """
    before, before_mask = padded(prompts, left=True)
    after, mask = padded(completions)
    check_room(model, before.shape[1] + after.shape[1])
    ids, seen, after, mask = (
        x.to(model.device) for x in (torch.cat([before, after], 1), torch.cat([before_mask, mask], 1), after, mask)
    )
    T = after.shape[1]
    places = positions(seen, before.shape[1], shift)
    out = model(ids, attention_mask=seen.long(), position_ids=places, use_cache=False, logits_to_keep=T + 1)
    predicted = out.logits[:, -T - 1 : -1].float()
    chosen = predicted.gather(2, after[..., None])[..., 0] - predicted.logsumexp(-1)
    return chosen.where(mask, 0), mask


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], batch_size: int = 256
) -> list[float]:
    """The log-probability of each completion, summed over its tokens."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(completions[i]))
    found = [0.0] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            values, _ = logprob(model, [prompts[i] for i in chosen], [completions[i] for i in chosen])
            for i, value in zip(chosen, values.sum(1).tolist(), strict=True):
                found[i] = value
    return found


def padded(rows: Sequence[Sequence[int]], left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [R, the longest], int64, and where they are tokens, bool."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return ids, mask


def positions(mask: Tensor, prompt: int, shift: Tensor | int = 0) -> Tensor:
    """int64 [R,L], counted from each row's first token; those behind ``prompt`` columns are ``shift`` larger."""
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)
    counted[:, prompt:] += shift[:, None].to(mask.device) if isinstance(shift, Tensor) else shift
    return counted


@contextmanager
def shifted(model: PreTrainedModel, shift: int) -> Iterator[None]:
    """Inside, positions of what ``generate`` decodes behind a prompt are ``shift`` larger."""

    def later(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        behind = cache is not None and cache.get_seq_length() > 0
        return args, kwargs | ({"position_ids": kwargs["position_ids"] + shift} if behind else {})

    handle = model.register_forward_pre_hook(later, with_kwargs=True) if shift else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def check_room(model: PreTrainedModel, length: int) -> None:
    """Raises ValueError where ``length`` tokens pass the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(f"{type(model).__name__} has {limit} positions, and prompt and completion need {length}")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout inside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
