"""Mean-pooled keys, as the definition reads."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import blocks


def pool_keys(keys: Float[Array, "B K S D"], *, stride: int) -> Float[Array, "B K C D"]:
    """Window c is the float32 mean of keys stride*c .. stride*c + 2*stride - 1, rounded to the keys' dtype."""
    windows = blocks.num_windows(keys.shape[2], stride)
    starts = [stride * c for c in range(windows)]
    means = [keys[:, :, s : s + 2 * stride].astype(jnp.float32).mean(2) for s in starts]
    empty = jnp.zeros((*keys.shape[:2], 0, keys.shape[3]), jnp.float32)
    return jnp.concatenate([empty, *(m[:, :, None] for m in means)], axis=2).astype(keys.dtype)
