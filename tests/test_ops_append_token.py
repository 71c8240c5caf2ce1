"""One more token per row: values against the definition in float64, and what must stay as it was."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, append_pooled_keys, append_token
from pallas_kernels.append_token import reference
from pallas_kernels.append_token.cases import SMALL, make_inputs, options
from pallas_kernels.bench.work import on_numpy


def run(implementation, inputs, **static):
    with _backend.interpreted():
        return jax.jit(functools.partial(append_token, implementation=implementation, **static))(**inputs)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name, implementation):
    inputs, static = make_inputs(SMALL[name], jax.random.key(0)), options(SMALL[name])
    plain = on_numpy(inputs)
    expected = reference.append_token_ref(**plain, **static)
    ours = run(implementation, inputs, **static)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    (*token, (keys, *importance)), (*true_token, (true_keys, *true_importance)) = ours, expected

    def assert_close(arrays, true, atol):
        for x, y in zip(jax.tree.leaves(arrays), jax.tree.leaves(true), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=float(jnp.finfo(x.dtype).eps), atol=atol)

    # A key that rounds the other way moves the float32 sums that it enters; importance is float32 throughout.
    assert_close((token, keys), (true_token, true_keys), 1e-5 if inputs["qkv"].dtype == jnp.float32 else 0.02)
    assert_close(importance, true_importance, 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_nothing_else_changes(implementation):
    """Other layers, rows without a token, blocks beyond the cache: to the bit."""
    case = SMALL["nosa"]
    inputs = make_inputs(case, jax.random.key(1))
    beyond = case.num_blocks * case.block_size
    inputs["positions"] = jnp.array([-1, beyond, beyond + 3, 2**31 - 1, -(2**31), 5], jnp.int32)
    *_, after = run(implementation, inputs, **options(case))
    before, after = (jax.device_get(x) for x in (inputs["summaries"], after))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_array_equal(new[1, [0, 4]], old[1, [0, 4]])
    read = lambda summaries: (summaries.pooled_keys[0], summaries.importance, summaries.pooled_importance[0])
    for old, new in zip(read(before), read(after), strict=True):
        np.testing.assert_array_equal(new[1, :5], old[1, :5])  # nothing that a selection or attention reads
    assert (after.importance[1, 5] != before.importance[1, 5]).sum() == case.kv_heads


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_means_are_those_of_whole_rows(dtype):
    """Token by token in the kernel, to the bit as `append_pooled_keys` of its keys at once."""
    case = SMALL["bfloat16"]
    inputs, static = make_inputs(case, jax.random.key(2)), options(case)
    summaries = jax.tree.map(jnp.zeros_like, inputs["summaries"])
    summaries = summaries._replace(pooled_keys=(summaries.pooled_keys[0].astype(dtype), summaries.pooled_keys[1]))
    start, rng, keys = jnp.array([0, 3, 0], jnp.int32), np.random.default_rng(0), []
    step, at = jax.jit(functools.partial(append_token, implementation="triton", **static)), start
    for _ in range(13):
        qkv = jnp.asarray(rng.standard_normal(inputs["qkv"].shape), dtype)
        with _backend.interpreted():
            _, k, _, summaries = step(**(inputs | {"qkv": qkv, "summaries": summaries, "positions": at}))
        keys.append(k)
        at = at + 1
    empty = jax.tree.map(jnp.zeros_like, summaries.pooled_keys)
    count, layer = jnp.full((3,), 13, jnp.int32), inputs["layer"]
    whole = append_pooled_keys(*empty, jnp.stack(keys, axis=2), start, count, layer, stride=case.stride)
    assert (np.asarray(whole[0]) != 0).any()
    for ours, expected in zip(summaries.pooled_keys, whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
