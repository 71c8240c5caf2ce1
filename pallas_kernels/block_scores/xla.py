"""Query-aware block scores in chunks of queries: memory is bounded by the chunk, not by T."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks
from pallas_kernels.varying import axes_of, varying

_CHUNK_BYTES = 32 * 2**20  # of the float32 window logits of one chunk
_CACHE_WINDOWS = 128  # pooled keys read from a cache at once


def _dot(q: Float[Array, "B t K G D"], pooled_keys: Float[Array, "B K C D"]) -> Float[Array, "B K G t C"]:
    return jnp.einsum("btkgd,bkcd->bkgtc", q, pooled_keys, preferred_element_type=jnp.float32)


def _cached_dot(
    q: Float[Array, "B t K G D"],
    pooled_keys: Float[Array, "L B K C D"],
    layer: Int32[Array, ""],
    positions: Int32[Array, "B t"],
    stride: int,
) -> Float[Array, "B K G t C"]:
    """The same over one layer of a cache, in pieces: a whole layer's slice would be a copy of it.

    Windows that no query reaches are left at zero.
    """
    _, batch, kv_heads, windows, dim = pooled_keys.shape
    width = min(windows, _CACHE_WINDOWS)
    logits = jnp.zeros((batch, kv_heads, q.shape[3], q.shape[1], windows), jnp.float32)
    if width == 0:
        return logits
    reached = blocks.num_visible_windows(jnp.max(positions), windows, stride)

    def body(piece: Array, logits: Array) -> Array:
        start = jnp.minimum(piece * width, windows - width)  # the last piece overlaps the one before
        keys = jax.lax.dynamic_slice(
            pooled_keys, blocks.slice_start(layer, 0, 0, start, 0), (1, batch, kv_heads, width, dim)
        )[0]
        return jax.lax.dynamic_update_slice_in_dim(logits, _dot(q, keys), start, axis=-1)

    logits = varying(logits, axes_of((q, pooled_keys, positions)))
    return jax.lax.fori_loop(0, (reached + width - 1) // width, body, logits)


def block_scores(
    q: Float[Array, "B T N D"],
    pooled_keys: Float[Array, "*L B K C D"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    layer: Int32[Array, ""] | None = None,
    *,
    num_blocks: int,
    block_size: int,
    stride: int,
) -> Float[Array, "B K T M"]:
    """layer: which one of a cache's pooled keys [L, B, K, C, D]; None where they are those of one layer."""
    batch, length, heads, dim = q.shape
    kv_heads, windows = pooled_keys.shape[-3:-1]
    query_first = blocks.query_first_blocks(positions, first_block, block_size)

    def chunk_scores(args: tuple[Array, Array, Array]) -> Array:
        q, positions, query_first = args
        grouped = q.reshape(batch, -1, kv_heads, heads // kv_heads, dim)
        logits = (
            _dot(grouped, pooled_keys) if layer is None else _cached_dot(grouped, pooled_keys, layer, positions, stride)
        )
        visible = blocks.visible_windows(positions, query_first, windows, block_size=block_size, stride=stride)
        visible = visible[:, None, None]
        logits = jnp.where(visible, logits * dim**-0.5, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        scores = (weights / jnp.where(total > 0, total, 1)).sum(2)
        return blocks.pool_windows_to_blocks(scores, first_block, blocks=num_blocks, ratio=block_size // stride)

    per_query = 4 * batch * heads * max(windows, 1)
    chunk = max(1, min(length, _CHUNK_BYTES // per_query))
    if chunk == length:
        return chunk_scores((q, positions, query_first))
    chunks = -(-length // chunk)
    pad = chunks * chunk - length

    def split(x: Array, fill: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    scores = jax.lax.map(chunk_scores, (split(q, 0), split(positions, -1), split(query_first, 0)))
    return jnp.moveaxis(scores, 0, 2).reshape(batch, kv_heads, chunks * chunk, num_blocks)[:, :, :length]
