"""One token after the other, in numpy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.append_token.summaries import Summaries


def append_token_ref(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    scale: np.ndarray | None,
    delta: np.ndarray | None,
    summaries: Summaries,
    positions: np.ndarray,
    layer: int,
    *,
    stride: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Summaries]:
    """Everything float64; the key is rounded to the dtype of `qkv` before it is summed."""
    dtype, qkv = qkv.dtype, qkv.astype(np.float64)
    q, k, v = qkv[:, :, :-2].reshape(len(qkv), -1, qkv.shape[3]), qkv[:, :, -2], qkv[:, :, -1]

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    def append(cache: Any, new: np.ndarray) -> Any:
        pooled, sums = (x.astype(np.float64) for x in cache)
        for b, position in enumerate(positions):
            if position < 0:
                continue
            at = sums[layer, b]
            at[:, 1] += new[b]
            if (position + 1) % stride == 0:
                window = position // stride - 1
                if 0 <= window < pooled.shape[3]:
                    pooled[layer, b, :, window] = (at[:, 0] + at[:, 1]) / (2 * stride)
                at[:, 0], at[:, 1] = at[:, 1].copy(), 0
        return pooled, sums

    q, k = rotate(q), rotate(k)
    keys, importance, pooled_importance = summaries
    if keys is not None:
        keys = append(keys, k.astype(dtype).astype(np.float64))
    if importance is not None:
        assert scale is not None and delta is not None
        change = v.reshape(len(v), -1) @ delta[layer].astype(np.float64).reshape(-1, delta.shape[-1])
        new = scale[layer].astype(np.float64) * np.logaddexp(0, change)
        pooled_importance = append(pooled_importance, new[..., None])
        importance, size = importance.astype(np.float64), importance.shape[4]
        for b, position in enumerate(positions):
            if 0 <= position < importance.shape[3] * size:
                importance[layer, b, :, position // size, position % size] = new[b]
    return q, k, v, Summaries(keys, importance, pooled_importance)
