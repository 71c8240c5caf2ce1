"""The ops one after the other, each in XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import blocks
from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes
from pallas_kernels.append_token.xla import append_token
from pallas_kernels.block_scores.xla import block_scores
from pallas_kernels.decode_attention import Residence, Token
from pallas_kernels.resolve_slots.xla import resolve_slots
from pallas_kernels.select_blocks.xla import select_blocks


def append_and_select(
    projected: Projected,
    selectable: Selectable,
    forced_block_ids: Int32[Array, "L B K J"] | None,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    sizes: Sizes,
) -> tuple[Token, Selectable, Residence, Int32[Array, "B K"]]:
    (qkv, cos, sin), (summaries, scale, delta, table) = projected, selectable
    q, k, v, summaries = append_token(qkv, cos, sin, scale, delta, summaries, positions, layer, stride=sizes.stride)
    scores = fill = None
    if summaries.pooled_keys is not None:
        pooled = summaries.pooled_keys[0]
        scores = block_scores(
            q[:, None], pooled, positions[:, None], None, layer,
            num_blocks=sizes.num_blocks, block_size=sizes.block_size, stride=sizes.stride,
        )  # fmt: skip
    if summaries.pooled_importance is not None:
        means = summaries.pooled_importance[0][layer, ..., 0]
        ratio = sizes.block_size // sizes.stride
        fill = blocks.pool_windows_to_blocks(means, None, blocks=sizes.num_blocks, ratio=ratio)
    ids = select_blocks(
        scores, fill, positions[:, None], None, block_size=sizes.block_size,
        num_selected_blocks=sizes.num_selected_blocks, num_sink_blocks=sizes.num_sink_blocks,
        num_local_blocks=sizes.num_local_blocks, num_query_blocks=sizes.num_query_blocks,
    )[:, :, 0]  # fmt: skip
    if forced_block_ids is not None:
        forced = jnp.where(forced_block_ids[layer] < sizes.num_blocks, forced_block_ids[layer], -1)
        ids = blocks.replace_selection(ids, forced, (positions >= 0)[:, None, None])
    if table is None:
        residence, count = Residence(ids, ids, None), jnp.zeros(ids.shape[:2], jnp.int32)
    else:
        held, last_used = table
        held, last_used, slots, missing, _ = resolve_slots(held, last_used, ids, positions, layer)
        table = jax.tree.unflatten(jax.tree.structure(table), (held, last_used))
        loads = blocks.to_load(missing, positions, sizes.block_size)
        residence, count = Residence(ids, slots, loads), jnp.sum(loads >= 0, axis=-1, dtype=jnp.int32)
    return Token(q, k, v), Selectable(summaries, scale, delta, table), residence, count
