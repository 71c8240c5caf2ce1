"""Can XLA fetch blocks while it multiplies matrices? A fetch and a product that do not need each other, in one loop.

python -m experiments.overlap --output experiments/results/overlap_h200.json

Milliseconds per trip of a `fori_loop`, medians: the fetch alone, the product alone, both, and both with the fetch
annotated for a stream of its own (`jax.experimental.compute_on`, "gpu_stream:1"); with and without CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on
from jaxtyping import Array

from experiments.decode_kernels import BLOCKS, KV_HEADS, LAYERS, SELECTED, SLOTS, cache, choices
from experiments.environment import gpu_arguments, save
from pallas_kernels import fetch_blocks

TRIPS, HIDDEN, WIDTH = 64, 4096, 32768


def time_loop(body: Callable[..., Any], carry: Any, *arguments: Any, graphs: bool) -> tuple[float, float]:
    """(milliseconds per trip, MiB of temporaries) of a loop whose state is donated."""
    loop = lambda carry, *rest: jax.lax.fori_loop(0, TRIPS, lambda i, carry: body(i, carry, *rest), carry)
    options = {} if graphs else {"xla_gpu_enable_command_buffer": ""}
    compiled = jax.jit(loop, donate_argnums=0).lower(carry, *arguments).compile(compiler_options=options)
    samples = []
    carry = jax.tree.map(jnp.copy, carry)
    for _ in range(6):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, *arguments))
        samples.append(1e3 * (time.perf_counter() - start) / TRIPS)
    return statistics.median(samples[1:]), compiled.memory_analysis().temp_size_in_bytes / 2**20


def measure(batch: int, moves: int, graphs: bool) -> dict[str, Any]:
    rng, shape = np.random.default_rng(0), (batch, KV_HEADS)
    listed = [np.full((*shape, SELECTED), -1, np.int32) for _ in range(2)]
    where = choices(rng, SELECTED, shape, moves)
    for entries, most in zip(listed, (BLOCKS, SLOTS), strict=True):
        np.put_along_axis(entries, where, choices(rng, most, shape, moves), axis=-1)
    ids, slots = map(jnp.asarray, listed)
    pool, host = cache(batch)
    x, w = jnp.ones((batch, HIDDEN), jnp.bfloat16), jnp.ones((HIDDEN, WIDTH), jnp.bfloat16)

    def fetch(i: Array, pool: Array, host: Array) -> Array:
        return fetch_blocks(pool, host, ids, slots, i % LAYERS, implementation="triton")

    def product(x: Array, w: Array) -> Array:
        return jnp.tanh((x @ w)[:, :HIDDEN])

    def both(i: Array, carry: tuple[Array, Array], host: Array, w: Array) -> tuple[Array, Array]:
        return fetch(i, carry[0], host), product(carry[1], w)

    def apart(i: Array, carry: tuple[Array, Array], host: Array, w: Array) -> tuple[Array, Array]:
        with compute_on("gpu_stream:1"):
            pool = jax.jit(fetch)(i, carry[0], host)
        return pool, product(carry[1], w)

    ms = {
        "fetch": time_loop(fetch, pool, host, graphs=graphs),
        "product": time_loop(lambda i, x, w: product(x, w), x, w, graphs=graphs),
        "both": time_loop(both, (pool, x), host, w, graphs=graphs),
        "own_stream": time_loop(apart, (pool, x), host, w, graphs=graphs),
    }
    return {"batch": batch, "moves": moves, "cuda_graphs": graphs} | {
        name: {"ms": round(time, 4), "temporary_mib": round(mib, 1)} for name, (time, mib) in ms.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = gpu_arguments(parser)
    entries = []
    for graphs in (True, False):
        for batch, moves in ((16, 1), (64, 1)):
            try:
                entries.append(measure(batch, moves, graphs))
            except Exception as error:  # a failure is an answer, too
                failed = f"{type(error).__name__}: {error}"[:500]
                entries.append({"batch": batch, "moves": moves, "cuda_graphs": graphs, "failed": failed})
            print(json.dumps(entries[-1]), flush=True)
            save(args.output, trips=TRIPS, entries=entries)


if __name__ == "__main__":
    main()
