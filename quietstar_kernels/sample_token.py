"""sample_token: draws one id per row from the softmax over the vocabulary, reproducibly, and gives its log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from ._options import Head
from .checks import Checker, check_head, under_autocast

_OP = "sample_token"


def sample_token(
    hidden: Tensor,
    weight: Tensor,
    counters: Tensor,
    seed: int | Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw one id per row. The same seed and counters give the same random numbers on every back end, split and device.

    logits = softcap(scale * (hidden · weightᵀ + bias)) / temperature; banned ids are left out of the softmax.

    The draw is a race of blocks of 128 ids, exact in distribution. For each row and block one Philox4x32-10 call: key
    (seed mod 2^32, seed div 2^32); 128-bit counter, lowest word first, (sequence id, position, n·2^16 + s, block). Word 0
    gives E = -log1p(-v), v = (word + 0.5) / 2^32, an Exp(1) variate; the block's score is log(sum of its weights) - log E
    and the best score wins. Word 1, u = (word + 0.5) / 2^32, picks inside the winner by inversion: the first of its 8 groups
    of 16 ids at which the running sum of weights passes u times the block's total, then the first id inside that group.

    A row whose logits are not finite has id -1 and log-probability NaN, on every back end and without waiting for the device.
    That is a row in which a logit is NaN or inf, whether its id is banned or not; in which all logits are -inf (where some are
    not, those that are have probability 0); or in which the log of the sum of exp(logit) is beyond ±6.9e29. Infinite logits
    stay so under a soft cap. No row is finite if scale, softcap, 1 / temperature or a product of them overflows fp32.

    There is no derivative: asking for one raises NotImplementedError.

    Args:
        hidden: [R,D], fp32, fp16, bf16 or fp64.
        weight: [V,D], same dtype; under autocast as in ``linear_logprob``.
        counters: int32 [R,4]: (sequence id, position counted from lo, thought n, row s); n and s below 65,536.
        seed: a 64-bit integer, or a 0-d int64 tensor on the same device (one CUDA graph then serves all seeds).
        bias: [V].
        scale: factor on the logits.
        softcap: c; logits become c * tanh(logit / c).
        temperature: above 0 and at most fp32's largest, or 0 for the argmax (the first, if several are equal) with its
            log-probability at temperature 1.
        banned: ids that are never drawn.
        backend: "auto", or the name of one, which runs or raises.

    Returns:
        ids int64 [R] and logprob fp32 [R], the log-probability of the id under the distribution it was drawn from; -1 and NaN
        for a row that is not finite.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = Checker(_OP, **{"4": 4})
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    scale, softcap, bans = check_head(check, hidden, weight, bias, scale, softcap, banned)
    check.tensor("counters", counters, "R,4", (torch.int32,), hidden.device, "hidden")
    temperature = check.temperature(temperature, zero=True)
    if isinstance(seed, Tensor):
        check.tensor("seed", seed, "", (torch.int64,), hidden.device, "hidden")
    else:
        seed = check.integer("seed", seed, -(2**63), 2**64 - 1, "a 64-bit integer")
        seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=hidden.device)
    backend = _dispatch.choose(_OP, backend, hidden.device, hidden.dtype)
    return call(_forward, hidden, weight, counters, seed, bias, scale, softcap, temperature, bans, backend)


def _sample_token(
    hidden: Tensor,
    weight: Tensor,
    counters: Tensor,
    seed: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    head = Head(weight, bias, scale, softcap, temperature, list(banned))
    if head.overflows:
        return hidden.new_full(hidden.shape[:1], -1, dtype=torch.int64), hidden.new_full(hidden.shape[:1], nan).float()
    return _dispatch.run("sample_token", backend, hidden, head, counters, seed)


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[:1]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


def _flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


_forward = operator(_sample_token, _fake, instead="linear_logprob of the ids has one, in reverse mode", flops=_flops)
