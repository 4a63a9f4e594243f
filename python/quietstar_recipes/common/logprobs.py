"""Log-probabilities of given completions, and the padding, positions and checks that they share with sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from quietstar.hf.modules import dropout_off
from quietstar_recipes.common.branches import Ids, may_share, shared_states


def logprob(model: PreTrainedModel, prompts: Ids, completions: Ids, shift: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions' tokens in one forward pass, with a gradient.

    What rows begin with is read once where that is faster.

    Args:
        shift: integer [R], or one for all rows, added to the positions of the completions.

    Returns:
        logprob: [R,T] fp32, starting at each completion's first token; 0 after its last.
        mask: bool [R,T], where there is a token.
    """
    ids, attended, after, mask = side_by_side(model, prompts, completions)
    before = [row[:-1] for row in completions]  # nothing follows the last token
    if isinstance(shift, int) and not shift and (shared := shared_states(model, prompts, before, ids.numel())) is not None:
        head, states, places = shared
        values = head.logprob(states[places[:, : mask.shape[1]][mask]], after[mask])
        return values.new_zeros(mask.shape).masked_scatter(mask, values), mask
    predicted = logits_after(model, ids, attended, after.shape[1], shift)[:, :-1]
    chosen = predicted.gather(2, after[..., None])[..., 0] - predicted.logsumexp(-1)
    return chosen.where(mask, 0), mask


def completion_logits(model: PreTrainedModel, prompts: Ids, completions: Ids) -> tuple[Tensor, Tensor, Tensor]:
    """Logits after the prompts and after each token of the completions, in one forward pass, with a gradient.

    What rows begin with is read once where that is faster.

    Returns:
        logits: [R,T+1,V] fp32; at t, after t tokens of the completion.
        after, mask: the completions' ids and where there are any, as ``padded`` returns them.
    """
    ids, attended, after, mask = side_by_side(model, prompts, completions)
    if (shared := shared_states(model, prompts, completions, ids.numel())) is None:
        return logits_after(model, ids, attended, after.shape[1], 0), after, mask
    head, states, places = shared
    distinct, of_place = places.unique(return_inverse=True)
    return head.logits(states[distinct])[of_place], after, mask


def side_by_side(model: PreTrainedModel, prompts: Ids, completions: Ids) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and completions [R,L] and their mask, and those of the completions alone [R,T], on the model's device."""
    before, before_mask = padded(prompts, left=True)
    after, mask = padded(completions)
    check_length(model, before.shape[1] + after.shape[1])
    ids, attended, after, mask = (
        x.to(model.device) for x in (torch.cat([before, after], 1), torch.cat([before_mask, mask], 1), after, mask)
    )
    return ids, attended, after, mask


def logits_after(model: PreTrainedModel, ids: Tensor, attended: Tensor, T: int, shift: Tensor | int) -> Tensor:
    """Logits of the last T + 1 of L columns, fp32 [R,T+1,V]."""
    position_ids = positions(attended, ids.shape[1] - T, shift)
    out = model(ids, attention_mask=attended.long(), position_ids=position_ids, use_cache=False, logits_to_keep=T + 1)
    return out.logits[:, -T - 1 :].float()


@torch.no_grad()
def likelihoods(model: PreTrainedModel, prompts: Ids, completions: Ids, batch_size: int = 256) -> list[float]:
    """The log-probability of each completion, summed over its tokens."""
    found = [0.0] * len(prompts)
    with dropout_off(model):
        for chosen in batches(model, prompts, completions, batch_size):
            values, _ = logprob(model, [prompts[i] for i in chosen], [completions[i] for i in chosen])
            for i, value in zip(chosen, values.sum(1).tolist(), strict=True):
                found[i] = value
    return found


def batches(model: PreTrainedModel, prompts: Ids, completions: Ids, batch_size: int) -> Iterator[list[int]]:
    """The rows' numbers: rows that begin alike together if that is read once; else long ones first, which pads little."""
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    alike = may_share(model, prompts, completions)
    order = sorted(range(len(rows)), key=rows.__getitem__ if alike else lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(rows: Ids, left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [R, length of the longest row], int64, and a bool mask of the same shape that is True at tokens."""
    side, tensors = "left" if left else "right", [torch.tensor(row, dtype=torch.int64) for row in rows]
    mask = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in tensors], True, False, side)
    return pad_sequence(tensors, True, fill, side), mask


def positions(mask: Tensor, prompt: int, shift: Tensor | int = 0) -> Tensor:
    """Position ids, int64 [R,L], counted from each row's first token; after ``prompt`` columns they are ``shift`` larger."""
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)
    counted[:, prompt:] += shift[:, None].to(mask.device) if isinstance(shift, Tensor) else shift
    return counted


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raises ValueError if ``length`` tokens are more than the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(f"{type(model).__name__} has {limit} positions, and prompt and completion need {length}")


def cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    """The devices, besides the CPU, whose random state ``torch.random.fork_rng`` has to keep."""
    return [model.device] if model.device.type == "cuda" else []
