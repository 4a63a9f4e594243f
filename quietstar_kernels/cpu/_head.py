"""Rows of a language-model head, cut so that their logits fit a buffer of fixed size."""

from __future__ import annotations

from collections.abc import Iterator

LOGITS = 2**22  # in one chunk: 16 MB of fp32


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: at least one, and at most ``LOGITS`` logits."""
    return min(max(1, LOGITS // vocabulary), rows)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = chunk_rows(rows, vocabulary)
    for start in range(0, rows, max(step, 1)):
        yield slice(start, min(start + step, rows))
