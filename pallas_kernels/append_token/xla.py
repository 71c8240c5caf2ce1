"""The parts one after the other; their maths is also what whole rows use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks
from pallas_kernels.append_token.summaries import Summaries
from pallas_kernels.formulas import importance_of, rotate
from pallas_kernels.pooled_keys.xla import append_pooled_keys


def append_summaries(
    summaries: Summaries,
    keys: Float[Array, "B K n D"],
    importance: Float[Array, "B K n"] | None,
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
) -> Summaries:
    """Any number of tokens: the first `count[b]` of a row follow `start[b]` others."""

    def append(cache: Any, new: Array) -> Any:
        pooled, sums = cache
        appended = append_pooled_keys(pooled, sums, new, start, count, layer, stride=stride)
        return jax.tree.unflatten(jax.tree.structure(cache), appended)

    if summaries.pooled_keys is not None:
        summaries = summaries._replace(pooled_keys=append(summaries.pooled_keys, keys))
    if summaries.importance is not None:
        assert importance is not None
        whole = summaries.importance
        m, size = whole.shape[3:]
        place = blocks.new_places(start, count, importance.shape[2], m * size)
        row, head = jnp.arange(whole.shape[1])[:, None, None], jnp.arange(whole.shape[2])[None, :, None]
        summaries = summaries._replace(
            importance=whole.at[layer, row, head, place // size, place % size].set(importance, mode="drop"),
            pooled_importance=append(summaries.pooled_importance, importance[..., None]),
        )
    return summaries


def append_token(
    qkv: Float[Array, "B K G_plus_2 D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    scale: Float[Array, "L K"] | None,
    delta: Float[Array, "L K D heads"] | None,
    summaries: Summaries,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    q, k, v = qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[3]), qkv[:, :, -2], qkv[:, :, -1]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    importance = None
    if summaries.importance is not None:
        assert scale is not None and delta is not None
        importance = importance_of(v, scale[layer], delta[layer])[..., None]
    start, count = jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32)
    return q, k, v, append_summaries(summaries, k[:, :, None], importance, start, count, layer, stride=stride)
