"""thought_decode on CPUs, csrc/cpu/forward.hpp: one row of each branch, whose own keys are in a cache."""

from __future__ import annotations

from torch import Tensor

from .._options import AttentionOptions
from . import _library
from .plain import thought_decode as plain
from .thought_attention import numbers, sinks, with_rows


def thought_decode(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, lo: Tensor, table: Tensor, step: Tensor,
    options: AttentionOptions, tree: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Implements ``reference.thought_decode``."""
    if not _library.serves(q.dtype):
        return plain.thought_decode(q, k_text, v_text, k_own, v_own, lo, table, step, options, tree)
    out = q.new_empty((*q.shape[:3], v_text.shape[-1]))
    _library.ops().thought_decode(
        *map(with_rows, (q, k_text, v_text, k_own, v_own)), lo, table, tree, sinks(options), out, int(step), *numbers(options)
    )
    return out
