"""Where the device's time goes, read from a profile of JAX, and how fast it moves bytes."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def kernel_times(directory: str) -> dict[str, float]:
    """Device time in milliseconds by kernel name."""
    times: dict[str, float] = defaultdict(float)
    for file in Path(directory).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        times[event.name] += event.duration_ns / 1e6
    return dict(times)


def profile(call: Callable[[], Any]) -> dict[str, float]:
    """`kernel_times` of one call, which must be compiled and warm."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        return kernel_times(folder)


def rate(size: int, call: Callable[[], Any], calls: int = 5) -> float:
    """Bytes per second of a call that moves `size` bytes; median of six samples."""
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        samples.append((time.perf_counter() - start) / calls)
    return size / statistics.median(samples[1:])


def link_rate() -> float:
    """Bytes per second of `device_put` of 1 GiB from pinned memory."""
    host = jax.device_put(jnp.ones((2**29,), jnp.bfloat16), jax.memory.Space.Host)
    return rate(2**30, functools.partial(jax.device_put, host, jax.memory.Space.Device))


def memory_rate() -> float:
    """Bytes per second of device memory, as a sum over 4 GiB reads it."""
    array = jnp.ones((2**31,), jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return rate(2**32, lambda: total(array))
