"""Slots by sorting them by age."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.promotion import usual_promotion

EMPTY = -1
IN_USE = jnp.iinfo(jnp.int32).max  # as the time of last use: of a slot that stays


class Resolved(NamedTuple):
    """What `resolve_slots` returns. slots: of the wanted blocks. loads: those of them that were missing, -1 for the
    others. num_loads: how many those are."""

    blocks: Int32[Array, "L B K slots"]
    last_used: Int32[Array, "L B K slots"]
    slots: Int32[Array, "B K J"]
    loads: Int32[Array, "B K J"]
    num_loads: Int32[Array, "B K"]


@usual_promotion
def resolve_table(
    blocks: Int32[Array, "... slots"],
    last_used: Int32[Array, "... slots"],
    wanted: Int32[Array, "... J"],
    step: Int32[Array, "..."],
) -> tuple[Int32[Array, "... slots"], Int32[Array, "... slots"], Int32[Array, "... J"], Bool[Array, "... J"]]:
    """The op on one table of any leading shape, each with its own step."""
    num_slots = blocks.shape[-1]
    valid = wanted >= 0
    match = (wanted[..., :, None] == blocks[..., None, :]) & valid[..., :, None]  # [..., J, slots]
    resident = match.any(-1)
    in_use = match.any(-2)
    missing = valid & ~resident

    age = jnp.where(in_use, IN_USE, last_used)
    slot_ids = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), age.shape)
    _, _, victims = jax.lax.sort((age, blocks, slot_ids), num_keys=2, dimension=-1)
    rank = jnp.cumsum(missing, axis=-1) - 1  # the r-th missing block takes the r-th victim
    taken = jnp.take_along_axis(victims, jnp.clip(rank, 0, num_slots - 1), axis=-1)

    found = jnp.argmax(match, axis=-1).astype(jnp.int32)
    slots = jnp.where(valid, jnp.where(resident, found, taken), EMPTY)

    placed = (slots[..., :, None] == slot_ids[..., None, :]) & valid[..., :, None]  # [..., J, slots]
    filled = placed.any(-2)
    blocks = jnp.where(filled, jnp.max(jnp.where(placed, wanted[..., :, None], EMPTY), axis=-2), blocks)
    last_used = jnp.where(filled, step[..., None], last_used)
    return blocks.astype(jnp.int32), last_used.astype(jnp.int32), slots, missing


def resolve_slots(
    blocks: Int32[Array, "L B K slots"],
    last_used: Int32[Array, "L B K slots"],
    wanted: Int32[Array, "B K J"],
    step: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> Resolved:
    steps = jnp.broadcast_to(step[:, None], wanted.shape[:2])
    new_blocks, new_used, slots, missing = resolve_table(blocks[layer], last_used[layer], wanted, steps)
    put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)
    loads = jnp.where(missing, wanted, EMPTY)
    return Resolved(put(blocks, new_blocks), put(last_used, new_used), slots, loads, missing.sum(-1, dtype=jnp.int32))
