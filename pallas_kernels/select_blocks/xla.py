"""Block selection with `lax.top_k`, which gives ties to the lowest id as the rule asks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks


def comparable(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Finite float32 in the order of the scores: NaN as -inf, infinities as the outermost numbers, -0.0 as 0.0."""
    scores = scores.astype(jnp.float32)
    limits = jnp.finfo(jnp.float32)
    # -inf is kept for blocks that may not be taken at all, inf for those that must be; NaN is above nothing.
    scores = jnp.where(scores > limits.min, jnp.minimum(scores, limits.max), limits.min)
    return jnp.where(scores == 0, 0.0, scores)


def _top_mask(scores: Float[Array, "B K T M"], eligible: Array, count: int) -> Array:
    """The `count` best eligible blocks of each query, as a mask."""
    width = scores.shape[-1]
    keys = jnp.where(eligible, scores, -jnp.inf)
    values, ids = jax.lax.top_k(keys, min(count, width))
    ids = jnp.where(values > -jnp.inf, ids, width)
    return jnp.put_along_axis(jnp.zeros((*keys.shape[:-1], width + 1), bool), ids, True, -1, inplace=False)[..., :width]


def select_blocks(
    query_scores: Float[Array, "B K T M"] | None,
    importance_scores: Float[Array, "B K M"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    block_size: int,
    num_selected_blocks: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    num_query_blocks: int,
) -> Int32[Array, "B K T J"]:
    fill = query_scores if importance_scores is None else importance_scores[:, :, None]
    assert fill is not None
    fill = comparable(fill)
    kv_heads, width = fill.shape[1], fill.shape[-1]
    query_block = blocks.query_blocks(positions, block_size)
    query_first = blocks.query_first_blocks(positions, first_block, block_size)
    forced, visible = blocks.forced_and_visible(
        query_block, query_first, width, sink=num_sink_blocks, local=num_local_blocks
    )
    shape = (positions.shape[0], kv_heads, positions.shape[1], width)
    chosen = jnp.broadcast_to(forced[:, None], shape)
    visible = jnp.broadcast_to(visible[:, None], shape)
    if query_scores is not None and importance_scores is not None and num_query_blocks > 0:
        chosen = chosen | _top_mask(comparable(query_scores), visible & ~chosen, num_query_blocks)
    keys = jnp.where(visible, jnp.broadcast_to(fill, shape), -jnp.inf)
    values, ids = jax.lax.top_k(jnp.where(chosen, jnp.inf, keys), min(num_selected_blocks, width))
    ids = jnp.sort(jnp.where(values > -jnp.inf, ids, width), axis=-1)
    ids = jnp.where(ids < width, ids, -1).astype(jnp.int32)
    pad = num_selected_blocks - ids.shape[-1]
    return jnp.pad(ids, [(0, 0)] * 3 + [(0, pad)], constant_values=-1)
