"""Query-aware scores as the definition reads: softmax over visible windows, summed over the group, max to blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks


def window_scores(
    q: Float[Array, "B T N D"],
    pooled_keys: Float[Array, "B K C D"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None = None,
    *,
    block_size: int,
    stride: int,
) -> Float[Array, "B K T C"]:
    """Softmax of q . pooled / sqrt(D) over the visible windows per head, summed over each group of N/K heads."""
    batch, length, heads, dim = q.shape
    kv_heads, windows = pooled_keys.shape[1], pooled_keys.shape[2]
    group = heads // kv_heads
    grouped = q.astype(jnp.float32).reshape(batch, length, kv_heads, group, dim)
    logits = jnp.einsum("btkgd,bkcd->bkgtc", grouped, pooled_keys.astype(jnp.float32)) / dim**0.5
    query_first = blocks.query_first_blocks(positions, first_block, block_size)
    visible = blocks.visible_windows(positions, query_first, windows, block_size=block_size, stride=stride)
    visible = visible[:, None, None]
    masked = jnp.where(visible, logits, -jnp.inf)
    any_visible = visible.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(any_visible, masked, 0.0), axis=-1)
    return jnp.where(visible, weights, 0.0).sum(2)


def block_scores_ref(
    q: Float[Array, "B T N D"],
    pooled_keys: Float[Array, "B K C D"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None = None,
    *,
    num_blocks: int,
    block_size: int,
    stride: int,
) -> Float[Array, "B K T M"]:
    scores = window_scores(q, pooled_keys, positions, first_block, block_size=block_size, stride=stride)
    return blocks.pool_windows_to_blocks(scores, first_block, blocks=num_blocks, ratio=block_size // stride)
