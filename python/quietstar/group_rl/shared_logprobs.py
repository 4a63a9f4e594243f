"""Log-probabilities of token sequences that begin alike, each shared token computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from quietstar.group_rl.completions import EndTokens, answering, end_logprobs, through
from quietstar.hf.architectures import no_model
from quietstar.hf.attention import NAME, WRAPPED_NAME
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import device_of, embeddings, is_sharded, largest, layer_checkpoints_off, unwrapped
from quietstar.hf.verify import checked_head
from quietstar_kernels.checks import INTEGERS, LARGEST_FP32, Checker, as_number, integer, shown

_heads: WeakKeyDictionary[PreTrainedModel, LMHead] = WeakKeyDictionary()


@overload
def shared_logprobs(
    model: nn.Module, sequences: Any, temperature: Any = ..., return_entropy: Literal[False] = ...,
    cu_seqlens: Tensor | None = ..., max_rows: int | None = ...,
) -> list[Tensor]: ...  # fmt: skip


@overload
def shared_logprobs(
    model: nn.Module, sequences: Any, temperature: Any = ..., *, return_entropy: Literal[True],
    cu_seqlens: Tensor | None = ..., max_rows: int | None = ...,
) -> tuple[list[Tensor], list[Tensor]]: ...  # fmt: skip


def shared_logprobs(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor] | Tensor,
    temperature: float | Tensor | Sequence[float | Tensor] = 1.0,
    return_entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    max_rows: int | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of every token of every sequence but the first, given those before it, in nats. Differentiable.

    A prompt, a turn or an attempt that several sequences begin with is computed once, forward and backward. The results are
    those of a forward for each sequence, up to rounding.

    With several processes each makes the same number of calls, with sequences of its own. One without any passes a sequence of
    one token: its result is empty, and its ``backward`` takes part in the sums over processes.

    Args:
        model: a decoder with ``attn_implementation="quietstar"``; call ``quietstar.register_attention("sdpa")`` before it is
            loaded. It may be wrapped, by PEFT or DistributedDataParallel for example, and sharded by FSDP2. The first call
            checks the model.
        sequences: token ids of each, as lists or integer tensors [T]; with ``cu_seqlens`` all one after another, [total] or
            [1,total].
        temperature: divides the logits: a number, one for each sequence, or for each sequence those of its tokens, [T] (with
            ``cu_seqlens`` [total] too), of which the first is not used. Constants. The head runs once for each distinct one.
        return_entropy: also return the entropies of the distributions that predict the tokens, in nats, differentiable too.
        cu_seqlens: integers [n+1] from 0 to total, where each sequence begins and the last ends.
        max_rows: the most distinct tokens of a forward; a longer sequence has one to itself. Where there are several forwards,
            a backward computes them again, one at a time. Prompts whose completions are in several are computed in each. With
            sharded weights all processes pass it, or none.

    Returns:
        For each sequence, fp32 [T-1] (fp64 for fp64 models), on the model's device. With ``return_entropy`` two such lists.

    Raises:
        ValueError: another attention, a model that can't think, a sequence that isn't integers [T], or another temperature.
    """
    inner, head = model_and_head("shared_logprobs: model", model)
    # 1. The sequences, their temperatures, and the forwards that they take.
    check = Checker("shared_logprobs")
    given = check.sequences(sequences if cu_seqlens is None else _split(check, sequences, cu_seqlens))
    temperatures = _temperatures(check, temperature, given, cu_seqlens is not None)
    check.flag("return_entropy", return_entropy)
    most = None if max_rows is None else integer("shared_logprobs: max_rows", max_rows, 1)
    check_sequences(check, inner, given)
    parts = parts_of(given, most)
    forwards = max(len(parts), 1) if most is None else _most_of_all(inner, max(len(parts), 1))
    trees, in_order = trees_of(given, temperatures, parts, forwards)

    # 2. The forwards, inside of what wraps the model.
    def one(tokens: EndTokens, _: Tensor) -> tuple[Tensor, Tensor]:
        with layer_checkpoints_off(inner) if len(trees) > 1 else nullcontext():
            return end_logprobs(inner, head, tokens, return_entropy)

    def answer() -> tuple[Tensor, Tensor]:
        there = torch.empty(0, device=device_of(inner))  # checkpoint keeps the random state of its inputs' devices, for dropout
        if len(trees) == 1:
            return one(trees[0], there)
        with set_checkpoint_early_stop(False):  # FSDP2 waits for the end of a layer's forward
            found = [checkpoint(one, tokens, there, use_reentrant=False) for tokens in trees]
        logprobs, entropies = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    logprobs, entropies = map(in_order, through(model, inner, answer))
    return (logprobs, entropies) if return_entropy else logprobs


def model_and_head(name: str, model: nn.Module) -> tuple[PreTrainedModel, LMHead]:
    """The transformers model in DistributedDataParallel and the like, and its head. The first call for a model checks it."""
    whole: Any = model
    while isinstance(getattr(whole, "module", None), nn.Module):
        whole = whole.module
    inner = unwrapped(whole)
    if not isinstance(inner, PreTrainedModel) or inner.config._attn_implementation not in (NAME, WRAPPED_NAME):
        raise no_model(name, "a transformers model with attn_implementation='quietstar'", whole)

    def check() -> None:
        _heads[inner] = checked_head(whole)

    if inner not in _heads and not is_sharded(inner):
        check()
    elif inner not in _heads:
        with torch.no_grad(), answering(inner, check):  # inside a forward, where the weights outside of layers are gathered
            model()
    return inner, _heads[inner]


