"""What ``torch.utils.flop_counter.FlopCounterMode`` and the compiler's schedules count for the operators.

Formulas see shapes, no values: anchors count as if spread evenly over the text, and every row as live. Attention
counts what the mask lets rows see, where PyTorch counts all pairs for its own attention, causal or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from .linear_logprob import _backward as logprob_backward
from .linear_logprob import _forward as logprob
from .sample_token import _forward as sample
from .thought_attention import _backward as attention_backward
from .thought_attention import _forward as attention
from .thought_decode import _forward as decode

Shape = Sequence[int]


@register_flop_formula([logprob.overloadpacket, sample.overloadpacket])
def _head(hidden: Shape, weight: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(logprob_backward.overloadpacket)
def _linear_logprob_backward(
    grad_logprob: Shape, grad_entropy: Shape | None, hidden: Shape, weight: Shape, *rest: Any, **kwargs: Any
) -> int:
    wanted = rest[-2]  # hidden, weight, bias; the backend is last
    return (wanted[0] + wanted[1]) * 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(attention.overloadpacket)
def _thought_attention(
    q: Shape, k: Shape, v: Shape, lo: Shape, table: Shape, of_row: Shape,
    tree: Shape | None, path: Shape | None, sinks: Shape | None, full: bool, scale: float, window: int | None,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * (q[3] + v[3]) * _pairs(q, lo, table, of_row, full, window)


@register_flop_formula(attention_backward.overloadpacket)
def _thought_attention_backward(
    grad_out: Shape, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, lo: Shape, table: Shape, of_row: Shape,
    tree: Shape | None, path: Shape | None, sinks: Shape | None, full: bool, scale: float, window: int | None,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    # Scores again, dq and dk; the gradient of the probabilities, and dv.
    return 2 * (3 * q[3] + 2 * v[3]) * _pairs(q, lo, table, of_row, full, window)


@register_flop_formula(decode.overloadpacket)
def _thought_decode(
    q: Shape, k_text: Shape, v_text: Shape, k_own: Shape, v_own: Shape, lo: Shape, table: Shape,
    tree: Shape | None, step: Any, sinks: Shape | None, scale: float, window: int | None,
    *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    B, H, branches, K = q
    seen = _seen(_mean_text(k_text[2], window), (k_own[3] + 1) / 2, window)
    return round(2 * (K + v_text[3]) * B * H * branches * seen)


def _pairs(q: Shape, lo: Shape, table: Shape, of_row: Shape, full: bool, window: int | None) -> int:
    """Query rows times the keys that each sees, all heads."""
    B, H, rows, _ = q
    L, R, branches = lo[1], of_row[1], max(table[1], 1)
    own = R / branches if full else (R / branches + 1) / 2
    text = L * _mean_text(L, window) if rows > R else 0
    return round(B * H * (text + R * _seen(_mean_text(L, window), own, window)))


def _mean_text(L: int, window: int | None) -> float:
    """How much of the text a position sees, itself included, as a mean over positions."""
    if window is None or window >= L:
        return (L + 1) / 2
    return window - window * (window - 1) / (2 * L)


def _seen(text: float, own: float, window: int | None) -> float:
    return text + own if window is None else min(text + own, window)
