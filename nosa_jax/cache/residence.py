"""Which blocks lie in the device pool during a decode step, how they get there, and attention over them.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar: slices of the pool or the host store would be
copies; only small tables are sliced.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.attention.importance import Importance
from nosa_jax.cache.slots import SlotTable
from nosa_jax.cache.state import DecodeState
from nosa_jax.cache.summaries import summaries_of
from nosa_jax.config import AttentionConfig
from pallas_kernels import (
    Projected,
    Residence,
    Selectable,
    Sizes,
    Store,
    Token,
    append_and_select,
    append_token,
    blocks,
    resolve_slots,
    update_and_attend,
    write_back_blocks,
)


def admit_token(
    config: AttentionConfig,
    state: DecodeState,
    qkv: Float[Array, "B K G_plus_2 D"],
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    importance: Importance | None,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    forced_block_ids: Int32[Array, "L B K J"] | None = None,
) -> tuple[DecodeState, Token, Residence, Int32[Array, "B K"] | None]:
    """One new token per row, up to its attention: rotation, summaries, selection, a slot for every selected block.

    Returns how many blocks must cross, too (None for `full`). `attend` fetches them. The query's own block takes a slot
    but is not fetched when it starts with this very token.

    config: of the model's attention.
    state: before the token.
    qkv: of the token, before RoPE.
    cos_sin: float32, of its positions.
    importance: parameters of all layers, None where the variant does not use them.
    positions: of the token, -1 for rows without one.
    layer: which layer.
    forced_block_ids: of all layers, used instead of selecting, see `append_and_select`.
    """
    if not config.is_sparse:  # it keeps no summaries
        stride = config.pooling_stride
        q, k, v, _ = append_token(qkv, *cos_sin, None, None, summaries_of(state), positions, layer, stride=stride)
        state, resident = _admit_every(state, positions, qkv.shape[1], layer)
        return state, Token(q, k, v), resident, None
    scale, delta = (None, None) if importance is None else (importance.A[...], importance.delta[...])
    sizes = Sizes(
        state.num_blocks, config.block_size, config.pooling_stride, config.num_selected_blocks,
        config.num_sink_blocks, config.num_local_blocks, config.num_query_blocks,
    )  # fmt: skip
    kept = Selectable(summaries_of(state), scale, delta, state.table)
    token, kept, resident, count = append_and_select(
        Projected(qkv, *cos_sin), kept, positions, layer, forced_block_ids, sizes=sizes
    )
    return dataclasses.replace(state, table=kept.table, **kept.summaries._asdict()), token, resident, count


def _admit_every(
    state: DecodeState, positions: Int32[Array, " B"], kv_heads: int, layer: Int32[Array, ""]
) -> tuple[DecodeState, Residence]:
    """Every block up to the token's own."""
    every = jnp.arange(state.num_blocks, dtype=jnp.int32)
    every = jnp.where(every <= blocks.query_blocks(positions, state.block_size)[:, None], every, -1)[:, None]
    block_ids = jnp.broadcast_to(every, (positions.shape[0], kv_heads, state.num_blocks))
    if state.host is None:
        return state, Residence(block_ids, block_ids, None)
    table = state.table
    held, last_used, slots, missing, _ = resolve_slots(table.blocks, table.last_used, block_ids, positions, layer)
    loads = blocks.to_load(missing, positions, state.block_size)
    return dataclasses.replace(state, table=SlotTable(held, last_used)), Residence(block_ids, slots, loads)


def attend(
    state: DecodeState,
    token: Token,
    residence: Residence,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Float[Array, "B N D"]]:
    """Adds one token per row, fetches the missing blocks and attends."""
    store = Store(state.pool, state.host, state.page_table, state.importance)
    out, pool = update_and_attend(token, store, residence, positions, layer, transport=state.transport)
    return dataclasses.replace(state, pool=pool), out


def write_back(state: DecodeState, positions: Int32[Array, " B"]) -> DecodeState:
    """Copies the blocks that the tokens at `positions` (-1 for none) filled to the host store, in all layers.

    A selection always holds the query's own block, so the slot table names it.
    """
    if state.host is None:
        return state
    size = state.block_size
    filled = jnp.where(positions % size == size - 1, positions // size, -1)[:, None]
    match = (state.table.blocks == filled[..., None]) & (filled >= 0)[..., None]
    slot = jnp.where(match.any(-1), jnp.argmax(match, axis=-1).astype(jnp.int32), -1)[..., None]
    filled = jnp.broadcast_to(filled[..., None], slot.shape)
    host = write_back_blocks(state.host, state.pool, state.page_table, filled, slot, transport=state.transport)
    return dataclasses.replace(state, host=host)
