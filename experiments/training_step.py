"""A training step of a 1B model on a GPU: `nosa` against `full` with cuDNN, and where the time goes.

    python -m experiments.training_step --output experiments/results/training_step_1b_h200.json

Weights and tokens are random; compute is bfloat16 on float32 masters, with AdamW and remat. Tokens per second are of
whole steps (median, synchronised). Shares come from a profile of further steps: device time by kernel name.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from typing import Any

import jax
from flax import nnx

from experiments.environment import gpu_arguments, save
from experiments.profiling import profile
from nosa_jax import NosaLM, presets
from nosa_jax.train.optim import OptimizerConfig
from nosa_jax.train.step import init_state, train_step

# The first part of which some word occurs in a kernel's name takes its time.
PARTS = {
    "attention backward": ("block_attention_d", "block_attention_sum", "flash_bprop", "bprop"),
    "attention forward": ("block_attention_forward", "mosaic", "flash_fprop", "fprop"),
    "attention lists": ("block_unions", "block_inversion"),
    "scores and selection": ("block_scores", "select_blocks"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
}


def part_of(kernel: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in kernel.lower() for word in words)), "the rest")


def measure(variant: Any, tokens: int, steps: int) -> dict[str, Any]:
    config = presets.nosa_1b(variant)
    optimizer = OptimizerConfig()
    state = jax.jit(lambda: init_state(NosaLM(config, rngs=nnx.Rngs(0)), optimizer))()
    batch = jax.random.randint(jax.random.key(1), (1, tokens + 1), 0, config.vocab_size)
    step = jax.jit(
        functools.partial(train_step, optimizer=optimizer, steps=1000, compute_dtype="bfloat16", remat=True),
        donate_argnums=0,
    )
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])

    def two_steps() -> Any:
        nonlocal state, metrics
        for _ in range(2):
            state, metrics = jax.block_until_ready(step(state, batch))
        return metrics

    kernels = profile(two_steps)
    total = sum(kernels.values()) or float("nan")
    shares: dict[str, float] = defaultdict(float)
    for name, milliseconds in kernels.items():
        shares[part_of(name)] += milliseconds / total
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:15]
    return {
        "variant": variant,
        "tokens": tokens,
        "step_ms": round(1e3 * seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "loss": round(float(metrics["loss"]), 3),
        "profiled_ms_per_step": round(total / 2, 1),
        "shares": {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda item: -item[1])},
        "longest_kernels_ms_per_step": {name[:80]: round(ms / 2, 2) for name, ms in longest},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the batch, one row (default: 16384)")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps that are timed, after two for warming up (default: 5)"
    )
    args = gpu_arguments(parser)
    steps = []
    for variant in ("nosa", "full"):
        steps.append(measure(variant, args.tokens, args.steps))
        print(json.dumps(steps[-1]), flush=True)
        jax.clear_caches()
    save(args.output, shape="1B, batch 1, remat", steps=steps)


if __name__ == "__main__":
    main()
