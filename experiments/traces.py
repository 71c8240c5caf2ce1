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
    selected = model.attention.num_selected_blocks
    if (lengths // model.attention.block_size < selected).any():
        raise ValueError(f"lengths: every row must have more than {selected} blocks, got {lengths.tolist()}")
    rows = [
        _row_trace(model, int(length), steps, heads, num_blocks, np.random.default_rng([seed, row]))
        for row, length in enumerate(lengths)
    ]
    return np.stack(rows, axis=1)


def _row_trace(
    model: ModelConfig, length: int, steps: int, heads: int, num_blocks: int, rng: np.random.Generator
) -> Int32[np.ndarray, "steps heads J"]:
    config = model.attention
    selected, sink, local = config.num_selected_blocks, config.num_sink_blocks, config.num_local_blocks
    free = selected - sink - local
    count = length // config.block_size - local + 1 - sink  # free blocks
    # Blocks by last use, the selected ones first; what is forced is not in it.
    stack = np.full((heads, num_blocks), num_blocks, np.int32)
    stack[:, :count] = sink + rng.permuted(np.tile(np.arange(count), (heads, 1)), axis=1)
    stops = (*SLOTS[1:], None)
    misses = np.array([expected_misses(model, slots) for slots in SLOTS])
    rates = misses - np.append(misses[1:], 0.0)  # returns per step from each stretch of the stack
    stretches = list(zip(SLOTS, stops, rates, strict=True))
    offset = selected - free

    trace = np.empty((steps, heads, selected), np.int32)
    for step in range(steps):
        own = (length + step) // config.block_size
        if step and own > (length + step - 1) // config.block_size:  # the block that leaves the window was just used
            stack[:, free + 1 :] = stack[:, free:-1].copy()
            stack[:, free] = own - local
            count += 1
        # Deepest first; neither what just left comes back nor what just came leaves.
        leave = np.argsort(rng.random((heads, free)), axis=-1)
        left = np.zeros(heads, np.int64)
        for start, stop, rate in reversed(stretches):
            for _ in range(int(np.ceil(rate))):
                low = np.maximum(start - offset, free + left)
                high = count if stop is None else min(stop - offset, count)
                come = low + (rng.random(heads) * (high - low)).astype(np.int64)
                doing = np.flatnonzero((rng.random(heads) < rate / np.ceil(rate)) & (high > low))
                for head in doing:
                    _exchange(stack[head], come[head], leave[head, left[head]], free)
                left[doing] += 1
        window = np.arange(own - local + 1, own + 1)
        forced = np.tile(np.concatenate([np.arange(sink), window]), (heads, 1))
        trace[step] = np.sort(np.concatenate([forced, stack[:, :free]], axis=-1), axis=-1)
    return trace


def _exchange(stack: Int32[np.ndarray, " M"], come: int, go: int, free: int) -> None:
    """The block at place `come` takes the place `go`, whose block becomes the first that is not selected."""
    comes, goes = stack[come], stack[go]
    stack[free + 1 : come + 1] = stack[free:come].copy()
    stack[free], stack[go] = goes, comes
