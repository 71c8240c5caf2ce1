"""Training on one and two GPUs: tokens per second by variant, scaling, a row over two GPUs, and an 8B model on two.

    python -m experiments.train_scaling variants --output experiments/results/train_variants_h100.json
    python -m experiments.train_scaling scaling --output experiments/results/train_scaling_h100.json
    python -m experiments.train_scaling context --output experiments/results/train_context_h100.json
    python -m experiments.train_scaling 8b --output experiments/results/train_8b_h100.json

Weights and tokens are random, compute is bfloat16 on float32 masters with AdamW. Times are of whole steps (median,
synchronised), after two for warming up. Memory is stated as XLA computes it for the program, and as the device's
allocator saw it: its peak since the program began, the making of the weights included.

- `variants`: 1B, one row of 16384 tokens, remat, one GPU.
- `scaling`: `nosa` as above; two GPUs along `data` and along `fsdp`, one row each, against one: 1.0 is twice as fast.
- `context`: 4 layers of the 1B shape, one row of 131072 tokens, on two GPUs along `context` and on one. Activations are
  the temporaries beyond those of the same program for a row of 2048 tokens, which are copies of weights and gradients.
- `8b`: two GPUs along `fsdp`, one row of 16384 tokens each, remat that keeps what enters the layers in host memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.environment import gpu_arguments, save
from nosa_jax import ModelConfig, NosaLM, parallel, presets
from nosa_jax.config import Variant
from nosa_jax.model import Remat
from nosa_jax.train import Batch, OptimizerConfig, init_state, jit_train_step
from nosa_jax.train.flops import mfu, peak_flops

WARM_UP = 2
_SHORT = 2048  # tokens of a row whose activations are next to nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. axes: sizes of the mesh, {} for one device. length: tokens per row."""

    name: str
    config: ModelConfig
    axes: dict[str, int]
    length: int
    remat: Remat = True

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def rows(self) -> int:
        return self.axes.get("data", 1) * self.axes.get("fsdp", 1)


def variants(tiny: bool) -> Iterator[Case]:
    for variant in get_args(Variant):
        yield Case(variant, _model("nosa_1b", tiny, variant), {}, 512 if tiny else 16384)


def scaling(tiny: bool) -> Iterator[Case]:
    for axes in ({}, {"data": 2}, {"fsdp": 2}):
        name = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        yield Case(name or "one device", _model("nosa_1b", tiny), axes, 512 if tiny else 16384)


def context(tiny: bool) -> Iterator[Case]:
    """The smaller one first, as a device's peak never falls."""
    length = 1024 if tiny else 131072
    config = dataclasses.replace(_model("nosa_1b", tiny), num_layers=2 if tiny else 4, max_context=length)
    yield Case("context=2", config, {"context": 2}, length)
    yield Case("one device", config, {}, length)


def large(tiny: bool) -> Iterator[Case]:
    yield Case("fsdp=2", _model("nosa_8b", tiny), {"fsdp": 2}, 512 if tiny else 16384, "offload")


PARTS = {"variants": variants, "scaling": scaling, "context": context, "8b": large}


def _model(preset: str, tiny: bool, variant: Any = "nosa") -> ModelConfig:
    return presets.tiny(variant) if tiny else getattr(presets, preset)(variant)


