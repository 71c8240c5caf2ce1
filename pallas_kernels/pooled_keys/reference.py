"""Mean-pooled keys, as the definition reads; the incremental ones token after token."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import blocks


def pool_keys_ref(keys: Float[Array, "B K S D"], *, stride: int) -> Float[Array, "B K C D"]:
    """Window c is the float32 mean of keys stride*c .. stride*c + 2*stride - 1, rounded to the keys' dtype."""
    windows = blocks.num_windows(keys.shape[2], stride)
    starts = [stride * c for c in range(windows)]
    means = [keys[:, :, s : s + 2 * stride].astype(jnp.float32).mean(2) for s in starts]
    empty = jnp.zeros((*keys.shape[:2], 0, keys.shape[3]), jnp.float32)
    return jnp.concatenate([empty, *(m[:, :, None] for m in means)], axis=2).astype(keys.dtype)


def append_pooled_keys_ref(
    pooled: np.ndarray,
    sums: np.ndarray,
    new: np.ndarray,
    start: np.ndarray,
    count: np.ndarray,
    layer: int,
    *,
    stride: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Everything float32; a window is rounded once, to the dtype of `pooled`."""
    pooled, sums = pooled.copy(), sums.copy()
    for b in range(len(start)):
        whole, opened = sums[layer, b, :, 0], sums[layer, b, :, 1]  # views
        for i in range(count[b]):
            opened += new[b, :, i].astype(np.float32)
            if (start[b] + i + 1) % stride == 0:
                window = (start[b] + i) // stride - 1
                if 0 <= window < pooled.shape[3]:
                    pooled[layer, b, :, window] = ((whole + opened) / np.float32(2 * stride)).astype(pooled.dtype)
                whole[...], opened[...] = opened.copy(), 0
    return pooled, sums
