"""Which blocks lie in the device pool during a decode step, how they get there, and attention over them.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar: slices of the pool or the host store would be
copies; only small tables are sliced.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.cache.slots import SlotTable
from nosa_jax.cache.state import DecodeState
from pallas_kernels import Residence, Store, Token, resolve_slots, update_and_attend, write_back_blocks


def admit(
    state: DecodeState, block_ids: Int32[Array, "B K J"], positions: Int32[Array, " B"], layer: Int32[Array, ""]
) -> tuple[DecodeState, Residence]:
    """Gives every selected block a slot; `attend` fetches what is missing.

    The query's own block takes a slot but is not fetched when it starts with this very token.
    """
    if state.host is None:
        return state, Residence(block_ids, block_ids, None)
    size = state.block_size
    table = state.table
    held, last_used, slots, missing = resolve_slots(table.blocks, table.last_used, block_ids, positions, layer)
    starts_now = (positions % size == 0)[:, None, None] & (block_ids == (positions // size)[:, None, None])
    loads = jnp.where(missing & ~starts_now, block_ids, -1)
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
