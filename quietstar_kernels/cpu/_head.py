"""Cuts the rows of a language-model head into chunks whose logits fit a buffer of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

LOGITS = 2**22  # in one chunk: 16 MB of fp32
ROWS = 256  # the product of fewer takes longer per row, up to 1.7 times, so these may have more logits
MOST = 2**24  # in a chunk of ROWS rows or fewer


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: as many as have ``LOGITS`` logits, or ``ROWS`` if these have no more than ``MOST``; at least one."""
    return min(max(1, min(max(LOGITS // vocabulary, ROWS), MOST // vocabulary)), rows)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = chunk_rows(rows, vocabulary)
    for start in range(0, rows, max(step, 1)):
        yield slice(start, min(start + step, rows))
