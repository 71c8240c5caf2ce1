"""Can XLA fetch blocks while it multiplies matrices? A fetch and a product that do not need each other, in one loop.

    python -m experiments.overlap --output experiments/results/overlap_h200.json

Gives milliseconds per trip of a `fori_loop` (medians) for the fetch alone, the product alone, both, and both with the
fetch annotated for a stream of its own (`jax.experimental.compute_on`, "gpu_stream:1"), under several compiler options.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on
from jaxtyping import Array

from experiments.decode_kernels import KV_HEADS, LAYERS, cache, random_moves
from experiments.environment import gpu_arguments, save
from nosa_jax import COMPILER_OPTIONS
from pallas_kernels import fetch_blocks

TRIPS, HIDDEN, WIDTH = 64, 4096, 32768
CONCURRENT = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "concurrent CUDA graphs": CONCURRENT,
    "no CUDA graphs": {"xla_gpu_enable_command_buffer": ""},
    "no CUDA graphs, latency-hiding scheduler": {
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
}


def time_loop(body: Callable[..., Any], carry: Any, *arguments: Any, options: dict[str, Any]) -> tuple[float, float]:
    """(milliseconds per trip, MiB of temporaries) of a loop whose state is donated."""
    loop = lambda carry, *rest: jax.lax.fori_loop(0, TRIPS, lambda i, carry: body(i, carry, *rest), carry)
    compiled = (
        jax.jit(loop, donate_argnums=0).lower(carry, *arguments).compile(compiler_options=COMPILER_OPTIONS | options)
    )
    samples = []
    carry = jax.tree.map(jnp.copy, carry)
    for _ in range(6):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, *arguments))
        samples.append(1e3 * (time.perf_counter() - start) / TRIPS)
    return statistics.median(samples[1:]), compiled.memory_analysis().temp_size_in_bytes / 2**20


def measure(batch: int, moves: int, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    ids, slots = random_moves((batch, KV_HEADS), moves)
    pool, host = cache(batch)
    x, w = jnp.ones((batch, HIDDEN), jnp.bfloat16), jnp.ones((HIDDEN, WIDTH), jnp.bfloat16)

    def fetch(i: Array, pool: Array, host: Array) -> Array:
        return fetch_blocks(pool, host, ids, slots, jax.lax.rem(i, LAYERS), implementation="triton")

    def product(x: Array, w: Array) -> Array:
        return jnp.tanh((x @ w)[:, :HIDDEN])

    def both(i: Array, carry: tuple[Array, Array], host: Array, w: Array) -> tuple[Array, Array]:
        return fetch(i, carry[0], host), product(carry[1], w)

    def apart(i: Array, carry: tuple[Array, Array], host: Array, w: Array) -> tuple[Array, Array]:
        there = compute_on(fetch, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)
        return there(i, carry[0], host), product(carry[1], w)

    loops: dict[str, tuple[Any, ...]] = {
        "fetch": (fetch, pool, host),
        "product": (lambda i, x, w: product(x, w), x, w),
        "both": (both, (pool, x), host, w),
        "own_stream": (apart, (pool, x), host, w),
    }
    for name, arguments in loops.items():
        try:
            ms, mib = time_loop(*arguments, options=options)
            yield name, {"ms": round(ms, 4), "temporary_mib": round(mib, 1)}
        except Exception as error:  # a failure is an answer, too
            yield name, {"failed": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = gpu_arguments(parser)
    entries = []
    for (label, options), (batch, moves) in itertools.product(OPTIONS.items(), ((16, 1), (64, 1))):
        entry: dict[str, Any] = {"options": label, "batch": batch, "blocks_per_head": moves}
        entries.append(entry | dict(measure(batch, moves, options)))
        print(json.dumps(entries[-1]), flush=True)
        save(args.output, trips=TRIPS, entries=entries)


if __name__ == "__main__":
    main()
