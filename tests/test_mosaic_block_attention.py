"""The Mosaic GPU kernel in JAX's interpreter of a GPU's threads, barriers and memories: values, and no races.

The interpreter lacks what multiplies weights and values (see the expected failures at the end), so these few lines of
the kernel are replaced; the rest runs as it is. `pytest -m gpu` runs the whole kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import assert_as_good, assert_lse_close, definition, in_dtype, of_case, poisoned, rounded_weights
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import _backend, _inputs
from pallas_kernels.block_attention import mosaic
from pallas_kernels.block_attention.cases import Case
from pallas_kernels.block_attention.xla import Settings

plgpu = _backend.plgpu
# Unwritten memory is NaN there.
PARAMS = InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch):
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=PARAMS))
    with _backend.interpreted():  # the lists are made by a Triton kernel
        yield
    interpreter.reset_gpu_interpret_mode_state()


def add_products(acc, weights, values, meanwhile):
    """`mosaic._add_products` without tensor cores: 16-bit factors, float32 sums."""
    meanwhile()
    for i, factor in enumerate(weights):
        acc = acc + jnp.dot(factor.astype(jnp.float32), values[i].astype(jnp.float32))
    return acc


arrive = plgpu.barrier_arrive


def fence_and_arrive(barrier):
    """The interpreter wants a fence between a thread's read of shared memory and the copy engine's next write to it,
    even where a barrier orders them. The values in `add_products` are such reads (tensor cores read otherwise), and the
    bias is one in the kernel itself, which relies on its barrier alone, as JAX's own pipelines do."""
    plgpu.commit_smem()
    arrive(barrier)


def rows_of(kv_heads, group, *rows, **settings):
    sizes = {"block_size": 64, "stride": 16, "num_selected_blocks": 7, "num_query_blocks": 2}
    return _inputs.small(kv_heads, group, 128, *rows, **(sizes | settings))


CASES = {
    # More pairs of blocks than there are places for them in shared memory; the last tile is not full.
    "long_row": Case(rows_of(1, 16, (700,), queries=12)),
    # The group is padded, tiles hold queries of two documents, a row is empty.
    "packed_without_bias": Case(rows_of(1, 5, (64, 16), (0,), queries=24, num_selected_blocks=2), biased=False),
    "dense_behind_a_cache": Case(rows_of(1, 16, (700,), (640,), queries=12), dense=True, biased=False),
    "dense_packed": Case(rows_of(1, 8, (64, 16), (40,), queries=24), dense=True),
}


@pytest.mark.slow
@pytest.mark.xfail(
    jax.__version_info__ < (0, 12),
    reason="the interpreter wants every thread to have seen a barrier's last phase, which a loader need not",
)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, monkeypatch):
    monkeypatch.setattr(mosaic, "_add_products", add_products)
    monkeypatch.setattr(plgpu, "barrier_arrive", fence_and_arrive)
    inputs, _, size = of_case(CASES[name])
    low = in_dtype(inputs, jnp.bfloat16)
    dirty = poisoned(low, **size)
    order = ("q", "k", "v", "bias", "block_ids", "positions", "first_block")
    arrays = (None if dirty[n] is None else jnp.asarray(dirty[n]) for n in order)
    out, lse, _ = mosaic.forward(Settings(size["block_size"], 128**-0.5), *arrays)
    assert not interpreter.get_races().races_found
    truth, true_lse = definition(in_dtype(low, np.float32), **size)
    naive, _ = jax.jit(functools.partial(rounded_weights, **size))(**low)
    assert out.dtype == jnp.bfloat16 and (np.asarray(out)[inputs["positions"] < 0] == 0).all()
    assert_as_good(out, naive, np.asarray(truth))
    assert_lse_close(np.asarray(lse), np.asarray(true_lse), 1e-5)


# ---- what the interpreter lacks: when one of these passes, `add_products` can go ----


def product(multiply, load=lambda ref: ref):
    """[64, 64] ones times ones: multiply(a, b), where a is `load` of shared memory."""

    def body(a, b, out, a_smem, b_smem, barrier):
        for source, target in ((a, a_smem), (b, b_smem)):
            plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)
        out[...] = multiply(load(a_smem), b_smem)

    ones = jnp.ones((64, 64), jnp.bfloat16)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    memory = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tiled)
    out = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    kernel = plgpu.kernel(body, out_type=out, scratch_types=[memory, memory, plgpu.Barrier()])
    np.testing.assert_array_equal(kernel(ones, ones), 64)


def into_a_new_accumulator(a, b):
    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return _backend.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32))


def onto_an_accumulator(a, b):
    zeros = plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), plgpu.Layout.WGMMA)
    return _backend.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(zeros))


def from_registers(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def test_products_of_shared_memory():
    product(into_a_new_accumulator)


@pytest.mark.xfail(strict=True, raises=NotImplementedError, reason="the interpreter has no run_state: no ACC.init")
def test_products_onto_an_accumulator():
    product(onto_an_accumulator)


@pytest.mark.xfail(strict=True, raises=jax.errors.JaxRuntimeError, reason="its wgmma takes shared memory only")
def test_products_of_registers():
    product(into_a_new_accumulator, from_registers)
