"""Compiles the kernels for an H200 on a machine without a GPU: what the lowering tests cannot see.

    pip install ".[cuda13]"; python -m experiments.compile_for_h200

Goes through Triton, Mosaic and ptxas to machine code, so it finds sizes that do not fit shared memory and kernels that
take a minute to compile; prints compile seconds and XLA's temporary bytes, and fails if a kernel does. Slow (minutes on
two cores), hence not a test.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from nosa_jax import CacheConfig, ModelConfig, NosaLM, baselines, decode, presets
from nosa_jax.cache.state import empty_state, policy_sizes
from pallas_kernels import block_attention, select_blocks
from pallas_kernels.block_scores import block_scores

# The facts of the chip that the compiler asks for; memory sizes in bytes, bandwidth in bytes per second.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } device_description_str: "NVIDIA H200"
"""
PICKS = {"num_selected_blocks": 64, "num_sink_blocks": 1, "num_local_blocks": 17, "num_query_blocks": 15}
Program = tuple[str, Callable[..., Any], tuple[Any, ...]]


def attention(group: int, dim: int, dtype: Any, size: int = 64, tokens: int = 4096) -> Iterator[Program]:
    """Forward, and forward with gradients, as "auto" runs them; forward also in Triton."""
    row = lambda *shape, kind=dtype: jax.ShapeDtypeStruct((1, *shape), kind)
    floats = (row(tokens, 2 * group, dim), *(row(2, tokens, dim),) * 2, row(2, tokens, kind=jnp.float32))
    rest = (row(2, tokens, 64, kind=jnp.int32), row(tokens, kind=jnp.int32))

    def forward(*args: Any, implementation: str = "auto") -> Any:
        return block_attention(*args, block_size=size, implementation=implementation)

    def gradients(floats: tuple[Any, ...], *rest: Any) -> Any:
        return jax.grad(lambda floats: forward(*floats, *rest)[0].astype(jnp.float32).sum())(floats)

    name = f"G={group} D={dim} P={size} {jnp.dtype(dtype).name}"
    yield f"attention {name}", forward, (*floats, *rest)
    yield f"attention in Triton {name}", functools.partial(forward, implementation="triton"), (*floats, *rest)
    yield f"attention gradients {name}", gradients, (floats, *rest)


def selection(group: int, dim: int, dtype: Any, num_blocks: int) -> Iterator[Program]:
    tokens, windows = 4096, 4 * num_blocks - 1
    shape = lambda *shape, kind=dtype: jax.ShapeDtypeStruct((1, *shape), kind)
    scores = functools.partial(block_scores, num_blocks=num_blocks, block_size=64, stride=16)
    operands = (shape(tokens, 2 * group, dim), shape(2, windows, dim), shape(tokens, kind=jnp.int32))
    yield f"scores G={group} D={dim} M={num_blocks} {jnp.dtype(dtype).name}", scores, operands
    both = tuple(shape(*sizes, kind=jnp.float32) for sizes in ((2, tokens, num_blocks), (2, num_blocks)))
    select = functools.partial(select_blocks, block_size=64, **PICKS)
    yield f"selection M={num_blocks}", select, (*both, shape(tokens, kind=jnp.int32))


def decode_step(config: ModelConfig, batch: int, max_length: int, cache: CacheConfig) -> Iterator[Program]:
    """Sixteen steps of a loop over the whole model; its temporaries hold the pool, but no layer's weights."""
    sizes = None if cache.policy is None else policy_sizes(config, batch, max_length, max_length - 64, 64)
    model = jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def steps(model: NosaLM, tokens: Any, lengths: Any) -> Any:
        state = empty_state(config, batch, max_length, cache, jnp.bfloat16, sizes=sizes)
        state = dataclasses.replace(state, lengths=lengths)

        def body(_: Any, carry: Any) -> Any:
            state, tokens = carry
            state, out = decode.run_step(model, state, tokens)
            return state, jnp.argmax(out.logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 16, body, (state, tokens))[1]

    how = f"{cache.slots} slots" if cache.policy is None else type(cache.policy).__name__
    yield f"decode, {batch} rows of {max_length}, {how}", steps, (model, rows, rows)


def programs() -> Iterator[Program]:
    for group, dim in ((16, 128), (8, 128), (4, 128), (1, 128), (16, 64), (3, 64)):
        yield from attention(group, dim, jnp.bfloat16)
    yield from attention(16, 128, jnp.float32)
    yield from attention(16, 128, jnp.bfloat16, size=128)
    yield from attention(2, 32, jnp.float32, size=16, tokens=1024)
    for group, dim, dtype, num_blocks in (
        (16, 128, jnp.bfloat16, 512),
        (8, 128, jnp.bfloat16, 1600),
        (1, 64, jnp.bfloat16, 3000),
        (16, 128, jnp.float32, 64),
    ):
        yield from selection(group, dim, dtype, num_blocks)
    few_layers = dataclasses.replace(presets.nosa_8b(), num_layers=4)
    for batch, max_length, slots in ((16, 16384, 80), (128, 16384, 64), (8, 98304, 128)):
        yield from decode_step(few_layers, batch, max_length, CacheConfig(slots=slots))
    for policy in (baselines.ShadowKV(), baselines.ArkVale()):
        yield from decode_step(few_layers.with_attention(variant="full"), 16, 16384, CacheConfig(policy=policy))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    topology = topologies.get_topology_desc("h200", "cuda", target_config=TARGET, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
    failed = 0
    for name, function, operands in programs():
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands)
        start = time.perf_counter()
        try:
            with jax.sharding.use_abstract_mesh(mesh):
                lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
                compiled = lowered.compile(compiler_options=decode.COMPILER_OPTIONS)
            result = f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:8.1f} MiB"
        except Exception as error:  # the next one may still compile
            failed += 1
            result = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"{name:<55}{time.perf_counter() - start:6.1f} s {result}", flush=True)
    sys.exit(f"{failed} did not compile" if failed else 0)


if __name__ == "__main__":
    main()
