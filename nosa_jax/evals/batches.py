"""Rows of like lengths, read together, so that few programs compile and little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

_TOKENS, _ROWS = 65536, 16  # that are read together unless told


def rows_for(length: int, batch_size: int | None) -> int:
    """How many rows of so many tokens are read together: `batch_size` unless that is None."""
    return max(1, min(_ROWS, _TOKENS // max(length, 1))) if batch_size is None else batch_size


def like_lengths(sizes: Sequence[int], batch_size: int | None) -> Iterator[list[int]]:
    """Numbers of rows that are read together, the longest first.

    sizes: tokens of each row.
    batch_size: rows of a batch; None takes so many that batches of long rows are small.
    """
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    while order:
        rows = rows_for(sizes[order[0]], batch_size)
        yield order[:rows]
        order = order[rows:]


def stacked(
    rows: Sequence[Sequence[int]], batch: int, width: int = 1
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """Rows of token ids as one array, right-padded with 0 up to `width` at least, and their lengths.

    batch: rows of the array; the first row comes again and again up to that many.
    """
    filled = [*rows, *[rows[0]] * (batch - len(rows))]
    lengths = np.array([len(row) for row in filled], np.int32)
    tokens = np.zeros((len(filled), max(int(lengths.max()), width)), np.int32)
    for row, ids in zip(tokens, filled, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths
