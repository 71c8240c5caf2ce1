"""How far an output is from the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def error(ours: Mapping[str, Any], truth: Mapping[str, Any]) -> float | int:
    """How many numbers differ where all arrays hold integers or booleans, else the largest relative error of any."""
    pairs = [(np.asarray(x), np.asarray(truth[name])) for name, x in ours.items()]
    for (x, y), name in zip(pairs, ours, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"{name}: the output has shape {list(x.shape)}, the reference {list(y.shape)}")
    if all(y.dtype.kind in "iub" for _, y in pairs):
        return sum(int((x != y).sum()) for x, y in pairs)
    return float(np.max([relative_error(x, y) for x, y in pairs]))


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    """max |ours - truth| / max |truth| over the finite entries of `truth`; inf where the others differ."""
    ours, truth = np.asarray(ours, np.float32), np.asarray(truth, np.float32)
    finite = np.isfinite(truth)
    if not np.array_equal(ours[~finite], truth[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    largest = float(np.abs(truth[finite]).max())
    with np.errstate(invalid="ignore"):
        return float(np.abs(ours[finite] - truth[finite]).max()) / (largest or 1.0)
