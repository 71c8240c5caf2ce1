"""Portable transport: one asynchronous `device_put` per block, and no trip for a block that need not move."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import slice_start

Places = tuple[tuple[Array, ...], tuple[Array, ...]]


def _for_each_move(
    host: Float[Array, "L pages K parts P D"],
    pool: Float[Array, "layers B K slots parts P D"],
    page_table: Int32[Array, "B M"],
    block_ids: Int32[Array, "*L B heads X"],
    slots: Int32[Array, "*L B heads X"],
    layer: Int32[Array, ""] | None,
    move: Callable[[Places, Array], Array],
    target: Array,
) -> Array:
    """Folds `move(places, target)` over the entries that move, in order; the places are those in store and pool."""
    rows = jnp.arange(pool.shape[1])[:, None, None]
    known = (block_ids >= 0) & (block_ids < page_table.shape[1])
    page = jnp.where(known, page_table[rows, jnp.where(known, block_ids, 0)], -1)
    valid = (page >= 0) & (slots >= 0) & (slots < pool.shape[3])
    page = page % host.shape[1]
    if layer is not None:
        page, slots, valid = (x[None] for x in (page, slots, valid))
    # Entries that move first, so that the loop has as many trips as there are blocks to move.
    order = jnp.argsort(~valid.reshape(-1), stable=True).astype(jnp.int32)

    def body(trip: Array, target: Array) -> Array:
        entry = jnp.unravel_index(order[trip], valid.shape)
        of_list, row, head = entry[:3]
        number = of_list if layer is None else layer
        own = number if pool.shape[0] == host.shape[0] else 0
        there = slice_start(number, page[entry], head, 0, 0, 0)
        return move((there, slice_start(own, row, head, slots[entry], 0, 0, 0)), target)

    return jax.lax.fori_loop(0, jnp.sum(valid, dtype=jnp.int32), body, target)


def _sizes(pool: Array, block_ids: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what moves at once in the store and in the pool: all KV heads where their lists are the same."""
    heads, block = pool.shape[2] // block_ids.shape[-2], pool.shape[4:]
    return (1, 1, heads, *block), (1, 1, heads, 1, *block)


def fetch_blocks(
    pool: Float[Array, "layers B K slots parts P D"],
    host: Float[Array, "L pages K parts P D"],
    page_table: Int32[Array, "B M"],
    block_ids: Int32[Array, "B heads X"],
    slots: Int32[Array, "B heads X"],
    layer: Int32[Array, ""],
) -> Float[Array, "layers B K slots parts P D"]:
    in_store, in_pool = _sizes(pool, block_ids)

    def move(places: Places, pool: Array) -> Array:
        there, here = places
        data = jax.device_put(jax.lax.dynamic_slice(host, there, in_store), jax.memory.Space.Device)
        return jax.lax.dynamic_update_slice(pool, data.reshape(in_pool), here)

    return _for_each_move(host, pool, page_table, block_ids, slots, layer, move, pool)


def write_back_blocks(
    host: Float[Array, "L pages K parts P D"],
    pool: Float[Array, "layers B K slots parts P D"],
    page_table: Int32[Array, "B M"],
    block_ids: Int32[Array, "*L B heads X"],
    slots: Int32[Array, "*L B heads X"],
    layer: Int32[Array, ""] | None,
) -> Float[Array, "L pages K parts P D"]:
    in_store, in_pool = _sizes(pool, block_ids)

    def move(places: Places, host: Array) -> Array:
        there, here = places
        data = jax.lax.dynamic_slice(pool, here, in_pool).reshape(in_store)
        return jax.lax.dynamic_update_slice(host, jax.device_put(data, jax.memory.Space.Host), there)

    return _for_each_move(host, pool, page_table, block_ids, slots, layer, move, host)
