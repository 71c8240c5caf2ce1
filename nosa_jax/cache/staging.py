"""A whole layer of the cache on the device, while many new tokens are read into it.

Whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar; one layer is staged at a time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.cache import host_store, slots
from nosa_jax.cache.slots import SlotTable
from nosa_jax.cache.state import DecodeState, put_table, table_at
from pallas_kernels import blocks


def stage(state: DecodeState, layer: Int32[Array, ""], *, fresh: bool) -> Float[Array, "B K M 2 P D"]:
    """All blocks of one layer on the device. fresh: the rows are empty, nothing need be read."""
    if state.host is None:
        return jax.lax.dynamic_index_in_dim(state.pool, layer, keepdims=False)
    if fresh:
        return jnp.zeros(state.host.shape[1:], state.pool.dtype)
    staged = host_store.load_layer(state.host, layer)
    # A block that is not full yet lives in its slot alone.
    size = state.block_size
    own = jnp.where(state.lengths % size > 0, state.lengths // size, -1)
    table = table_at(state, layer).blocks
    slot = jnp.argmax(table == own[:, None, None], axis=-1)
    row, head = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None, :]
    target = jnp.where(own >= 0, own, state.num_blocks)[:, None]
    return staged.at[row, head, target].set(state.pool[layer, row, head, slot], mode="drop")


def write_tokens(
    state: DecodeState,
    staged: Float[Array, "B K M 2 P D"],
    k: Float[Array, "B K n D"],
    v: Float[Array, "B K n D"],
    count: Int32[Array, " B"],
) -> Float[Array, "B K M 2 P D"]:
    """Puts the new tokens where they belong."""
    size = staged.shape[4]
    place = blocks.new_places(state.lengths, count, k.shape[2], state.num_blocks * size)
    row, head = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[1])[None, :, None]
    kv = jnp.stack([k, v], axis=3).astype(staged.dtype)
    return staged.at[row, head, place // size, :, place % size].set(kv, mode="drop")


def unstage(
    state: DecodeState,
    staged: Float[Array, "B K M 2 P D"],
    last_ids: Int32[Array, "B K J"] | None,
    count: Int32[Array, " B"],
    width: int,
    layer: Int32[Array, ""],
    *,
    fresh: bool,
) -> DecodeState:
    """Stores a staged layer after new tokens.

    staged: the layer with them.
    last_ids: selection of each row's last new token, which the slots hold afterwards; None without a host store.
    count: new tokens of each row.
    width: the most that any row may have got.
    layer: which layer.
    fresh: the rows were empty before.
    """
    if state.host is None:
        return dataclasses.replace(state, pool=jax.lax.dynamic_update_index_in_dim(state.pool, staged, layer, 0))
    assert last_ids is not None
    size, m = state.block_size, state.num_blocks
    touched = min(m, -(-width // size) + 1)
    if fresh:
        host = host_store.store_layer(state.host, staged[:, :, :touched], layer)
    else:
        host = host_store.store_rows(state.host, staged, state.lengths // size, touched, layer)

    num_slots = state.num_slots
    held = min(last_ids.shape[-1], num_slots)
    row, head = jnp.arange(last_ids.shape[0])[:, None, None], jnp.arange(last_ids.shape[1])[None, :, None]
    selected = staged[row, head, jnp.maximum(last_ids[..., :held], 0)]
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
