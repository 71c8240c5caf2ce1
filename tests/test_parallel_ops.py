"""Every op inside `jax.shard_map`, by rows and KV heads, with the default check of what varies over which axis."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from eight_devices import of_case
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from op_calls import CALLS
from parallel_ops import AXES, LEARNED, sharded

import pallas_kernels


@pytest.mark.slow
@pytest.mark.parametrize("op", AXES)
def test_values_and_gradients_are_those_outside(op):
    found = of_case("parallel_ops", "ops", op)
    assert found.keys() == ({"values", "gradients"} if op in LEARNED else {"values"})
    assert max(found.values()) < 1e-6, found


# ---- Kernels, lowered for GPUs that nobody has to own ----

FOUR_H200 = AbstractMesh(
    (2, 2),
    ("data", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
)


def kernels(function, arguments) -> list[str]:
    """Targets of the calls in what is lowered for CUDA."""
    with jax.sharding.use_abstract_mesh(FOUR_H200):
        text = jax.jit(function).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)", text)


def shapes_of(op):
    """Arguments by name as shapes; twice the rows and heads of a device."""
    arrays, static = CALLS[op]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays), static


@pytest.mark.parametrize("op", [op for op in AXES if op not in ("pool_keys", "append_pooled_keys")])
def test_triton_kernels_lower(op):
    arrays, static = shapes_of(op)

    def call(arrays):
        if "host" in arrays:
            arrays = arrays | {"host": jax.device_put(arrays["host"], jax.memory.Space.Host)}
        if "store" in arrays:
            host = jax.device_put(arrays["store"].host, jax.memory.Space.Host)
            arrays = arrays | {"store": arrays["store"]._replace(host=host)}
        return getattr(pallas_kernels, op)(**arrays, **static, implementation="triton")

    assert "__gpu$xla.gpu.triton" in kernels(sharded(call, op, arrays, FOUR_H200), arrays)


@pytest.mark.parametrize(("implementation", "target"), [("triton", "__gpu$xla.gpu.triton"), ("mosaic", "mosaic_gpu")])
def test_gradients_of_block_attention_lower(implementation, target):
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((4, *shape), dtype)
    heads, length, dim, size, selected = 2, 512, 128, 64, 4
    arrays = {
        "q": of("bfloat16", length, 16 * heads, dim),
        "k": of("bfloat16", heads, length, dim),
        "v": of("bfloat16", heads, length, dim),
        "bias": of("float32", heads, length),
        "block_ids": of("int32", heads, length, selected),
        "positions": of("int32", length),
    }
    call = lambda arrays: pallas_kernels.block_attention(**arrays, block_size=size, implementation=implementation)
    attend = sharded(call, "block_attention", arrays, FOUR_H200)

    def gradients(arrays):
        loss = lambda learned: sum(x.astype(jnp.float32).sum() for x in attend(arrays | learned))
        return jax.grad(loss)({name: arrays[name] for name in LEARNED["block_attention"]})

    # The kernels of the backward pass are Triton's in any case, and so are those that make lists of blocks.
    found = kernels(gradients, arrays)
    assert any(name.startswith(target) for name in found)
    assert found.count("__gpu$xla.gpu.triton") >= 6 - (implementation == "mosaic")