def trees_of(
    sequences: list[Tensor], temperatures: list[Tensor] | None, parts: list[list[int]], forwards: int = 1
) -> tuple[list[EndTokens], Callable[[Tensor], list[Tensor]]]:
    """A tree for each forward, in which each token but the first is scored, and what brings results back in order.

    In forwards that are more than the parts one token runs, and nobody reads the result.
    """
    counts = [max(len(ids) - 1, 0) for ids in sequences]
    live = torch.arange(max(counts, default=0), device="cpu") < torch.tensor(counts, device="cpu").unsqueeze(1)
    trees = [
        EndTokens.of([sequences[i] for i in part], live[part], [temperatures[i] for i in part] if temperatures else 1.0)
        for part in parts
    ]
    if spare := forwards - len(parts):
        token = torch.zeros(1, dtype=torch.int64, device="cpu")
        trees += [EndTokens.of([token], live.new_zeros(1, live.shape[1]))] * spare
    row = {i: place for place, i in enumerate(i for part in parts for i in part)}
    return trees, lambda found: [found[row.get(i, 0), :count] for i, count in enumerate(counts)]


def check_sequences(check: Checker, model: PreTrainedModel, sequences: list[Tensor]) -> None:
    """Raises ValueError for ids that the model doesn't have, such as labels' -100, which on a GPU would end the process; and if
    there are no sequences, where other processes wait for this one's backward."""
    size = embeddings(model).num_embeddings
    for i, ids in enumerate(sequences):
        if wrong := ids[(ids < 0) | (ids >= size)].tolist():
            raise check.fail(f"sequence {i} must hold token ids from 0 to V-1={size - 1}, got {wrong[0]}")
    if not sequences and torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1:
        raise check.fail("a process without sequences must pass one of one token, so that its backward takes part, got none")


def _split(check: Checker, packed: Any, cu_seqlens: Any) -> list[Tensor]:
    """The sequences of packed token ids [total] or [1,total]."""
    wanted = f"with cu_seqlens, sequences must be one tensor [total] or [1,total], got {shown(packed)}"
    try:
        ids, ends = (torch.as_tensor(x, device="cpu") for x in (packed, cu_seqlens))
    except (TypeError, ValueError, RuntimeError):
        raise check.fail(f"{wanted}, and cu_seqlens {shown(cu_seqlens)}") from None
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise check.fail(wanted)
    fits = ends.ndim == 1 and ends.dtype in INTEGERS and len(ends) > 0 and ends[0] == 0 and ends[-1] == len(ids)
    if not fits or (ends[1:] < ends[:-1]).any():
        raise check.fail(f"cu_seqlens must be integers [n+1] that grow from 0 to total={len(ids)}, got {shown(cu_seqlens)}")
    return list(ids.split(ends.diff().tolist()))


def _temperatures(check: Checker, value: Any, sequences: list[Tensor], packed: bool) -> list[Tensor]:
    """fp64 [T] for each sequence."""
    lengths = [len(ids) for ids in sequences]
    if as_number(value) is not None:
        value = [check.temperature(value)] * len(lengths)
    elif packed and isinstance(value, Tensor) and value.numel() == sum(lengths) != len(lengths):
        value = value.flatten().split(lengths)
    wanted = "temperature must be a positive number, one for each sequence, or for each sequence those of its tokens"
    try:
        parts = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in value]
    except (TypeError, ValueError, RuntimeError):
        raise check.fail(f"{wanted}, got {shown(value)}") from None
    if len(parts) != len(lengths):
        raise check.fail(f"{wanted}, got {len(parts)} for {len(lengths)} sequences")
    for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if part.shape not in ((), (length,)):
            raise check.fail(f"{wanted}, got {list(part.shape)} for the {length} tokens of sequence {i}")
        if part.requires_grad:
            raise check.fail("temperature must be constant, got a tensor that requires grad: detach it")
        if not ((part > 0) & (part <= LARGEST_FP32)).all():
            raise check.fail(f"temperature must be positive and finite, got {float(part.min()):g} in sequence {i}")
    return [part.expand(length) for part, length in zip(parts, lengths, strict=True)]


def parts_of(sequences: list[Tensor], max_rows: int | None = None) -> list[list[int]]:
    """The sequences of each forward, those that begin alike next to one another."""
    if not any(map(len, sequences)):
        return []
    if max_rows is None:
        return [list(range(len(sequences)))]
    padded = pad_sequence(sequences, True, torch.iinfo(torch.int64).min)
    order = padded.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    padded = padded[order]
    alike = [0, *(padded[1:] == padded[:-1]).cumprod(1).sum(1).tolist()]  # tokens with which the one before begins too
    parts: list[list[int]] = [[]]
    rows = 0
    for i, begun in zip(order.tolist(), alike, strict=True):
        new = max(len(sequences[i]) - begun, 0)
        if rows and rows + new > max_rows:
            parts.append([])
            rows, new = 0, len(sequences[i])
        parts[-1].append(i)
        rows += new
    return parts


def _most_of_all(model: PreTrainedModel, count: int) -> int:
    """The largest count of the processes that gather weights from one another, so that all run the model as often."""
    if not is_sharded(model):
        return count
    mesh = next((weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None)
    for group in [dist.group.WORLD] if mesh is None else mesh.get_all_groups():
        count = largest(group, count, device_of(model) if mesh is None else torch.device(mesh.device_type))
    return count
