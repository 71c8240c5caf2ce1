"""Pooled keys from sums over half windows ("strides"), added token by token in order.

Whole and incremental pooling add the same numbers in the same order, so they agree to the bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks


def _stride_sums(tokens: Float[Array, "B K n s D"], first: Float[Array, "B K D"] | None = None) -> Array:
    """Sum over each stride in token order, float32; `first` is the sum that the first stride starts from."""
    total = jnp.zeros((*tokens.shape[:3], tokens.shape[-1]), jnp.float32)
    if first is not None:
        total = total.at[:, :, 0].set(first)
    for offset in range(tokens.shape[3]):
        total = total + tokens[:, :, :, offset].astype(jnp.float32)
    return total


def _window_means(sums: Float[Array, "B K n D"], stride: int, dtype: jnp.dtype) -> Array:
    return ((sums[:, :, :-1] + sums[:, :, 1:]) / (2 * stride)).astype(dtype)


def pool_keys(keys: Float[Array, "B K S D"], *, stride: int) -> Float[Array, "B K C D"]:
    batch, heads, length, dim = keys.shape
    if blocks.num_windows(length, stride) == 0:
        return jnp.zeros((batch, heads, 0, dim), keys.dtype)
    strides = length // stride
    tokens = keys[:, :, : strides * stride].reshape(batch, heads, strides, stride, dim)
    return _window_means(_stride_sums(tokens), stride, keys.dtype)


def append_pooled_keys(
    pooled: Float[Array, "L B K C D"],
    sums: Float[Array, "L B K 2 D"],
    new: Float[Array, "B K n D"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
) -> tuple[Float[Array, "L B K C D"], Float[Array, "L B K 2 D"]]:
    batch, heads, n, dim = new.shape
    if n == 0:
        return pooled, sums
    state = jax.lax.dynamic_index_in_dim(sums, layer, keepdims=False)  # [B, K, 2, D]: complete stride, open stride
    strides = (stride - 1 + n + stride - 1) // stride
    # Put every row's tokens where they fall within its strides; zeros before them leave the open sum unchanged.
    offset = start % stride
    source = jnp.arange(strides * stride) - offset[:, None]
    taken = (source >= 0) & (source < count[:, None])
    tokens = jnp.take_along_axis(new, jnp.clip(source, 0, n - 1)[:, None, :, None], axis=2)
    tokens = jnp.where(taken[:, None, :, None], tokens, 0).reshape(batch, heads, strides, stride, dim)
    all_sums = jnp.concatenate(
        [state[:, :, :1], _stride_sums(tokens, state[:, :, 1])], axis=2
    )  # index 0: stride before

    # Window (start // stride - 1 + j) ends with stride j of this call; it is written once that stride is complete.
    complete = (offset + count) // stride
    j = jnp.arange(strides)
    window = start[:, None] // stride - 1 + j
    written = (j < complete[:, None]) & (window >= 0)
    target = jnp.where(written, window, pooled.shape[3])
    row = jnp.arange(batch)[:, None, None]
    head = jnp.arange(heads)[None, :, None]
    means = _window_means(all_sums, stride, pooled.dtype)
    pooled = pooled.at[layer, row, head, target[:, None, :]].set(means, mode="drop")

    # Position of the open stride in all_sums; when the last one just filled up, the next one is open and empty.
    padded = jnp.concatenate([all_sums, jnp.zeros_like(all_sums[:, :, :1])], axis=2)
    last = jnp.stack([complete, complete + 1], axis=-1)[:, None, :, None]
    state = jnp.take_along_axis(padded, last, axis=2)
    return pooled, jax.lax.dynamic_update_index_in_dim(sums, state, layer, 0)
