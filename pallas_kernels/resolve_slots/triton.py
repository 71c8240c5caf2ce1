"""Slots in Pallas-Triton: one program per row and KV head; a slot's turn to leave is how many would leave before it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels import _backend

_MOST = 1024  # slots, and wanted blocks
_CHUNK = 16  # slots that all others are compared with at once


def _kernel(layer, wanted, step, blocks_in, last_used_in, blocks, last_used, slots, missing, *, width, num_slots):
    head, row = (_backend.program_id(axis) for axis in range(2))
    at = (_backend.layer_index(layer, blocks), row, head)
    lanes = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)
    slot = jnp.arange(_backend.next_power_of_two(num_slots), dtype=jnp.int32)

    def load(ref, at, index, size):
        inside = index < size
        return _backend.load(ref.at[(*at, jnp.where(inside, index, 0))], mask=inside, other=-1)

    want = load(wanted, (row, head), lanes, width)

    def table(index):
        """(matches with what is wanted, age, block) of these slots; what is in use or no slot at all is never old."""
        block, used = load(blocks_in, at, index, num_slots), load(last_used_in, at, index, num_slots)
        match = (want[:, None] == block[None]) & (want >= 0)[:, None] & (index < num_slots)[None]
        in_use = jnp.max(match.astype(jnp.int32), axis=0) > 0
        return match, jnp.where(in_use | (index >= num_slots), jnp.iinfo(jnp.int32).max, used), block

    match, age, block = table(slot)

    def count_older(chunk, turn):
        other = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
        _, other_age, other_block = table(other)
        mine, theirs = (age[:, None], block[:, None], slot[:, None]), (other_age[None], other_block[None], other[None])
        before = (theirs[1] < mine[1]) | ((theirs[1] == mine[1]) & (theirs[2] < mine[2]))
        before = (theirs[0] < mine[0]) | ((theirs[0] == mine[0]) & before)
        return turn + jnp.sum((before & (theirs[2] < num_slots)).astype(jnp.int32), axis=1)

    turn = jax.lax.fori_loop(0, -(-num_slots // _CHUNK), count_older, jnp.zeros_like(slot))
    resident = jnp.max(match.astype(jnp.int32), axis=1) > 0
    absent = (want >= 0) & ~resident
    # The r-th missing block takes the slot whose turn is r.
    rank = jnp.minimum(_backend.running_count(absent) - 1, num_slots - 1)
    takes = absent[:, None] & (turn[None] == rank[:, None]) & (slot < num_slots)[None]
    placed = match | takes
    chosen = jnp.where(want >= 0, jnp.max(jnp.where(placed, slot[None], -1), axis=1), -1)
    filled = jnp.max(placed.astype(jnp.int32), axis=0) > 0
    new_block = jnp.where(filled, jnp.max(jnp.where(placed, want[:, None], -1), axis=0), block)

    def store(ref, at, index, size, value):
        # Lanes that store nothing still get an address of their own.
        _backend.store(ref.at[(*at, index)], value, mask=index < size)

    new_used = jnp.where(filled, step[row], load(last_used_in, at, slot, num_slots))
    _backend.barrier()  # the table is read by all, and written where it lies
    store(slots, (row, head), lanes, width, chosen)
    store(missing, (row, head), lanes, width, absent.astype(jnp.int32))
    store(blocks, at, slot, num_slots, new_block)
    store(last_used, at, slot, num_slots, new_used)


def unsupported(blocks: Array, last_used: Array, wanted: Array, step: Array, layer: Array) -> str | None:
    """Why these arguments cannot take the kernel; None where they can."""
    if not 1 <= wanted.shape[-1] <= _MOST or blocks.shape[-1] > _MOST:
        return f"it takes 1 to {_MOST} blocks and slots, got {wanted.shape[-1]} and {blocks.shape[-1]}"
    return None


def resolve_slots(
    blocks: Int32[Array, "L B K slots"],
    last_used: Int32[Array, "L B K slots"],
    wanted: Int32[Array, "B K J"],
    step: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[Int32[Array, "L B K slots"], Int32[Array, "L B K slots"], Int32[Array, "B K J"], Bool[Array, "B K J"]]:
    batch, kv_heads, width = wanted.shape
    num_slots = blocks.shape[-1]

    def kernel(*refs: Any) -> None:
        _kernel(*refs, width=width, num_slots=num_slots)

    table = jax.ShapeDtypeStruct(blocks.shape, jnp.int32)
    listed = jax.ShapeDtypeStruct(wanted.shape, jnp.int32)
    blocks, last_used, slots, missing = _backend.triton_call(
        kernel,
        name="resolve_slots",
        grid=(kv_heads, batch),
        out_shape=(table, table, listed, listed),
        num_warps=8 if max(width, num_slots) > 64 else 4,
        aliases={3: 0, 4: 1},
    )(jax.lax.reshape(layer, (1,)), wanted, step, blocks, last_used)
    return blocks, last_used, slots, missing > 0
