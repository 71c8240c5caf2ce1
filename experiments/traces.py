"""Selections made up to have a given locality: block ids per step whose misses, by slots, are the published ones.

Least-recently-used misses come from `nosa_jax.cache.plan`: 3.58, 1.20, 0.86 and 0.71 blocks per layer, KV head, row and
step at 64, 80, 96 and 128 slots for NOSA. So at each step some blocks return from where they lie in the stack of recent
use, one of 65th to 80th place with weight 3.58 - 1.20 and so on, and as many others leave.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from nosa_jax.cache.plan import expected_misses
from nosa_jax.config import ModelConfig

SLOTS = (64, 80, 96, 128)


def make_trace(
    model: ModelConfig, lengths: Int32[np.ndarray, " B"], steps: int, heads: int, num_blocks: int, seed: int = 0
) -> Int32[np.ndarray, "steps B heads J"]:
    """Selections of the queries at positions lengths[b] to lengths[b] + steps - 1, ascending ids.

    heads: how many independent ones per row, layers times KV heads. Needs rows of more blocks than are selected.
    """
    rng, config = np.random.default_rng(seed), model.attention
    selected, sink, local = config.num_selected_blocks, config.num_sink_blocks, config.num_local_blocks
    free = selected - sink - local
    shape = (len(lengths), heads)
    first_own = lengths // config.block_size
    if (first_own < selected).any():
        raise ValueError(f"lengths: every row must have more than {selected} blocks, got {lengths.tolist()}")
    # Blocks by last use, the selected ones first; what is forced is not in it.
    stack = np.full((*shape, num_blocks), num_blocks, np.int64)
    count = first_own - local + 1 - sink  # free blocks of each row
    for b, head in np.ndindex(*shape):
        stack[b, head, : count[b]] = sink + rng.permutation(count[b])
    places = (*SLOTS, None)
    weights = np.array([expected_misses(model, slots) for slots in SLOTS])
    rates = weights - np.append(weights[1:], 0.0)  # returns per step from each stretch of the stack
    stretches = list(zip(places[:-1], places[1:], rates, strict=True))
    offset = selected - free

    trace = np.empty((steps, *shape, selected), np.int32)
    rows, columns = np.indices(shape)
    for step in range(steps):
        own = (lengths + step) // config.block_size
        moved = (own > (lengths + step - 1) // config.block_size) if step else np.zeros(len(lengths), bool)
        for b in np.flatnonzero(moved):  # the block that leaves the window was used a moment ago
            stack[b, :, free + 1 :] = stack[b, :, free:-1].copy()
            stack[b, :, free] = own[b] - local
            count[b] += 1
        # Deepest first; neither what just left comes back nor what just came leaves.
        leave = np.argsort(rng.random((*shape, free)), axis=-1)
        left = np.zeros(shape, np.int64)
        for start, stop, rate in reversed(stretches):
            for _ in range(int(np.ceil(rate))):
                low = np.maximum(start - offset, free + left)
                high = np.minimum(count if stop is None else stop - offset, count)[:, None]
                come = low + (rng.random(shape) * (high - low)).astype(np.int64)
                go = np.take_along_axis(leave, left[..., None], axis=-1)[..., 0]
                doing = (rng.random(shape) < rate / np.ceil(rate)) & (high > low)
                _exchange(stack, rows[doing], columns[doing], come[doing], go[doing], free)
                left += doing
        blocks = np.concatenate(
            [
                np.broadcast_to(np.arange(sink), (*shape, sink)),
                stack[..., :free],
                np.broadcast_to((own[:, None] - np.arange(local))[:, None], (*shape, local)),
            ],
            axis=-1,
        )
        trace[step] = np.sort(blocks, axis=-1)
    return trace


def _exchange(
    stack: np.ndarray, row: np.ndarray, head: np.ndarray, come: np.ndarray, go: np.ndarray, free: int
) -> None:
    """The block at place `come` takes the place `go`, whose block becomes the first that is not selected."""
    comes, goes = stack[row, head, come], stack[row, head, go]
    place = np.arange(stack.shape[-1])
    lines = stack[row, head]
    shifted = np.concatenate([lines[:, :1], lines[:, :-1]], axis=1)
    lines = np.where((place > free) & (place <= come[:, None]), shifted, lines)
    lines[:, free] = goes
    lines[np.arange(len(row)), go] = comes
    stack[row, head] = lines
