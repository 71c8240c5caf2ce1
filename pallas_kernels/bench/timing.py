"""Seconds per call.

A call that is waited for carries 50 to 100 us of dispatch. So a sample enqueues as many calls as take 5 ms, waits once
and divides: dispatch runs ahead of the device. What is left: an op faster than its own dispatch, some 20 to 50 us of
Python and XLA, is timed at the pace of dispatch. Inputs take turns among copies that do not fit in the L2 cache
together, so that no call finds its own in there.
"""

from __future__ import annotations

import collections
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_SECONDS = 5e-3
L2_BYTES = 60 * 2**20  # of an H200, the largest there is
_COPIES_BYTES = 4 * 2**30  # of device memory and of pinned host memory, at most
_MOST_COPIES = 16
_MOST_CALLS = 1000
_PENDING = 64  # outputs kept while a sample runs


class Timing(NamedTuple):
    """Milliseconds per call over the samples; calls: enqueued per sample."""

    median: float
    least: float
    most: float
    calls: int


def measure(sample: Callable[[int], float], repeats: int) -> Timing:
    """sample(calls): the seconds that so many calls take together; compiled and warm."""
    calls = 1
    while calls < _MOST_CALLS and (seconds := min(sample(calls) for _ in range(2))) < SAMPLE_SECONDS:
        wanted = math.ceil(1.2 * calls * SAMPLE_SECONDS / max(seconds, 1e-9))
        calls = min(_MOST_CALLS, max(2 * calls, wanted))
    times = [1e3 * sample(calls) / calls for _ in range(repeats)]
    return Timing(statistics.median(times), min(times), max(times), calls)


def num_copies(inputs: Any, touched: int) -> int:
    """Copies whose touched bytes together are twice the L2 cache, within the memory that copies may take."""
    size = sum(x.nbytes for x in jax.tree.leaves(inputs))
    wanted = math.ceil(2 * L2_BYTES / max(touched, 1))
    return max(1, min(wanted, _COPIES_BYTES // max(size, 1), _MOST_COPIES))


def copies(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Fresh arrays in the same memories: nothing that is done to them touches `inputs`."""
    return [jax.tree.map(_copy, inputs) for _ in range(count)]


def _copy(x: jax.Array) -> jax.Array:
    if x.sharding.memory_kind == "pinned_host":
        return jax.device_put(np.array(x), jax.memory.Space.Host)
    return jnp.array(x, copy=True)


def sampler(
    run: Callable[..., Any],
    sets: list[dict[str, Any]],
    updates: tuple[str, ...] = (),
    updated: Callable[[Any], tuple[Any, ...]] = lambda output: (output,),
) -> Callable[[int], float]:
    """For `measure`, warmed up. updates: inputs that `run` takes over; updated(output): the same for its next call."""
    turn = itertools.count()

    def call() -> Any:
        inputs = sets[next(turn) % len(sets)]
        output = run(**inputs)
        if updates:
            inputs.update(zip(updates, updated(output), strict=True))
        return output

    def sample(calls: int) -> float:
        jax.block_until_ready(sets)
        outputs: collections.deque[Any] = collections.deque(maxlen=_PENDING)
        start = time.perf_counter()
        for _ in range(calls):
            outputs.append(call())
        jax.block_until_ready([x for x in jax.tree.leaves(list(outputs)) if not x.is_deleted()])
        return time.perf_counter() - start

    sample(len(sets) + 1 if updates else 1)  # compiled, also for what it returned
    return sample
