"""Slots in Pallas-Triton: one program per row and KV head; a slot's turn to leave is how many would leave before it.

Who is where is found by comparing what is wanted with a few slots at a time. The slots, in the order in which they
leave, go through memory: which one a missing block takes is known only when all are counted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import _backend
from pallas_kernels._lists import List
from pallas_kernels.resolve_slots.xla import IN_USE, Resolved

_MOST = 1024  # slots, and wanted blocks
_CHUNK = 16  # slots that all others are compared with at once


def _kernel(layer, wanted, step, blocks_in, last_used_in, blocks, last_used, slots, loads, num_loads, ages, leaving):
    head, row = (_backend.program_id(axis) for axis in range(2))
    here = (row, head)
    at = (_backend.layer_index(layer, blocks), *here)
    held, ages, leaving = List(blocks_in, at), List(ages, here), List(leaving, here)
    lane, slot = List(wanted, here).lanes(), held.lanes()
    num_slots = blocks.shape[-1]
    chunks = -(-num_slots // _CHUNK)
    want = List(wanted, here).load(lane)

    def of_chunk(chunk):
        index = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
        return index, index < num_slots

    # Whole lists first, so that their parts are in the cache when the loops ask for them.
    block, last = (List(ref, at).load(slot) for ref in (blocks_in, last_used_in))
    ages.store(slot, last)

    def look(chunk, found):
        other, exists = of_chunk(chunk)
        their_block = held.load(other, exists)[None]
        return jnp.maximum(found, jnp.where((want[:, None] == their_block) & (their_block >= 0), other[None], -1))

    nowhere = jnp.full((lane.shape[0], _CHUNK), -1, jnp.int32)
    place = jnp.max(jax.lax.fori_loop(0, chunks, look, nowhere), axis=1)
    _backend.barrier()
    ages.store(place, IN_USE, place >= 0)
    _backend.barrier()

    def tie_break(block, slot):
        """Distinct numbers, by which slots leave that were used at the same time: empty ones first."""
        return jnp.where(block >= 0, block, slot - _MOST)

    age, tie = ages.load(slot)[:, None], tie_break(block, slot)[:, None]

    def count_older(chunk, counts):
        other, exists = of_chunk(chunk)
        their_age, their_tie = ages.load(other, exists)[None], tie_break(held.load(other, exists), other)[None]
        before = (their_age < age) | ((their_age == age) & (their_tie < tie))
        return counts + (before & exists[None]).astype(jnp.int32)

    counts = jax.lax.fori_loop(0, chunks, count_older, jnp.zeros((slot.shape[0], _CHUNK), jnp.int32))
    leaving.store(jnp.sum(counts, axis=1), slot, slot < num_slots)
    _backend.barrier()

    # The r-th missing block takes the slot that leaves r-th.
    absent = (want >= 0) & (place < 0)
    place = jnp.where(absent, leaving.load(_backend.running_count(absent) - 1, absent), place)
    List(slots, here).store(lane, place)
    List(loads, here).store(lane, jnp.where(absent, want, -1))
    num_loads[here] = jnp.sum(absent.astype(jnp.int32))
    List(blocks, at).store(place, want, place >= 0)
    List(last_used, at).store(place, step[row], place >= 0)


def _warps(entries: int) -> int:
    return 4 if entries <= 128 else 8 if entries <= 256 else 32


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
) -> Resolved:
    batch, kv_heads, width = wanted.shape
    num_slots = blocks.shape[-1]

    table = jax.ShapeDtypeStruct(blocks.shape, jnp.int32)
    listed = jax.ShapeDtypeStruct(wanted.shape, jnp.int32)
    num_loads = jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32)
    room = jax.ShapeDtypeStruct((batch, kv_heads, num_slots), jnp.int32)
    *resolved, _, _ = _backend.triton_call(
        _kernel,
        name="resolve_slots",
        grid=(kv_heads, batch),
        out_shape=(table, table, listed, listed, num_loads, room, room),
        num_warps=_warps(max(width, num_slots)),
        aliases={3: 0, 4: 1},
    )(jax.lax.reshape(layer, (1,)), wanted, step, blocks, last_used)
    return Resolved(*resolved)
