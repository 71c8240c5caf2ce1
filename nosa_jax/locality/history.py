"""What a selection has to do with those before it: when a block was used last, and how many are in use.

On the host, in NumPy, outside `jax.jit`: one pass over the steps, all layers, rows and KV heads at once. Letters,
shapes and errors as in `nosa_jax.locality.measures`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from nosa_jax.locality.measures import BlockIds, checked_ids
from pallas_kernels.checks import require_int


class Lanes(NamedTuple):
    """Selections of one layer, row and KV head each, for tables with a column per block.

    columns: int [N, T, J], the column of each selected block: its id, or `padding`, the last column, for -1.
    shape: [..., T, J], that of the selections.
    """

    columns: np.ndarray
    padding: int
    shape: tuple[int, ...]


def as_lanes(block_ids: Any) -> Lanes:
    """Checked ids [..., T, J] as lanes."""
    ids = np.asarray(checked_ids(block_ids))
    padding = int(ids.max(initial=-1)) + 1
    columns = np.where(ids < 0, padding, ids).reshape(-1, *ids.shape[-2:])
    return Lanes(columns, padding, ids.shape)


def _last_uses(lanes: Lanes, steps: Iterable[int], never: int) -> np.ndarray:
    """int32 [N, T, J]: with steps in this order, the one before each at which the block was selected, else `never`."""
    seen = np.full((len(lanes.columns), lanes.padding + 1), never, np.int32)
    found = np.empty(lanes.columns.shape, np.int32)
    for step in steps:
        found[:, step] = np.take_along_axis(seen, lanes.columns[:, step], axis=1)
        np.put_along_axis(seen, lanes.columns[:, step], step, axis=1)
    return found


def next_uses(lanes: Lanes) -> np.ndarray:
    """int32 [N, T, J]: the next step that selects the block again, T where none does; anything at padding."""
    steps = lanes.columns.shape[1]
    return _last_uses(lanes, reversed(range(steps)), steps)


def reuse_time(block_ids: BlockIds) -> Int32[np.ndarray, "... T J"]:
    """Steps since each selected block was selected before: 1 where the step before selected it, too; 0 where none did,
    and at padding."""
    lanes = as_lanes(block_ids)
    steps = lanes.columns.shape[1]
    last = _last_uses(lanes, range(steps), -1)
    since = np.arange(steps, dtype=np.int32)[:, None] - last
    return np.where((last < 0) | (lanes.columns == lanes.padding), 0, since).reshape(lanes.shape)


def reuse_distance(block_ids: BlockIds) -> Int32[np.ndarray, "... T J"]:
    """How many other blocks were used more recently than each selected one; -1 at its first use and at padding.

    This is the distance in the stack of least-recently-used: a pool of `slots` blocks has lost a block that comes back
    if and only if its distance is `slots` or more, so one pass tells the misses of all pools. Of blocks that one step
    used the lower id counts as older, as for the engine.
    """
    lanes = as_lanes(block_ids)
    width = lanes.padding + 1
    age = np.full((len(lanes.columns), width), -1, np.int64)  # the larger, the more recent
    found = np.empty(lanes.columns.shape, np.int32)
    places = np.broadcast_to(np.arange(width, dtype=np.int32)[::-1], age.shape)
    recent = np.empty(age.shape, np.int32)
    for step in range(found.shape[1]):
        wanted = lanes.columns[:, step]
        np.put_along_axis(recent, np.argsort(age, axis=1), places, axis=1)  # 0 for the most recent
        known = np.take_along_axis(age, wanted, axis=1) >= 0
        found[:, step] = np.where(known, np.take_along_axis(recent, wanted, axis=1), -1)
        np.put_along_axis(age, wanted, step * width + wanted.astype(np.int64), axis=1)
        age[:, lanes.padding] = -1
    return found.reshape(lanes.shape)


def working_set(block_ids: BlockIds, window: int) -> Int32[np.ndarray, "... T"]:
    """How many different blocks the last `window` steps selected, each step itself among them; 0 at padding.

    The first `window` - 1 steps see fewer than that: they count what there is. A step of padding counts as one, too.
    Raises ValueError for a window below 1.
    """
    window = require_int("window", window, 1)
    lanes = as_lanes(block_ids)
    last = np.full((len(lanes.columns), lanes.padding + 1), -window, np.int32)
    sizes = np.zeros(lanes.columns.shape[:2], np.int32)
    for step in range(sizes.shape[1]):
        np.put_along_axis(last, lanes.columns[:, step], step, axis=1)
        last[:, lanes.padding] = -window
        sizes[:, step] = (last > step - window).sum(1)
    valid = (lanes.columns != lanes.padding).any(-1)
    return np.where(valid, sizes, 0).astype(np.int32).reshape(lanes.shape[:-1])
