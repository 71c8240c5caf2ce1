"""Slots of a stacked table: XLA and the Triton kernel in Pallas' interpreter against a Python loop."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import _backend, resolve_slots
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.resolve_slots import reference
from pallas_kernels.resolve_slots.cases import SMALL, make_inputs

IMPLEMENTATIONS = ("xla", "triton")


@functools.partial(jax.jit, static_argnums=0)
def resolved(implementation, inputs):
    with _backend.interpreted() if implementation == "triton" else contextlib.nullcontext():
        return resolve_slots(**inputs, implementation=implementation)


def assert_like_python(implementation, inputs):
    plain = on_numpy(inputs)
    expected = reference.resolve_slots_ref(**plain)
    for ours, true in zip(resolved(implementation, inputs), expected, strict=True):
        assert ours.dtype == true.dtype
        np.testing.assert_array_equal(ours, true)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_cases(name, implementation):
    assert_like_python(implementation, make_inputs(SMALL[name], jax.random.key(1)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_64_bit_numbers(implementation):
    with jax.enable_x64(True):
        assert_like_python(implementation, make_inputs(SMALL["many_slots"], jax.random.key(1)))


@settings(max_examples=15)
@given(st.data())
def test_any_table(data):
    """Tables with empty slots and equal ages, wanted blocks in any order with padding anywhere."""
    width, slots = data.draw(st.sampled_from([(1, 1), (3, 3), (4, 7), (6, 20)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    shape = (1, 2, 1, slots)
    blocks, ages = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    wanted = np.full((2, 1, width), -1, np.int32)
    for row in range(2):
        full = rng.random(slots) < 0.8
        blocks[0, row, 0] = np.where(full, rng.permutation(slots + 9)[:slots], -1)
        ages[0, row, 0] = np.where(full, rng.integers(0, 3, slots), -1)
        count = rng.integers(0, width + 1)
        wanted[row, 0, rng.permutation(width)[:count]] = rng.permutation(slots + 9)[:count]
    inputs = {"blocks": blocks, "last_used": ages, "wanted": wanted, "step": np.array([3, 9], np.int32)}
    for implementation in IMPLEMENTATIONS:
        assert_like_python(implementation, jax.tree.map(jnp.asarray, inputs | {"layer": np.int32(0)}))


def test_other_layers_stay():
    inputs = make_inputs(SMALL["some_move"], jax.random.key(1))
    for implementation in IMPLEMENTATIONS:
        blocks, last_used, *_ = resolved(implementation, inputs)
        np.testing.assert_array_equal(blocks[0], inputs["blocks"][0])
        np.testing.assert_array_equal(last_used[0], inputs["last_used"][0])
        assert (np.asarray(last_used[1]) != np.asarray(inputs["last_used"][1])).any()
