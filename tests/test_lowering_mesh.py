"""Kernels on several GPUs without one: inside `jax.shard_map` nothing that a device computes counts as everybody's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from targets import cudnn_installed

from pallas_kernels import block_attention

GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
GPUS = AbstractMesh((2,), ("rows",), axis_types=(AxisType.Auto,), abstract_device=GPU)


def floats(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((2, *shape), dtype)


def ints(*shape):
    return jax.ShapeDtypeStruct((2, *shape), jnp.int32)


# q, k, v, bias; block ids and positions. cuDNN attends from whole rows without the last three.
LEARNED = (floats(1024, 32, 128), floats(2, 1024, 128), floats(2, 1024, 128), floats(2, 1024, dtype="float32"))
SELECTED = (ints(2, 1024, 8), ints(1024))


@pytest.mark.parametrize(
    "implementation, has_ids", [("mosaic", True), ("triton", True), ("xla", True), ("mosaic", False), ("cudnn", False)]
)
def test_results_and_gradients_of_attention_are_the_devices_own(implementation, has_ids):
    """Were a result taken for the same everywhere, its cotangents would be summed over rows of different devices."""
    dense = not has_ids
    learned, selected = (LEARNED[:3], ()) if dense else (LEARNED, SELECTED)
    varies = []

    def attend(learned, selected):
        args = (*learned, None, None, None) if dense else (*learned, *selected)
        out, _ = block_attention(*args, block_size=64, implementation=implementation)
        varies.append(jax.typeof(out).manual_axis_type.varying)
        return out

    sharded = jax.shard_map(attend, mesh=GPUS, in_specs=P("rows"), out_specs=P("rows"))
    with cudnn_installed(), jax.sharding.use_abstract_mesh(GPUS):
        gradient = jax.grad(lambda learned: sharded(learned, selected).astype(jnp.float32).sum())
        program = str(jax.make_jaxpr(gradient)(learned))
    assert set(varies) == {frozenset({"rows"})}
    assert "psum" not in program
