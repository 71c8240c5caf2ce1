"""Transport by a Pallas-Triton kernel that reads and writes pinned host memory itself: one launch per direction."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend

# In all, or one per row and KV head: enough to fill the link with blocks of so many bytes, each a trip at a time. More
# take processors away from what runs beside them; smaller blocks need more to have as many bytes under way.
_PROGRAMS = 32
_BYTES = 2**14
_WARPS = 8


def with_place(host, pool, page_table, at, block, slot, then):
    """In a kernel: calls `then` with where a block lies in the store and in the pool, where it lies in both.

    at: layer, row and KV head; a pool of one layer holds that one.
    """
    layer, row, head = at
    has_place = (block >= 0) & (block < page_table.shape[1]) & (slot >= 0) & (slot < pool.shape[3])
    page = page_table[row, jnp.where(has_place, block, 0)]

    @_backend.when(has_place & (page >= 0))
    def _():
        then((layer, page % host.shape[1], head), (layer if pool.shape[0] == host.shape[0] else 0, row, head, slot))


def fetch_block(host, pool, page_table, at, block, slot):
    """In a kernel: a block from the store into a slot."""

    def copy(there, here):
        pool[here] = host[there]

    with_place(host, pool, page_table, at, block, slot, copy)


def _store_block(host, pool, page_table, at, block, slot):
    """In a kernel: a block from its slot into the store."""

    def copy(there, here):
        host[there] = pool[here]

    with_place(host, pool, page_table, at, block, slot, copy)


def _move_kernel(layer, block_ids, slots, page_table, host, pool, *, move, programs):
    """`move` for every entry; every program takes each `programs`-th one.

    layer: of lists [B, K or 1, X]; None for lists [L, B, K or 1, X], of all layers.
    """
    program, head, row = (_backend.program_id(axis) for axis in range(3))
    number = program // programs if layer is None else _backend.layer_index(layer, host)
    of_head = (row, 0 if block_ids.shape[-2] == 1 else head)
    listed = (number, *of_head) if layer is None else of_head

    def body(trip, carry):
        entry = (*listed, trip * programs + program % programs)
        move(host, pool, page_table, (number, row, head), block_ids[entry], slots[entry])
        return carry

    jax.lax.fori_loop(0, block_ids.shape[-1] // programs, body, 0)


def _call(host: Array, pool: Array, lists: tuple[Array, ...], layer: Array | None, *, fetch: bool) -> Array:
    """The pool where blocks are fetched, else the store, in place where that is donated. lists: table, ids, slots."""
    page_table, *listed = lists
    lead = 1 if layer is not None else host.shape[0]
    block_bytes = math.prod(pool.shape[4:]) * pool.dtype.itemsize
    wanted = _PROGRAMS * max(1, _BYTES // max(1, block_bytes))
    per_list = -(-wanted // max(1, lead * math.prod(pool.shape[1:3])))
    programs = _backend.next_power_of_two(min(per_list, listed[0].shape[-1]))
    block_ids, slots = (_backend.pad_to_multiple(x, x.ndim - 1, programs, -1) for x in listed)
    number = None if layer is None else jax.lax.reshape(layer, (1,))
    operands = (number, block_ids, slots, page_table, host, pool)

    def kernel(*refs: Any) -> None:
        layer, block_ids, slots, page_table, host, pool, target = refs
        host, pool = (host, target) if fetch else (target, pool)
        _move_kernel(layer, block_ids, slots, page_table, host, pool, move=move, programs=programs)

    move = fetch_block if fetch else _store_block
    target = pool if fetch else host
    return _backend.triton_call(
        kernel,
        name="fetch_blocks" if fetch else "write_back_blocks",
        grid=(lead * programs, *pool.shape[2:0:-1]),
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        num_warps=_WARPS,
        aliases={sum(x is not None for x in operands) - (1 if fetch else 2): 0},
    )(*operands)


def unsupported(target: Array, source: Array, *lists: Any) -> str | None:
    """Why these arguments cannot take the kernel; None where they can."""
    for size in source.shape[-2:]:
        if not _backend.is_power_of_two(size):
            return f"tokens per block and head dim must be powers of two, got {list(source.shape[-2:])}"
    return None


def fetch_blocks(
    pool: Float[Array, "layers B K slots parts P D"],
    host: Float[Array, "L pages K parts P D"],
    page_table: Int32[Array, "B M"],
    block_ids: Int32[Array, "B heads X"],
    slots: Int32[Array, "B heads X"],
    layer: Int32[Array, ""],
) -> Float[Array, "layers B K slots parts P D"]:
    return _call(host, pool, (page_table, block_ids, slots), layer, fetch=True)


def write_back_blocks(
    host: Float[Array, "L pages K parts P D"],
    pool: Float[Array, "layers B K slots parts P D"],
    page_table: Int32[Array, "B M"],
    block_ids: Int32[Array, "*L B heads X"],
    slots: Int32[Array, "*L B heads X"],
    layer: Int32[Array, ""] | None,
) -> Float[Array, "L pages K parts P D"]:
    moved = _call(host, pool, (page_table, block_ids, slots), layer, fetch=False)
    # Moves nothing: it gives the result back the type of an array in host memory.
    return jax.device_put(moved, jax.memory.Space.Host)
