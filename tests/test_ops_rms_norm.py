"""Normalisation by one layer's weights against the definition in float64, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _backend, rms_norm
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.rms_norm.cases import SMALL, make_inputs, options
from pallas_kernels.rms_norm.reference import rms_norm_ref

IMPLEMENTATIONS = ("xla", "triton")


def run(implementation, inputs, **static):
    with _backend.interpreted():
        return jax.jit(functools.partial(rms_norm, implementation=implementation, **static))(**inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name, implementation):
    """Rounded once: within half a unit in the last place of the output's dtype, and what float32 adds to it."""
    inputs, static = make_inputs(SMALL[name], jax.random.key(0)), options(SMALL[name])
    # A row so small that eps counts, and one of zeros.
    inputs["x"] = inputs["x"].at[-1].multiply(1e-3)
    expected = rms_norm_ref(**on_numpy(inputs), **static)
    out = run(implementation, inputs, **static)
    assert out.dtype == inputs["x"].dtype
    exact = out.dtype == jnp.float32
    rtol = 2e-6 if exact else float(jnp.finfo(out.dtype).eps) / 2 * 1.001
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=rtol, atol=1e-30)
    zeros = run(implementation, inputs | {"x": jnp.zeros_like(inputs["x"])}, **static)
    np.testing.assert_array_equal(zeros, np.zeros(zeros.shape))


def test_every_layer_has_its_own_weights():
    inputs, static = make_inputs(SMALL["any_width"], jax.random.key(1)), options(SMALL["any_width"])
    for layer in range(inputs["weight"].shape[0]):
        given = inputs | {"layer": jnp.int32(layer)}
        ours = [np.asarray(run(implementation, given, **static)) for implementation in IMPLEMENTATIONS]
        np.testing.assert_allclose(*ours, rtol=1e-6)
        np.testing.assert_allclose(ours[0], rms_norm_ref(**on_numpy(given), **static), rtol=2e-6)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": jnp.zeros(8)}, ValueError, r"^x: must have shape .*B, H\]"),
        ({"weight": jnp.zeros((3, 9))}, ValueError, r"^weight: must have shape .*L, H\]"),
        ({"layer": 3}, ValueError, r"^layer: must be in \[0, L = 3\), got 3"),
        ({"eps": -1.0}, ValueError, r"^eps: must be >= 0.0 and finite, got -1.0"),
        ({"eps": float("nan")}, ValueError, r"^eps: must be "),
        ({"eps": "small"}, TypeError, r"^eps: must be a number"),
        ({"x": None}, TypeError, r"^x: must be given"),
    ],
)
def test_bad_arguments(without_type_checker, changes, error, message):
    given = {"x": jnp.zeros((2, 8)), "weight": jnp.zeros((3, 8)), "layer": 0, "eps": 1e-5}
    with pytest.raises(error, match=message):
        rms_norm(**(given | changes))
