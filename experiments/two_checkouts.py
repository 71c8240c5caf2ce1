"""Times decoding and reading of two checkouts of this project in turn, in one process on one GPU.

    python -m experiments.two_checkouts /tmp/before . --output experiments/results/two_checkouts_h100.json

The other checkout is a folder that `git worktree add` makes. The 8B shape, random weights, bfloat16: decode steps of 16
rows of 16K tokens with 80 slots and selections of published locality (`experiments.traces`), `prefill` and `forward`
of one row of 32K tokens, and `forward` of `full`. Both run the same inputs, one call after the other, the order
changing from repeat to repeat; the first repeat is not counted. Says also whether both gave the same bits.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.environment import gpu_arguments, save

TOPS = ("nosa_jax", "pallas_kernels", "experiments")
RUN, STEPS, TOKENS, SLOTS = "nosa:16384:16:80:trace", 24, 32768, 80

Call = Callable[[int], tuple[float, Any]]  # from the number of the repeat to milliseconds and what came out


def import_from(root: Path, *names: str) -> list[ModuleType]:
    """Modules of the checkout at `root`, whatever was imported of another one before."""
    for name in [name for name in sys.modules if name.split(".")[0] in TOPS]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        importlib.invalidate_caches()
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(root))
    assert Path(str(modules[0].__file__)).is_relative_to(root), modules[0].__file__
    return modules


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds until the result is there, and the result."""
    start = time.perf_counter()
    out = jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start), out


def calls_of(root: Path, repeats: int) -> dict[str, Call]:
    """What is timed of one checkout, compiled when first called."""
    names = ("nosa_jax", "nosa_jax.presets", "experiments.decode_throughput", "experiments.traces")
    nosa_jax, presets, throughput, traces = import_from(root, *names)
    config = presets.nosa_8b()
    model = jax.block_until_ready(jax.jit(lambda: nosa_jax.NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))())
    run = throughput.Run.parse(RUN)
    total = 1 + STEPS * (repeats + 1)
    max_length = run.context[1] + total
    heads = min(throughput.TRACED_HEADS, config.num_layers) * config.num_kv_heads
    num_blocks = -(-max_length // config.attention.block_size)
    ids = throughput.by_layer(traces.make_trace(config, run.lengths - 1, total, heads, num_blocks), config.num_kv_heads)
    first = throughput.of_all_layers(jnp.asarray(ids[0]), config.num_layers)
    carry = [throughput.make_state(config, run, max_length, first, jax.random.key(0)), jnp.zeros(run.batch, jnp.int32)]
    loop = jax.jit(
        functools.partial(throughput.loop, steps=STEPS),
        donate_argnums=1,
        compiler_options=nosa_jax.COMPILER_OPTIONS,
    )

    def decode(repeat: int) -> tuple[float, Any]:
        given = jnp.asarray(ids[1 + repeat * STEPS : 1 + (repeat + 1) * STEPS])
        arguments = jax.block_until_ready((model, *carry, given))
        milliseconds, (state, token, fetched) = timed(lambda: loop(*arguments))
        carry[:] = state, token
        return milliseconds / STEPS, (token, fetched)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, TOKENS)).astype(np.int32)
    cache = nosa_jax.CacheConfig(slots=SLOTS)
    forward = jax.jit(functools.partial(nosa_jax.forward, logits="last"))
    full = nosa_jax.with_attention(model, variant="full")
    return {
        "decode": decode,
        "prefill": lambda _: timed(lambda: nosa_jax.prefill(model, tokens, max_length=TOKENS + 64, cache=cache)[1]),
        "forward": lambda _: timed(lambda: forward(model, tokens).logits),
        "forward_full": lambda _: timed(lambda: forward(full, tokens).logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the one checkout")
    parser.add_argument("after", type=Path, help="folder of the other")
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats (default: %(default)s)")
    args = gpu_arguments(parser)
    calls = {name: calls_of(getattr(args, name).resolve(), args.repeats) for name in ("before", "after")}
    results = {}
    for what in calls["before"]:
        samples: dict[str, list[float]] = {"before": [], "after": []}
        same = True
        for repeat in range(args.repeats + 1):
            outs = {}
            for name in sorted(calls, reverse=bool(repeat % 2)):
                milliseconds, outs[name] = calls[name][what](repeat)
                if repeat:
                    samples[name].append(round(milliseconds, 3))
            equal = jax.tree.map(lambda a, b: bool((a == b).all()), outs["before"], outs["after"])
            same &= all(jax.tree.leaves(equal))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        results[what] = {"median_ms": medians, "samples_ms": samples, "same_bits": same}
        print(what, json.dumps(results[what]), flush=True)
    save(args.output, run=RUN, steps=STEPS, tokens=TOKENS, slots=SLOTS, results=results)


if __name__ == "__main__":
    main()
