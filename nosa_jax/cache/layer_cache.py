"""What a layer does to the decode state: whole [L, ...] arrays in, whole arrays out, `layer` an int32 scalar.

Slices of the pool or the host store would be copies; only small tables are sliced.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nosa_jax.attention.importance import Importance
from nosa_jax.cache import host_store, slots
from nosa_jax.cache.slots import SlotTable
from nosa_jax.cache.state import DecodeState, put_table, table_at
from nosa_jax.config import AttentionConfig, ModelConfig
from pallas_kernels import (
    Residence,
    Store,
    Token,
    append_token,
    blocks,
    resolve_slots,
    update_and_attend,
    write_back_blocks,
)
from pallas_kernels.append_token import Summaries, append_summaries


def summarize(
    config: AttentionConfig,
    state: DecodeState,
    k: Float[Array, "B K n D"],
    importance: Float[Array, "B K n"] | None,
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> DecodeState:
    """Adds the first `count[b]` new tokens of each row to what the selection reads: pooled keys and importance."""
    summaries = append_summaries(
        _summaries(state), k, importance, state.lengths, count, layer, stride=config.pooling_stride
    )
    return dataclasses.replace(state, **summaries._asdict())


def _summaries(state: DecodeState) -> Summaries:
    return Summaries(state.keys, state.importance, state.pooled_importance)


def read_token(
    config: ModelConfig,
    state: DecodeState,
    qkv: Float[Array, "B heads D"],
    cos_sin: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    importance: Importance | None,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"]]:
    """`summarize` for one token per row, with what comes before it: also returns its rotated q and k, and its v.

    importance: of all layers.
    """
    scale, delta = (None, None) if importance is None else (importance.A[...], importance.delta[...])
    q, k, v, summaries = append_token(
        qkv, *cos_sin, scale, delta, _summaries(state), positions, layer,
        kv_heads=config.num_kv_heads, stride=config.attention.pooling_stride,
    )  # fmt: skip
    return dataclasses.replace(state, **summaries._asdict()), q, k, v


def admit(
    state: DecodeState, block_ids: Int32[Array, "B K J"], positions: Int32[Array, " B"], layer: Int32[Array, ""]
) -> tuple[DecodeState, Residence]:
    """Gives every selected block a slot. `attend` fetches what is missing.

    The query's own block takes a slot but is not fetched when it starts with this very token.
    """
    if state.host is None:
        return state, Residence(block_ids, block_ids, None)
    size = state.pool.shape[5]
    table = state.table
    held, last_used, slot_ids, missing = resolve_slots(table.blocks, table.last_used, block_ids, positions, layer)
    starts_now = (positions % size == 0)[:, None, None] & (block_ids == (positions // size)[:, None, None])
    loads = jnp.where(missing & ~starts_now, block_ids, -1)
    return dataclasses.replace(state, table=SlotTable(held, last_used)), Residence(block_ids, slot_ids, loads)


def attend(
    state: DecodeState,
    q: Float[Array, "B N D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    residence: Residence,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[DecodeState, Float[Array, "B N D"]]:
    """Adds one token per row, fetches the missing blocks and attends."""
    store = Store(state.pool, state.host, state.importance)
    out, pool = update_and_attend(Token(q, k, v), store, residence, positions, layer, transport=state.transport)
    return dataclasses.replace(state, pool=pool), out


def write_back(state: DecodeState, positions: Int32[Array, " B"]) -> DecodeState:
    """Copies the blocks that the tokens at `positions` (-1 for none) filled to the host store, in all layers.

    A selection always holds the query's own block, so the slot table names it.
    """
    if state.host is None:
        return state
    size = state.pool.shape[5]
    filled = jnp.where(positions % size == size - 1, positions // size, -1)[:, None]
    match = (state.table.blocks == filled[..., None]) & (filled >= 0)[..., None]
    slot = jnp.where(match.any(-1), jnp.argmax(match, axis=-1).astype(jnp.int32), -1)[..., None]
    filled = jnp.broadcast_to(filled[..., None], slot.shape)
    host = write_back_blocks(state.host, state.pool, filled, slot, transport=state.transport)
    return dataclasses.replace(state, host=host)


def stage_layer(state: DecodeState, layer: Int32[Array, ""], *, fresh: bool) -> Float[Array, "B K M 2 P D"]:
    """All blocks of one layer on the device. fresh: the rows are empty, nothing need be read."""
    if state.host is None:
        return jax.lax.dynamic_index_in_dim(state.pool, layer, keepdims=False)
    if fresh:
        return jnp.zeros(state.host.shape[1:], state.pool.dtype)
    staged = host_store.load_layer(state.host, layer)
    # A block that is not full yet lives in its slot alone.
    size = state.pool.shape[5]
    own = jnp.where(state.lengths % size > 0, state.lengths // size, -1)
    table = table_at(state, layer).blocks
    slot = jnp.argmax(table == own[:, None, None], axis=-1)
    row, head = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None, :]
    target = jnp.where(own >= 0, own, state.num_blocks)[:, None]
    return staged.at[row, head, target].set(state.pool[layer, row, head, slot], mode="drop")


def write_staged(
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


def unstage_layer(
    state: DecodeState,
    staged: Float[Array, "B K M 2 P D"],
    last_ids: Int32[Array, "B K J"] | None,
    count: Int32[Array, " B"],
    width: int,
    layer: Int32[Array, ""],
    *,
    fresh: bool,
) -> DecodeState:
    """Stores a staged layer after up to `width` new tokens; the slots then hold `last_ids`, the last selection."""
    if state.host is None:
        return dataclasses.replace(state, pool=jax.lax.dynamic_update_index_in_dim(state.pool, staged, layer, 0))
    assert last_ids is not None
    size, m = state.pool.shape[5], state.num_blocks
    touched = min(m, -(-width // size) + 1)
    if fresh:
        host = host_store.store_layer(state.host, staged[:, :, :touched], layer)
    else:
        host = host_store.store_rows(state.host, staged, state.lengths // size, touched, layer)

    num_slots = state.pool.shape[3]
    held = min(last_ids.shape[-1], num_slots)
    row, head = jnp.arange(last_ids.shape[0])[:, None, None], jnp.arange(last_ids.shape[1])[None, :, None]
    selected = staged[row, head, jnp.maximum(last_ids[..., :held], 0)]
    start = (layer, *(0,) * (state.pool.ndim - 1))
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
