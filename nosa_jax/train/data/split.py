"""Which documents are held out: whole ones where that comes close to the share wanted, else the end of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

# How far the share held out may lie from the one wanted, relative to it, for documents to stay whole.
_CLOSE = 0.2


def split_spans(
    spans: Int64[np.ndarray, "N 2"], heldout_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, "A 2"], Int64[np.ndarray, "H 2"]]:
    """The spans (start, stop) to train on and those to hold out, both in the order given.

    A document is in one of the two, unless it alone would be far too much: its end is held out then.
    """
    starts, stops = spans.T
    middles = starts + np.asarray(kept_sizes((stops - starts).tolist(), heldout_fraction, seed), np.int64)
    train, heldout = np.stack([starts, middles], axis=1), np.stack([middles, stops], axis=1)
    return train[middles > starts], heldout[middles < stops]


def kept_sizes(sizes: Sequence[int], heldout_fraction: float, seed: int) -> list[int]:
    """How much of each document (of `sizes`) to train on; the rest, its end, is held out."""
    kept, wanted, heldout = list(sizes), heldout_fraction * sum(sizes), 0
    order = np.random.default_rng(seed).permutation(len(sizes))
    for index in order:
        missing = wanted - heldout
        if missing <= 0:
            break
        if sizes[index] - missing <= _CLOSE * wanted and index != order[-1]:  # something stays to train on
            part = sizes[index]
        elif missing <= _CLOSE * wanted:
            break
        else:
            part = max(round(missing), 1)
        kept[index] -= part
        heldout += part
    return kept