class Program:
    """A compiled step of a case."""

    def __init__(self, case: Case, length: int | None = None) -> None:
        self.case, self.length, self.optimizer = case, length or case.length, OptimizerConfig(learning_rate=1e-4)
        self.mesh = parallel.make_mesh(**case.axes, devices=jax.devices()[: case.devices]) if case.axes else None
        shapes = jax.eval_shape(self._make)
        self.placed = None if self.mesh is None else parallel.shardings(shapes, self.mesh)
        state = shapes if self.mesh is None else parallel.shard(shapes, self.mesh)
        start = time.perf_counter()
        self.step = jit_train_step.lower(
            state, self.batch(), optimizer=self.optimizer, steps=1000, compute_dtype="bfloat16", remat=case.remat
        ).compile()
        self.seconds = time.perf_counter() - start

    def _make(self) -> Any:
        return init_state(NosaLM(self.case.config, rngs=nnx.Rngs(0)), self.optimizer)

    def begin(self) -> Any:
        """The first state, every device making its own part."""
        return jax.jit(self._make, out_shardings=self.placed)()

    def batch(self) -> Batch:
        """Random tokens; the same ones whatever the mesh, as long as there are as many rows."""
        shape = (self.case.rows, self.length + 1)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, self.case.config.vocab_size, jnp.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        if self.mesh is None:
            return batch
        lying = parallel.fitting(self.mesh, (self.case.rows, self.length), P(parallel.ROWS, "context"))
        return jax.device_put(batch, NamedSharding(self.mesh, lying))

    def memory(self) -> dict[str, int]:
        """Bytes per device as XLA computes them."""
        found = self.step.memory_analysis()
        return {
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
            "host": found.host_temp_size_in_bytes,
        }


def measure(case: Case, steps: int) -> dict[str, Any]:
    program = Program(case)
    state, batch = program.begin(), program.batch()
    times, losses = [], []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(program.step(state, batch))
        times.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    seconds = statistics.median(times[WARM_UP:])
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    tokens_per_second = case.rows * case.length / seconds
    share = mfu(tokens_per_second, case.config, case.length, peak=peak_flops(device.device_kind), devices=case.devices)
    return {
        "case": case.name,
        "devices": case.devices,
        "tokens_per_step": case.rows * case.length,
        "compile_seconds": round(program.seconds, 1),
        "step_ms": round(1e3 * seconds, 1),
        "slowest_step_ms": round(1e3 * max(times[WARM_UP:]), 1),
        "tokens_per_second": round(tokens_per_second),
        "mfu": None if share is None else round(share, 4),
        "losses": losses,
        "computed_bytes": program.memory(),
        "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
        "bytes_limit": stats.get("bytes_limit"),
    }


def compare(part: str, cases: dict[str, Case], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the part is for, from the results by name of case; empty where one is missing."""
    if part == "scaling" and "one device" in results:
        alone = results["one device"]["tokens_per_second"]
        several = {name: result for name, result in results.items() if result["devices"] > 1}
        return {
            f"scaling, {name}": round(result["tokens_per_second"] / (result["devices"] * alone), 4)
            for name, result in several.items()
        }
    if part == "context" and len(results) == 2:
        both, alone = (results[name] for name in ("context=2", "one device"))
        activations = {}
        for name, result in results.items():
            short = Program(cases[name], min(_SHORT, cases[name].length // 4)).memory()["temporaries"]
            activations[name] = result["computed_bytes"]["temporaries"] - short
        pairs = zip(both["losses"], alone["losses"], strict=True)  # both train on the one batch that they began with
        return {
            "activations_bytes": activations,
            "activations_ratio": round(activations["context=2"] / activations["one device"], 4),
            "relative_differences_of_losses": [abs(a - b) / b for a, b in pairs],
        }
    if part == "8b" and results["fsdp=2"]["peak_bytes_in_use"]:
        found = results["fsdp=2"]
        return {"peak_over_computed": round(found["peak_bytes_in_use"] / found["computed_bytes"]["peak"], 4)}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, help="what to measure")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed (default: 8)")
    # The allocator's own limit is three quarters of a card, which 8B does not fit.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    args = gpu_arguments(parser, tiny=True)
    cases = {case.name: case for case in PARTS[args.part](args.tiny) if args.only in case.name}
    missing = max((case.devices for case in cases.values()), default=1) - len(jax.devices())
    if missing > 0:
        parser.error(f"it needs {missing} more devices than there are")
    results: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        results[name] = measure(case, args.steps)
        print(json.dumps(results[name]), flush=True)
        save(args.output, part=args.part, cases=list(results.values()))
    found = compare(args.part, cases, results)
    print(json.dumps(found))
    save(args.output, part=args.part, cases=list(results.values()), **found)


if __name__ == "__main__":
    main()
