"""Selections for a timed model that are not its own: made up to have the published locality, or recorded elsewhere.

Made up, they are block ids per step whose misses, by slots, are the published ones (`make_trace`).
Least-recently-used misses come from `nosa_jax.cache.plan`: 3.58, 1.20, 0.86 and 0.71 blocks per layer, KV head, row and
step at 64, 80, 96 and 128 slots for NOSA. So at each step some blocks return from where they lie in the stack of recent
use, one of 65th to 80th place with weight 3.58 - 1.20 and so on, and as many others leave.

Recorded, they are those of a file that `Selections.save` wrote, of a real model and text, often of a smaller model than
the timed one and of fewer rows (`replayed`):

- The timed model takes the file's AttentionConfig, and so its J, sink and local blocks and block size.
- Layer l of the timed model replays layer l mod L of the recorded ones, KV head k replays k mod K and row b replays
  b mod B. Rows that replay the same one fetch alike, each into its own pool.
- A row begins at the first recorded step that stands in its block where the timed row stands: at most block_size - 1
  steps are passed over, so that blocks begin at the same steps.
- Where the timed row is longer than the recorded one by n blocks, all but the sink blocks are called by ids n higher,
  at all steps alike. So the local window is where the query is, and what is kept, returns and leaves, and with it what
  any pool must fetch, stays as it was recorded. A timed row that is shorter is refused, and so are too few steps.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from nosa_jax import Selections
from nosa_jax.cache.step_costs import expected_misses
from nosa_jax.config import ModelConfig
from pallas_kernels.checks import bad_value

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


def replayed(
    recorded: Selections, model: ModelConfig, lengths: Int32[np.ndarray, " B"], steps: int
) -> Int32[np.ndarray, "steps B heads J"]:
    """Recorded selections for rows of another model, from positions lengths[b] on; the module says how they are mapped.

    model: the timed one, with the attention of the recording.
    heads: KV heads of the first layers, min(L, L of the recording) * K; layers beyond repeat them.
    Raises ValueError for another attention, a row that is shorter than the recorded one, and too few recorded steps.
    """
    if model.attention != recorded.attention:
        remedy = "Give the timed model the attention of the file."
        raise bad_value("model.attention", f"must be {recorded.attention}", model.attention, remedy)
    ids = recorded.block_ids
    layers, batch, heads = ids.shape[:3]
    traced_layers = np.arange(min(model.num_layers, layers))
    traced_heads = np.arange(model.num_kv_heads) % heads
    rows = []
    for row, length in enumerate(lengths.tolist()):
        source = row % batch
        start, shift = _place(recorded, source, length, steps)
        one = ids[np.ix_(traced_layers, [source], traced_heads)][:, 0, :, start : start + steps]  # [Z, K, steps, J]
        moved = np.where(one >= model.attention.num_sink_blocks, one + shift, one)  # padding, -1, stays
        rows.append(moved.reshape(-1, steps, moved.shape[-1]).swapaxes(0, 1))
    return np.stack(rows, axis=1)


def _place(recorded: Selections, row: int, position: int, steps: int) -> tuple[int, int]:
    """The recorded step that stands for `position`, and how many blocks the timed row is longer."""
    size = recorded.attention.block_size
    positions = recorded.positions[row]
    positions = positions[positions >= 0]
    if not positions.size:
        raise bad_value("trace", "must hold steps of every row", f"none of row {row}", "Record it again.")
    start = int((position - positions[0]) % size)
    if len(positions) < start + steps:
        rule = f"must hold {start + steps} steps of row {row}, {start} of them to stand at the same place in a block"
        raise bad_value("trace", rule, len(positions), "Record more, or lower --steps or --repeats.")
    shift = (position - int(positions[start])) // size
    if shift < 0:
        rule = f"must not be shorter than the recorded row {row}, which begins at token {positions[0]}"
        raise bad_value("context", rule, position, "Time a longer context.")
    return start, shift
