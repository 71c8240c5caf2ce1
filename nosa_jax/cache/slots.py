"""The slot table of one layer: which block lies in which slot of the device pool, and who must leave.

Pure functions over int32 arrays of any leading shape; no K or V is touched here. The decode step runs the op
`resolve_slots` on the stacked tables, which is the same rule.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from nosa_jax._pytree import short_repr
from pallas_kernels.resolve_slots import EMPTY, resolve_table


class SlotTable(NamedTuple):
    """blocks [..., slots]: block id in each slot, -1 when empty. last_used [..., slots]: position of its last use."""

    blocks: Int32[Array, "... slots"]
    last_used: Int32[Array, "... slots"]

    def __repr__(self) -> str:
        return short_repr(self)


class Resolution(NamedTuple):
    """table: after the step. slots [..., J]: where each wanted block is, -1 for padding. missing [..., J]: it was not
    resident before the step."""

    table: SlotTable
    slots: Int32[Array, "... J"]
    missing: Bool[Array, "... J"]

    def __repr__(self) -> str:
        return short_repr(self)


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
    blocks, last_used, slots, missing = resolve_table(*table, wanted, step)
    return Resolution(SlotTable(blocks, last_used), slots, missing)
