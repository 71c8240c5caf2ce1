"""Decoding with rows over two GPUs against half of the rows on one of them, by `generate` alone.

    python -m experiments.rows_on_two_gpus --output experiments/results/rows_on_two_gpus_h100.json

The 8B shape, random weights and tokens (so selections are made up by them), the cache in host memory. A step is the
difference of two generations of different lengths, so that both read the same prompts; medians of warm calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nosa_jax
from experiments.environment import gpu_arguments, save
from nosa_jax import CacheConfig, NosaLM, presets


def step_ms(model: NosaLM, rows: int, args: argparse.Namespace, mesh: Mesh | None) -> float:
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (rows, args.context), 0, model.config.vocab_size))

    def seconds(new: int) -> float:
        samples = []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            out = nosa_jax.generate(model, tokens, max_new_tokens=new, cache=CacheConfig(slots=args.slots), mesh=mesh)
            jax.block_until_ready(out.tokens)
            samples.append(time.perf_counter() - start)
        return statistics.median(samples[1:])

    few, many = 8, 8 + args.steps
    return 1e3 * (seconds(many) - seconds(few)) / args.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=16, help="on each GPU")
    parser.add_argument("--slots", type=int, default=80)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    args = gpu_arguments(parser)
    config = presets.nosa_8b()
    model = jax.jit(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    found: dict[str, Any] = {"one_ms": step_ms(model, args.rows, args, None)}
    model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    found["two_ms"] = step_ms(model, 2 * args.rows, args, mesh)
    found["times_as_fast"] = 2 * found["one_ms"] / found["two_ms"]
    print(json.dumps(found), flush=True)
    given = {name: value for name, value in vars(args).items() if name != "output"}
    save(args.output, **given, **found)


if __name__ == "__main__":
    main()
