"""The parts one after the other; their maths is also what whole rows use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.append_token.summaries import Summaries
from pallas_kernels.pooled_keys.xla import append_pooled_keys


def rotate(
    x: Float[Array, "*rows h D"], cos: Float[Array, "*rows half"], sin: Float[Array, "*rows half"]
) -> Float[Array, "*rows h D"]:
    """Rotates dimension i with i + D/2, in float32, back in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def importance_of(
    v: Float[Array, "*rows K D"], scale: Float[Array, " K"], delta: Float[Array, "KD K"]
) -> Float[Array, "*rows K"]:
    """A * softplus(v delta) of every token in float32 (paper section 3.3)."""
    flat = v.astype(jnp.float32).reshape(*v.shape[:-2], -1)
    return scale * jax.nn.softplus(jnp.matmul(flat, delta, precision="highest"))


def append_token(
    qkv: Float[Array, "B heads D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    scale: Float[Array, "L K"] | None,
    delta: Float[Array, "L KD K"] | None,
    summaries: Summaries,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    kv_heads: int,
    stride: int,
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    start, count = jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32)

    def append(cache: Any, new: Array) -> Any:
        pooled, sums = cache
        appended = append_pooled_keys(pooled, sums, new[:, :, None], start, count, layer, stride=stride)
        return jax.tree.unflatten(jax.tree.structure(cache), appended)

    keys, importance, pooled_importance = summaries
    if keys is not None:
        keys = append(keys, k)
    if importance is not None:
        assert scale is not None and delta is not None
        new = importance_of(v, scale[layer], delta[layer])
        pooled_importance = append(pooled_importance, new[..., None])
        size = importance.shape[4]
        block = jnp.where(positions >= 0, positions // size, importance.shape[3])[:, None]
        row, head = jnp.arange(qkv.shape[0])[:, None], jnp.arange(kv_heads)[None]
        importance = importance.at[layer, row, head, block, (start % size)[:, None]].set(new, mode="drop")
    return q, k, v, Summaries(keys, importance, pooled_importance)
