"""The slot table of one layer: which block lies in which slot of the device pool, and who must leave.

Pure functions over int32 arrays; no K or V is touched here. Eviction is least-recently-used, ties to the lowest
block id: empty slots go first, then the block whose last use is oldest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

EMPTY = -1
_IN_USE = jnp.iinfo(jnp.int32).max


class SlotTable(NamedTuple):
    """blocks [..., slots]: block id in each slot, -1 when empty. last_used [..., slots]: position of its last use."""

    blocks: Int32[Array, "... slots"]
    last_used: Int32[Array, "... slots"]


class Resolution(NamedTuple):
    """table: after the step. slots [..., J]: where each wanted block is, -1 for padding. missing [..., J]: it was not
    resident before the step."""

    table: SlotTable
    slots: Int32[Array, "... J"]
    missing: Bool[Array, "... J"]


def empty_table(shape: tuple[int, ...]) -> SlotTable:
    return SlotTable(jnp.full(shape, EMPTY, jnp.int32), jnp.full(shape, EMPTY, jnp.int32))


def filled_table(wanted: Int32[Array, "... J"], step: Int32[Array, "..."], num_slots: int) -> SlotTable:
    """The table that holds `wanted` (-1 padding at the end) in its first slots, all used at `step`."""
    width = wanted.shape[-1]
    if width < num_slots:
        wanted = jnp.pad(wanted, [(0, 0)] * (wanted.ndim - 1) + [(0, num_slots - width)], constant_values=EMPTY)
    blocks = wanted[..., :num_slots].astype(jnp.int32)
    return SlotTable(blocks, jnp.where(blocks >= 0, step[..., None], EMPTY).astype(jnp.int32))


def resolve(table: SlotTable, wanted: Int32[Array, "... J"], step: Int32[Array, "..."]) -> Resolution:
    """Finds a slot for every wanted block, evicting where it must.

    wanted: distinct block ids, -1 for padding; at most `slots` of them may be valid.
    step: a number that grows from call to call (the query's position).
    """
    num_slots = table.blocks.shape[-1]
    valid = wanted >= 0
    match = (wanted[..., :, None] == table.blocks[..., None, :]) & valid[..., :, None]  # [..., J, slots]
    resident = match.any(-1)
    in_use = match.any(-2)
    missing = valid & ~resident

    age = jnp.where(in_use, _IN_USE, table.last_used)
    slot_ids = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), age.shape)
    _, _, victims = jax.lax.sort((age, table.blocks, slot_ids), num_keys=2, dimension=-1)
    rank = jnp.cumsum(missing, axis=-1) - 1  # the r-th missing block takes the r-th victim
    taken = jnp.take_along_axis(victims, jnp.clip(rank, 0, num_slots - 1), axis=-1)

    found = jnp.argmax(match, axis=-1).astype(jnp.int32)
    slots = jnp.where(valid, jnp.where(resident, found, taken), EMPTY)

    placed = (slots[..., :, None] == slot_ids[..., None, :]) & valid[..., :, None]  # [..., J, slots]
    filled = placed.any(-2)
    blocks = jnp.where(filled, jnp.max(jnp.where(placed, wanted[..., :, None], EMPTY), axis=-2), table.blocks)
    last_used = jnp.where(filled, step[..., None], table.last_used)
    return Resolution(SlotTable(blocks.astype(jnp.int32), last_used.astype(jnp.int32)), slots, missing)
