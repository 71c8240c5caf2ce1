"""The Triton kernels under JAX's transformations: the values and gradients of the plain XLA ops."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, _inputs, block_attention, block_scores, select_blocks
from pallas_kernels.block_attention.cases import Case, make_inputs

ROWS = _inputs.small(2, 2, 16, (40, 23), (50,), num_selected_blocks=3)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


def arguments():
    """((q, k, v, bias), (positions, first block)) of two rows with two KV heads."""
    inputs = make_inputs(Case(ROWS), jax.random.key(0))
    return [inputs[name] for name in ("q", "k", "v", "bias")], (inputs["positions"], inputs["first_block"])


def layer(q, k, v, bias, positions, first_block, implementation="triton"):
    """Scores from the keys of every fourth token, the selection, attention over it: all three ops."""
    run = {"implementation": implementation, "block_size": 16}
    # The importance of blocks is not learned.
    importance = jax.lax.stop_gradient(bias[..., ::16])
    scores = block_scores(q, k[:, :, 3:-3:4], positions, first_block, num_blocks=ROWS.num_blocks, stride=4, **run)
    ids = select_blocks(
        scores, importance, positions, first_block,
        num_selected_blocks=3, num_sink_blocks=0, num_local_blocks=1, num_query_blocks=1, **run,
    )  # fmt: skip
    out, lse = block_attention(q, k, v, bias, ids, positions, first_block, **run)
    return out, jnp.where(positions[..., None] >= 0, lse, 0)


def value_and_gradients(f):
    """Of the sum of squares, in the four learned arguments."""

    def loss(learned, rest):
        return sum((x**2).sum() for x in jax.tree.leaves(f(*learned, *rest)))

    return jax.jit(jax.value_and_grad(loss))(*arguments())


def assert_close(ours, theirs):
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


xla = functools.partial(layer, implementation="xla")


@pytest.mark.slow
def test_checkpoint():
    assert_close(value_and_gradients(jax.checkpoint(layer)), value_and_gradients(xla))


@pytest.mark.slow
def test_scan_over_checkpointed_layers():
    """Each layer attends from what the one before put out."""

    def scanned(q, *rest):
        step = jax.checkpoint(lambda q, scale: (layer(q * scale, *rest)[0], None))
        return jax.lax.scan(step, q, jnp.asarray([1.0, 2.0]))[0]

    def unrolled(q, *rest):
        for scale in (1.0, 2.0):
            q, _ = xla(q * scale, *rest)
        return q

    assert_close(value_and_gradients(scanned), value_and_gradients(unrolled))


ACROSS_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
from jax.sharding import AxisType, PartitionSpec as P
import test_triton_transforms as here

mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
by_query, by_key = P("rows", None, "heads"), P("rows", "heads")
sharded = jax.shard_map(
    here.layer, mesh=mesh, check_vma=False, out_specs=(by_query, by_query),
    in_specs=(by_query, by_key, by_key, by_key, P("rows"), P("rows")),
)
with here._backend.interpreted():
    here.assert_close(here.value_and_gradients(sharded), here.value_and_gradients(here.xla))
"""


@pytest.mark.slow
def test_shard_map_over_rows_and_kv_heads():
    command = [sys.executable, "-W", "ignore", "-c", ACROSS_DEVICES]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
