"""From queries, pooled keys and importance to block ids: wires `block_scores` and `select_blocks`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax import parallel
from nosa_jax.attention.layout import Layout
from nosa_jax.config import AttentionConfig
from pallas_kernels import blocks, pool_keys
from pallas_kernels.block_scores import block_scores
from pallas_kernels.select_blocks import select_blocks

_CHUNK_SCORES = 2**25  # block scores held at once, all rows and heads


def importance_block_scores(
    pooled_importance: Float[Array, "B K C"], first_block: Int32[Array, "B M"] | None, *, num_blocks: int, ratio: int
) -> Float[Array, "B K M"]:
    """Query-agnostic score of each block: the best of its windows."""
    return blocks.pool_windows_to_blocks(pooled_importance, first_block, blocks=num_blocks, ratio=ratio)


def select_in_rows(
    config: AttentionConfig,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K T D"],
    importance: Float[Array, "B K T"] | None,
    layout: Layout,
) -> Int32[Array, "B K T J"]:
    """`select` for the queries of whole rows, from their keys after rotation and their importance."""
    stride, num_blocks = config.pooling_stride, blocks.num_blocks(k.shape[2], config.block_size)

    def select_here(q: Any, k: Any, importance: Any, positions: Any, first_block: Any) -> Array:
        pooled_importance = None
        if importance is not None:
            pooled_importance = pool_keys(parallel.all_tokens(importance)[..., None], stride=stride)[..., 0]
        pooled_keys = pool_keys(parallel.all_tokens(k), stride=stride) if config.uses_query_scores else None
        return select(config, q, pooled_keys, pooled_importance, positions, first_block, num_blocks=num_blocks)

    q, k, importance = jax.lax.stop_gradient((q, k, importance))
    return parallel.per_row_and_head(
        select_here,
        (q, k, importance, layout.positions, layout.first_block),
        ("btk.", "bkt.", "bkt", "bt", "b."),
        "bkt.",
    )


def select(
    config: AttentionConfig,
    q: Float[Array, "B T N D"],
    pooled_keys: Float[Array, "B K C D"] | None,
    pooled_importance: Float[Array, "B K C"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None = None,
    *,
    num_blocks: int,
) -> Int32[Array, "B K T J"]:
    """Block ids of every query, through which no gradient passes (SPEC's selection, of any variant).

    config: the variant and its sizes.
    q: queries after rotation.
    pooled_keys: means of windows of keys; None where the variant does not use them.
    pooled_importance: means of windows of importance; None where the variant does not use it.
    positions: of the queries, -1 for padding.
    first_block: where the document of each block starts in a packed row; None for one document a row.
    num_blocks: M, the blocks that a row may have.
    """
    fill = None
    if config.uses_importance:
        assert pooled_importance is not None
        fill = importance_block_scores(
            jax.lax.stop_gradient(pooled_importance),
            first_block,
            num_blocks=num_blocks,
            ratio=config.block_size // config.pooling_stride,
        )
    q = jax.lax.stop_gradient(q)

    def select_chunk(args: tuple[Array, Array]) -> Array:
        q, positions = args
        scores = None
        if config.uses_query_scores:
            assert pooled_keys is not None
            scores = block_scores(
                q, pooled_keys, positions, first_block,
                num_blocks=num_blocks, block_size=config.block_size, stride=config.pooling_stride,
            )  # fmt: skip
        return select_blocks(
            scores, fill, positions, first_block,
            block_size=config.block_size,
            num_selected_blocks=config.num_selected_blocks,
            num_sink_blocks=config.num_sink_blocks,
            num_local_blocks=config.num_local_blocks,
            num_query_blocks=config.num_query_blocks,
        )  # fmt: skip

    batch, length = positions.shape
    chunk = max(1, _CHUNK_SCORES // (batch * _kv_heads(pooled_keys, fill) * num_blocks))
    if chunk >= length:
        return select_chunk((q, positions))
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(batch, chunks, chunk, *q.shape[2:])
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1).reshape(batch, chunks, chunk)
    ids = jax.lax.map(select_chunk, (jnp.moveaxis(q, 1, 0), jnp.moveaxis(positions, 1, 0)))
    ids = jnp.moveaxis(ids, 0, 2)
    return ids.reshape(*ids.shape[:2], chunks * chunk, ids.shape[-1])[:, :, :length]


def _kv_heads(pooled_keys: Array | None, fill: Array | None) -> int:
    if pooled_keys is not None:
        return pooled_keys.shape[1]
    assert fill is not None
    return fill.shape[1]
