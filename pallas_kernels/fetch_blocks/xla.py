"""Portable transport: one asynchronous `device_put` per block, and no trip for a block that need not move."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import slice_start


def _for_each_move(
    block_ids: Int32[Array, "layers B K X"],
    slots: Int32[Array, "layers B K X"],
    limits: tuple[int, int],
    move: Callable[[tuple[Array, ...], Array, Array, Array], Array],
    target: Array,
) -> Array:
    """Folds `move((layer, b, k), block, slot, target)` over the valid entries, in order."""
    valid = (block_ids >= 0) & (block_ids < limits[0]) & (slots >= 0) & (slots < limits[1])
    # Valid entries first, so that the loop has as many trips as there are blocks to move.
    order = jnp.argsort(~valid.reshape(-1), stable=True).astype(jnp.int32)

    def body(trip: Array, target: Array) -> Array:
        entry = jnp.unravel_index(order[trip], block_ids.shape)
        return move(entry[:3], block_ids[entry], slots[entry], target)

    return jax.lax.fori_loop(0, jnp.sum(valid, dtype=jnp.int32), body, target)


def fetch_blocks(
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K slots 2 P D"]:
    size = (1, 1, 1, 1, *pool.shape[4:])

    def move(at: tuple[Array, ...], block: Array, slot: Array, pool: Array) -> Array:
        data = jax.lax.dynamic_slice(host, slice_start(layer, *at[1:], block, 0, 0, 0), size)
        data = jax.device_put(data, jax.memory.Space.Device)
        return jax.lax.dynamic_update_slice(pool, data, slice_start(layer, *at[1:], slot, 0, 0, 0))

    return _for_each_move(block_ids[None], slots[None], (host.shape[3], pool.shape[3]), move, pool)


def write_back_blocks(
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "L B K X"],
    slots: Int32[Array, "L B K X"],
) -> Float[Array, "L B K M 2 P D"]:
    size = (1, 1, 1, 1, *pool.shape[4:])

    def move(at: tuple[Array, ...], block: Array, slot: Array, host: Array) -> Array:
        data = jax.lax.dynamic_slice(pool, slice_start(*at, slot, 0, 0, 0), size)
        data = jax.device_put(data, jax.memory.Space.Host)
        return jax.lax.dynamic_update_slice(host, data, slice_start(*at, block, 0, 0, 0))

    return _for_each_move(block_ids, slots, (host.shape[3], pool.shape[3]), move, host)
