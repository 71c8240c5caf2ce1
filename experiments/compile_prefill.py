"""What prefill holds and writes, from its programs compiled for an H200 on a machine without a GPU.

    pip install ".[cuda13]"; python -m experiments.compile_prefill --output experiments/results/compile_prefill.json

For 1, 16 and 64 rows of 16K tokens of the released 1B and 8B shapes: the peak of device memory as XLA counts it,
weights and cache included, beside what `nosa_jax.plan` says; and that nothing but our kernels writes into the host
store, which XLA would do two bytes at a time. Fails where a program breaks one of the two. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import nosa_jax
from experiments.compile_for_h200 import TARGET
from experiments.environment import save
from nosa_jax import CacheConfig, NosaLM, presets
from nosa_jax.cache.working_set import Limits
from nosa_jax.decode.program import READING_OPTIONS
from nosa_jax.decode.prompt import Prompt, read_prompt

CONTEXT, NEW = 16384, 72
MOST = 1.1  # of the peak, that a plan may say
# What may have an array in host memory as its result.
HARMLESS = {"get-tuple-element", "parameter", "tuple", "while", "bitcast"}


def compiled(config: Any, rows: int, cache: CacheConfig, chunk: int | None) -> Any:
    topology = topologies.get_topology_desc("h200", "cuda", target_config=TARGET, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    placed = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    model = placed(jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    numbers = lambda *shape: placed(jax.ShapeDtypeStruct(shape, jnp.int32))
    prompt = Prompt(numbers(rows, CONTEXT), numbers(rows))
    # What `prefill` runs after its checks, which know the memory of this machine only.
    prefill = functools.partial(read_prompt, max_length=CONTEXT + NEW, cache=cache, limits=Limits(chunk))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(prefill).trace(model, prompt).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=READING_OPTIONS)


def writers(text: str) -> set[str]:
    """What makes arrays in host memory in a compiled program: kernels by name, the rest by kind."""
    found = set()
    for line in text.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = [^({]*\{[\d,]*:S\(5\)\} ([\w\-]+)\(", line):
            name, kind = match.groups()
            if kind not in HARMLESS:
                found.add(name.rstrip(".0123456789") if kind == "custom-call" else kind)
    return found


def entry(preset: str, variant: Any, rows: int, cache: CacheConfig, chunk: int | None = None) -> dict[str, Any]:
    config = getattr(presets, preset)(variant=variant)
    program = compiled(config, rows, cache, chunk)
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    plan = nosa_jax.plan(config, rows, CONTEXT + NEW, cache, prompt=CONTEXT, chunk=chunk)
    return {
        "preset": preset, "variant": variant, "rows": rows, "slots": plan.slots, "peak": peak,
        "plan": plan.device_bytes, "plan_over_peak": round(plan.device_bytes / peak, 4),
        "reading": plan.reading._asdict(), "writes_to_host": sorted(writers(program.as_text())),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    runs: list[tuple[Any, ...]] = [
        (preset, "nosa", rows, CacheConfig()) for preset in ("nosa_1b", "nosa_8b") for rows in (1, 16, 64)
    ]
    runs += [("nosa_8b", variant, 16, CacheConfig(offload=False)) for variant in ("nosa", "full")]
    runs += [("nosa_1b", "nosa", rows, CacheConfig(), 2048) for rows in (1, 16)]
    entries, bad = [], 0
    for run in runs:
        entries.append(entry(*run))
        told = entries[-1]
        bad += not 1 <= told["plan_over_peak"] <= MOST or not set(told["writes_to_host"]) <= {"empty", "pallas_call"}
        print(json.dumps(told), flush=True)
        save(args.output, context=CONTEXT, new=NEW, target="NVIDIA H200", entries=entries)
    sys.exit(f"{bad} programs are not as planned" if bad else 0)


if __name__ == "__main__":
    main()
