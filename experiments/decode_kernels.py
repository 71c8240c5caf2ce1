"""The kernels of a decode step that move bytes, alone: the fetch against `device_put`, attention against device memory.

    python -m experiments.decode_kernels --output experiments/results/decode_kernels_h200.json

Kernel times are the profiler's, means of the calls of one loop over the layers of an 8B-shaped cache (K = 2, D = 128,
blocks of 64, bfloat16). The rates they are compared with are measured in the same process: `device_put` of 1 GiB from
pinned memory, and a sum over 4 GiB of device memory.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from experiments.environment import gpu_arguments, save
from experiments.profiling import link_rate, memory_rate, profile
from pallas_kernels import Residence, Store, Token, blocks, fetch_blocks, update_and_attend

LAYERS, KV_HEADS, GROUP, SIZE, DIM, SELECTED, SLOTS, BLOCKS = 2, 2, 16, 64, 128, 64, 80, 256
BLOCK_BYTES = blocks.block_bytes(SIZE, DIM, itemsize=2)
CALLS = 32


def choices(rng: np.random.Generator, most: int, shape: tuple[int, ...], count: int) -> Int32[np.ndarray, "..."]:
    """`count` different numbers below `most` in each place."""
    return np.argsort(rng.random((*shape, most)), axis=-1)[..., :count].astype(np.int32)


def random_moves(shape: tuple[int, ...], moves: int) -> tuple[Array, Array]:
    """(block ids, slots) of `moves` blocks among 64 entries, -1 in the others."""
    rng = np.random.default_rng(0)
    listed = [np.full((*shape, SELECTED), -1, np.int32) for _ in range(2)]
    where = choices(rng, SELECTED, shape, moves)
    for entries, most in zip(listed, (BLOCKS, SLOTS), strict=True):
        np.put_along_axis(entries, where, choices(rng, most, shape, moves), axis=-1)
    ids, slots = map(jnp.asarray, listed)
    return ids, slots


def cache(batch: int) -> tuple[Array, Array]:
    """(pool, host store) of a batch."""
    block = (2, SIZE, DIM)
    store = (LAYERS, batch * BLOCKS, KV_HEADS, *block)
    host = jax.jit(lambda: jax.device_put(jnp.ones(store, jnp.bfloat16), jax.memory.Space.Host))
    return jnp.ones((LAYERS, batch, KV_HEADS, SLOTS, *block), jnp.bfloat16), host()


def pages(batch: int) -> Array:
    """The page table of a batch."""
    return jnp.arange(batch * BLOCKS, dtype=jnp.int32).reshape(batch, BLOCKS)


def kernel_us(loop: Callable[..., Array], pool: Array, *arguments: Any) -> dict[str, float]:
    """Microseconds per call of each kernel of a loop that gives back the pool it was given."""
    run = jax.jit(loop, donate_argnums=0)
    pool = jax.block_until_ready(run(pool, *arguments))
    times = profile(lambda: run(pool, *arguments))
    return {name: 1e3 * ms / CALLS for name, ms in times.items()}


def fetch(batch: int, moves: int, link: float) -> dict[str, Any]:
    """`moves` blocks per row and KV head, of 64 entries each, one launch."""

    def loop(pool: Array, host: Array, ids: Array, slots: Array) -> Array:
        body = lambda i, pool: fetch_blocks(
            pool, host, pages(batch), ids[i], slots[i], i % LAYERS, implementation="triton"
        )
        return jax.lax.fori_loop(0, CALLS, body, pool)

    us = kernel_us(loop, *cache(batch), *random_moves((CALLS, batch, KV_HEADS), moves))["fetch_blocks"]
    size = batch * KV_HEADS * moves * BLOCK_BYTES
    return {
        "kernel": "fetch_blocks", "batch": batch, "blocks_per_head": moves, "mib": size / 2**20, "us": round(us, 2),
        "gb_per_s": round(size / us / 1e3, 2), "share_of_device_put": round(size / us * 1e6 / link, 3),
    }  # fmt: skip


def attend(batch: int, misses: float, link: float, memory: float) -> dict[str, Any]:
    """Token write, fetch of `misses` blocks per row and KV head on average, attention; 0: a cache on the device."""
    rng, shape = np.random.default_rng(0), (batch, KV_HEADS)
    slots = choices(rng, SLOTS, shape, SELECTED)
    ids = np.sort(choices(rng, BLOCKS - 1, shape, SELECTED), axis=-1)
    ids[..., -1] = BLOCKS - 1
    missing = rng.random((CALLS, *shape, SELECTED)) < misses / SELECTED
    loads = np.where(missing, ids, -1)
    q, kv = jnp.ones((batch, KV_HEADS * GROUP, DIM), jnp.bfloat16), jnp.ones((batch, KV_HEADS, DIM), jnp.bfloat16)
    bias = jnp.ones((LAYERS, batch, KV_HEADS, BLOCKS, SIZE))
    positions = jnp.full((batch,), BLOCKS * SIZE - 5, jnp.int32)

    def loop(pool: Array, host: Array, loads: Array, slots: Array, ids: Array) -> Array:
        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, pool = carry
            store = Store(pool, host if misses else None, pages(batch) if misses else None, bias)
            residence = Residence(ids, slots, loads[i] if misses else None)
            token = Token(out, kv, kv)
            return update_and_attend(token, store, residence, positions, i % LAYERS, implementation="triton")

        return jax.lax.fori_loop(0, CALLS, body, (q, pool))[1]

    times = kernel_us(loop, *cache(batch), jnp.asarray(loads), jnp.asarray(slots), jnp.asarray(ids))
    us, sum_us = times["update_and_attend"], times["decode_attention_sum"]
    size = batch * KV_HEADS * SELECTED * (BLOCK_BYTES + 4 * SIZE)
    moved = missing.sum() / CALLS * BLOCK_BYTES if misses else 0
    return {
        "kernel": "update_and_attend", "batch": batch, "misses": misses, "us": round(us, 2), "sum_us": round(sum_us, 2),
        "memory_us": round(1e6 * size / memory, 2), "link_us": round(1e6 * moved / link, 2),
        "tb_per_s": round(size / us / 1e6, 3), "share_of_memory": round(size / us * 1e6 / memory, 3),
        "share_of_memory_with_sum": round(size / (us + sum_us) * 1e6 / memory, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = gpu_arguments(parser)
    link, memory = link_rate(), memory_rate()
    print(f"device_put {link / 1e9:.1f} GB/s, device memory {memory / 1e12:.2f} TB/s", flush=True)
    entries = []
    plans = [functools.partial(fetch, *size, link) for size in ((16, 1), (16, 2), (16, 4), (64, 1), (64, 4), (128, 8))]
    plans += [functools.partial(attend, batch, misses, link, memory) for batch in (16, 64, 128) for misses in (0, 1.19)]
    for measure in plans:
        entries.append(measure())
        print(json.dumps(entries[-1]), flush=True)
        save(args.output, device_put_bytes_per_second=link, memory_bytes_per_second=memory, entries=entries)


if __name__ == "__main__":
    main()
