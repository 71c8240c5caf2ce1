"""What a device pool of so many slots must fetch: by the engine's own rule, and by the best rule that there can be.

Letters, shapes and errors as in `nosa_jax.locality.measures`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Int64

from nosa_jax.cache.slots import empty_table, resolve
from nosa_jax.config import AttentionConfig
from nosa_jax.locality.history import as_lanes, next_uses
from nosa_jax.locality.measures import AnyArray, BlockIds, Positions, checked_ids, checked_positions
from pallas_kernels import blocks
from pallas_kernels.checks import bad_value, require_int, require_shape, require_type


def replay_misses(
    block_ids: BlockIds, positions: Positions, attention: AttentionConfig, slots: int
) -> Int32[Array, "... T"]:
    """Blocks fetched from the host at every step by a device pool of `slots` blocks with least-recently-used eviction.

    The decode engine's own rule (`nosa_jax.cache.slots.resolve`) replayed: the first selection is what prefill leaves
    resident and costs nothing; the query's own block, at the step that starts it, takes a slot but is not fetched.
    Every leading index (layer, row, head) has its own pool. Raises ValueError when `slots` < J.
    """
    ids, positions, slots = _checked(block_ids, positions, attention, slots)
    return _replay(ids, positions, attention.block_size, slots)


def _checked(block_ids: Any, positions: Any, attention: Any, slots: Any) -> tuple[Array, Array, int]:
    ids = checked_ids(block_ids)
    require_type("attention", attention, AttentionConfig, "Pass model.config.attention.")
    slots = require_int("slots", slots, 1)
    if slots < ids.shape[-1]:
        rule = f"must hold one selection, J = {ids.shape[-1]}"
        raise bad_value("slots", rule, slots, f"Use slots={ids.shape[-1]} or more.")
    return ids, checked_positions(positions, ids.shape[:-1]), slots


@functools.partial(jax.jit, static_argnames=("block_size", "slots"))
def _replay(ids: Array, positions: Array, block_size: int, slots: int) -> Array:
    valid = (ids >= 0).any(-1)
    after_prefill = valid & (jnp.cumsum(valid, axis=-1) > 1)

    def step(table, inputs):
        wanted, position = inputs
        resolution = resolve(table, wanted, position)
        starts = (position % block_size == 0)[..., None] & (wanted == (position // block_size)[..., None])
        return resolution.table, (resolution.missing & ~starts).sum(-1, dtype=jnp.int32)

    table = empty_table((*ids.shape[:-2], slots))
    _, misses = jax.lax.scan(step, table, (jnp.moveaxis(ids, -2, 0), jnp.moveaxis(positions, -1, 0)))
    return jnp.where(after_prefill, jnp.moveaxis(misses, 0, -1), 0)


def belady_misses(
    block_ids: BlockIds, positions: Positions, attention: AttentionConfig, slots: int
) -> Int32[np.ndarray, "... T"]:
    """Blocks fetched at every step by the offline optimum, Belady's MIN: whoever must leave is wanted again last.

    No rule that evicts can fetch fewer blocks in all, so that what `replay_misses` counts beyond it is the price of not
    knowing the future. The rules are those of the engine: all of a selection is resident while it is read, so none of
    it leaves, the block being written among it; the first selection and a block that starts now cost nothing. (It is
    optimal for selections, too: a block that stays between two of its uses saves one fetch and takes one slot
    meanwhile, and where slots run short the stay that ends last is never worth more than another.)

    On the host, outside `jax.jit`; the time grows with steps times blocks of the row. Raises ValueError when
    `slots` < J, and for ids behind the query, which no step can have selected.
    """
    ids, at, slots = _checked(block_ids, positions, attention, slots)
    own = np.asarray(at)[..., None] // attention.block_size
    if (np.asarray(ids) > own).any():
        raise bad_value("block_ids", "must not name blocks behind the query", "such ids", "Pass them as recorded.")
    lanes = as_lanes(ids)
    following = next_uses(lanes)
    starts = (np.asarray(at) % attention.block_size == 0)[..., None] & (np.asarray(ids) == own)
    free = starts.reshape(lanes.columns.shape) | (lanes.columns == lanes.padding)
    # The step that wants each block next, -1 where it is not resident; the last column stands for padding.
    due = np.full((len(lanes.columns), lanes.padding + 1), -1, np.int32)
    misses = np.zeros(lanes.columns.shape[:2], np.int32)
    for step in range(misses.shape[1]):
        wanted = lanes.columns[:, step]
        misses[:, step] = ((np.take_along_axis(due, wanted, axis=1) < 0) & ~free[:, step]).sum(1)
        np.put_along_axis(due, wanted, following[:, step], axis=1)
        due[:, lanes.padding] = -1
        surplus = (due >= 0).sum(1) - slots
        while (full := np.flatnonzero(surplus > 0)).size:  # seldom more than a few rounds: one for each that came
            others = due[full]
            np.put_along_axis(others, wanted[full], -1, axis=1)
            due[full, others.argmax(1)] = -1
            surplus[full] -= 1
    misses = misses.reshape(ids.shape[:-1])
    valid = (np.asarray(ids) >= 0).any(-1)
    return np.where(valid & (np.cumsum(valid, axis=-1) > 1), misses, 0).astype(np.int32)


def block_bytes(attention: AttentionConfig, head_dim: int, itemsize: int = 2) -> int:
    """Bytes of one block of one layer and KV head, K and V; `itemsize` is that of the cache, 2 for bfloat16."""
    return blocks.block_bytes(attention.block_size, head_dim, itemsize)


def bytes_per_token(misses: Int[AnyArray, "L B K T"], bytes_per_block: int) -> Int64[np.ndarray, "B T"]:
    """Bytes a row moves from host to device for one token, summed over layers and KV heads."""
    require_shape("misses", misses, (None,) * 4, "[L, B, K, T]")
    return np.asarray(misses).sum(axis=(0, 2), dtype=np.int64) * bytes_per_block
