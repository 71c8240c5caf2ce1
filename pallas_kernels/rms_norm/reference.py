"""The definition in numpy and float64."""

from __future__ import annotations

import numpy as np


def rms_norm_ref(x: np.ndarray, weight: np.ndarray, layer: int, *, eps: float) -> np.ndarray:
    x, weight = x.astype(np.float64), weight[layer].astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
