"""Compiles training steps for 2, 8 and 64 GPUs on a machine without any, and lists memory and collectives of each.

    pip install ".[cuda13]"; python -m experiments.compile_many --output experiments/results/compile_many.json

Every program is `train_step` of whole depth, `nosa`, bfloat16 on float32 masters, rows of 16384 tokens, one per device
of `data` and `fsdp`. What is listed is what XLA's compiler made of it: bytes that a device needs by its own analysis,
and its collectives with how often a step does them (trips of loops counted). Nothing runs. Slow: a minute or two each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.collectives import Collective, collectives
from experiments.compile_for_h200 import TARGET
from experiments.environment import save
from nosa_jax import NosaLM, parallel, presets
from nosa_jax.model import Remat
from nosa_jax.train import Batch, OptimizerConfig, init_state, jit_train_step

GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


class Program(NamedTuple):
    """preset: a name in `nosa_jax.presets`. axes: sizes of the mesh. length: tokens per row."""

    preset: str
    axes: dict[str, int]
    remat: Remat = True
    moments: Any = "float32"
    length: int = 16384
    variant: Any = "nosa"

    @property
    def name(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.axes.items())
        options = [f"remat {self.remat}"] if isinstance(self.remat, str) else []
        options += [f"{self.moments} moments"] if self.moments != "float32" else []
        options += [self.variant] if self.variant != "nosa" else []
        return " ".join([self.preset, axes, *options])


PROGRAMS = (
    Program("nosa_1b", {"data": 2}),
    Program("nosa_1b", {"fsdp": 2}),
    Program("nosa_8b", {"fsdp": 2}, "offload"),
    Program("nosa_8b", {"fsdp": 2}, "offload", "bfloat16"),
    *(
        Program(preset, axes)
        for preset in ("nosa_1b", "nosa_8b")
        for axes in (
            {"fsdp": 8},
            {"data": 2, "fsdp": 4},
            {"fsdp": 4, "tensor": 2},
            {"fsdp": 4, "context": 2},
            {"data": 8, "fsdp": 8},
            {"data": 4, "fsdp": 8, "tensor": 2},
            {"data": 4, "fsdp": 8, "context": 2},
        )
    ),
)


def mesh_of_absent(axes: dict[str, int], *, rows: int = 8) -> Mesh:
    """A mesh of H200s that are not there, in hosts of up to `rows`."""
    sizes = [axes.get(name, 1) for name in parallel.AXES]
    count = math.prod(sizes)
    topology = f"{max(count // rows, 1)}x{min(count, rows)}x1"
    devices = topologies.get_topology_desc("h200", "cuda", target_config=TARGET, topology=topology).devices
    return Mesh(np.array(devices).reshape(sizes), parallel.AXES, axis_types=(AxisType.Auto,) * len(parallel.AXES))


def compile_step(program: Program) -> Any:
    """The compiled step."""
    mesh = mesh_of_absent(program.axes)
    config = getattr(presets, program.preset)(program.variant)
    optimizer = OptimizerConfig(moment_dtype=program.moments)
    state = jax.eval_shape(lambda: init_state(NosaLM(config, rngs=nnx.Rngs(0)), optimizer))
    rows = parallel.size_of(mesh, parallel.ROWS)
    lying = NamedSharding(mesh, parallel.fitting(mesh, (rows, program.length), P(parallel.ROWS, "context")))
    tokens = jax.ShapeDtypeStruct((rows, program.length), jnp.int32, sharding=lying)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=GPU)):
        traced = jit_train_step.trace(
            parallel.shard(state, mesh), Batch(tokens, tokens),
            optimizer=optimizer, steps=1000, compute_dtype="bfloat16", remat=program.remat,
        )  # fmt: skip
        return traced.lower(lowering_platforms=("cuda",)).compile()


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device, as XLA counts them; `peak` is of all that is alive at once on the device."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "of which in the arguments' place": found.alias_size_in_bytes,
        "peak": found.peak_memory_in_bytes,
        "host": found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    }


def faults(found: list[Collective], layers: int) -> list[str]:
    """What a program that is as it should be does not do."""
    checks = (
        ("in a loop other than over layers", lambda c: "chunks" in c.where or c.times not in (1, layers, 2 * layers)),
        ("weights gathered in float32", lambda c: c.kind == "all-gather" and "fsdp" in c.axes and "f32" in c.arrays),
        (
            "large all-reduce in float32",
            lambda c: c.kind == "all-reduce" and "f32" in c.arrays and c.bytes > 2**20,
        ),
        (
            "gradients of matrices all-reduced along fsdp",
            lambda c: c.kind == "all-reduce" and "fsdp" in c.axes and c.bytes > 2**20,
        ),
        ("arrays moved all to all", lambda c: c.kind in ("all-to-all", "collective-permute") and c.bytes > 2**20),
    )
    return [f"{what}: {c.kind} {c.arrays} along {c.axes}" for what, wrong in checks for c in found if wrong(c)]


def measure(program: Program) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = compile_step(program)
    seconds = time.perf_counter() - start
    config = getattr(presets, program.preset)(program.variant)
    found = collectives(compiled.as_text(), program.axes)
    return {
        "program": program.name,
        "devices": math.prod(program.axes.values()),
        "seconds": round(seconds, 1),
        "memory": memory(compiled),
        "collectives_bytes_per_step": sum(c.bytes * c.times for c in found),
        "collectives": [dataclasses.asdict(c) for c in sorted(found, key=lambda c: -c.bytes * c.times)],
        "faults": faults(found, config.num_layers),
    }


def show(result: dict[str, Any]) -> None:
    gib = {name: f"{size / 2**30:.2f}" for name, size in result["memory"].items()}
    print(f"{result['program']}: {result['seconds']} s, GiB per device {gib}, faults {result['faults']}", flush=True)
    for c in result["collectives"]:
        moved = f"{c['bytes'] / 2**20:10.2f} MiB"
        print(
            f"  {c['times']:3} x {moved} {c['kind']:18} {c['axes']:12} {c['where']:14} {c['arrays']:.110}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="programs with this in their name, e.g. 'nosa_1b fsdp=8'")
    parser.add_argument("--output", type=Path, help="where the JSON goes; other programs already in it stay")
    args = parser.parse_args()
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of a driver, which nothing here needs
    earlier = json.loads(args.output.read_text())["programs"] if args.output and args.output.exists() else []
    results = {result["program"]: result for result in earlier}
    for program in PROGRAMS:
        if args.only in program.name:
            results[program.name] = measure(program)
            show(results[program.name])
            ordered = [results[other.name] for other in PROGRAMS if other.name in results]
            save(args.output, programs=ordered)
    if wrong := {name: result["faults"] for name, result in results.items() if result["faults"]}:
        raise SystemExit(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main()
