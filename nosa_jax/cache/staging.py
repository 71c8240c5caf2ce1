"""One layer of the cache on the device, while many new tokens are read into it.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar; only the blocks that are there cross the link.
Staging a layer reads nothing that another layer writes, so the next one may be staged before this one is done.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.cache import host_store, slots
from nosa_jax.cache.slots import SlotTable
from nosa_jax.cache.state import DecodeState, put_table, table_at
from nosa_jax.cache.working_set import staged_blocks
from pallas_kernels import blocks, fetch_blocks, write_back_blocks


def stage(
    state: DecodeState, count: Int32[Array, " B"], width: int, layer: Int32[Array, ""], *, fresh: bool
) -> Float[Array, "B K m 2 P D"]:
    """The blocks of one layer on the device, of the rows that are to grow.

    count: new tokens of each row.
    width: the most that any row may get.
    layer: which layer; one beyond the last gives blocks that mean nothing.
    fresh: the rows are empty, nothing need be read.
    """
    m = staged_blocks(state.num_blocks, width, state.block_size, fresh=fresh)
    if state.host is None:
        return jax.lax.dynamic_index_in_dim(state.pool, layer, keepdims=False)[:, :, :m]
    shape = (1, *state.pool.shape[1:3], m, *state.pool.shape[4:])
    staged = jnp.zeros(shape, state.pool.dtype)
    if fresh:
        return staged[0]
    size = state.block_size
    full = jnp.where(count > 0, state.lengths // size, 0)
    ids = host_store.blocks_between(jnp.zeros_like(full), full, m)
    staged = fetch_blocks(staged, state.host, state.page_table, ids, ids, layer, transport=state.transport)[0]
    # A block that is not full yet lives in its slot alone.
    own = jnp.where(state.lengths % size > 0, state.lengths // size, -1)
    table = table_at(state, layer).blocks
    slot = jnp.argmax(table == own[:, None, None], axis=-1)
    row, head = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None, :]
    target = jnp.where(own >= 0, own, m)[:, None]
    return staged.at[row, head, target].set(state.pool[layer, row, head, slot], mode="drop")


def write_tokens(
    state: DecodeState,
    staged: Float[Array, "B K m 2 P D"],
    k: Float[Array, "B K n D"],
    v: Float[Array, "B K n D"],
    count: Int32[Array, " B"],
) -> Float[Array, "B K m 2 P D"]:
    """Puts the new tokens where they belong."""
    size = staged.shape[4]
    place = blocks.new_places(state.lengths, count, k.shape[2], staged.shape[2] * size)
    row, head = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[1])[None, :, None]
    kv = jnp.stack([k, v], axis=3).astype(staged.dtype)
    return staged.at[row, head, place // size, :, place % size].set(kv, mode="drop")


def unstage(
    state: DecodeState,
    staged: Float[Array, "B K m 2 P D"],
    last_ids: Int32[Array, "B K J"] | None,
    count: Int32[Array, " B"],
    width: int,
    layer: Int32[Array, ""],
) -> DecodeState:
    """Stores a staged layer after new tokens: the blocks that they filled, and the slots.

    staged: the layer with them.
    last_ids: selection of each row's last new token, which the slots hold afterwards; None without a host store.
    count: new tokens of each row.
    width: the most that any row may have got.
    layer: which layer.
    """
    if state.host is None:
        start = blocks.slice_start(layer, *(0,) * (state.pool.ndim - 1))
        return dataclasses.replace(state, pool=jax.lax.dynamic_update_slice(state.pool, staged[None], start))
    assert last_ids is not None
    size, m = state.block_size, staged.shape[2]
    filled = host_store.blocks_between(
        state.lengths // size, (state.lengths + count) // size, min(m, blocks.num_blocks(width, size) + 1)
    )
    host = write_back_blocks(
        state.host, staged[None], state.page_table, filled, filled, layer, transport=state.transport
    )

    num_slots = state.num_slots
    held = min(last_ids.shape[-1], num_slots)
    row, head = jnp.arange(last_ids.shape[0])[:, None, None], jnp.arange(last_ids.shape[1])[None, :, None]
    selected = staged[row, head, jnp.clip(last_ids[..., :held], 0, m - 1)]
    start = blocks.slice_start(layer, *(0,) * (state.pool.ndim - 1))
    kept = jax.lax.dynamic_slice(state.pool, start, (1, *selected.shape))[0]
    grows = count > 0
    selected = jnp.where(grows[:, None, None, None, None, None], selected, kept)
    last = state.lengths + count - 1
    table = slots.filled_table(last_ids, jnp.broadcast_to(last[:, None], last_ids.shape[:2]), num_slots)
    old = table_at(state, layer)
    table = SlotTable(*(jnp.where(grows[:, None, None], x, y) for x, y in zip(table, old, strict=True)))
    return dataclasses.replace(
        state,
        host=host,
        pool=jax.lax.dynamic_update_slice(state.pool, selected[None], start),
        table=put_table(state, table, layer),
    )
