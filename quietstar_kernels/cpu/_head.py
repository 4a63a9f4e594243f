"""Rows of a language-model head, cut so that their logits fit a buffer of fixed size."""

from __future__ import annotations

from collections.abc import Iterator

LOGITS = 2**22  # in one chunk: 16 MB of fp32


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of at least one row and at most ``LOGITS`` logits."""
    step = max(1, LOGITS // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
