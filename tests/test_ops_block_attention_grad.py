"""Gradients of block attention in XLA against automatic differentiation of the definition, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention
from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention.cases import SMALL, make_inputs, options

LEARNED = ("q", "k", "v", "bias")


@functools.cache
def case_of(name: str):
    """(numpy inputs, weights of the outputs in the loss, static arguments)."""
    inputs = jax.tree.map(np.asarray, make_inputs(SMALL[name], jax.random.key(3)))
    rng = np.random.default_rng(5)
    out = rng.standard_normal(inputs["q"].shape)
    lse = rng.standard_normal(inputs["q"].shape[:3])
    return inputs, (out, lse), options(SMALL[name])


@functools.partial(jax.jit, static_argnames=("op", "block_size"))
def value_and_gradients(op, inputs, cotangents, *, block_size):
    """((out, lse), gradients of sum(out * cotangent) + sum(lse * cotangent) in q, k, v and bias)."""
    learned = {name: inputs[name] for name in LEARNED if inputs[name] is not None}
    outputs, pull = jax.vjp(lambda x: op(**(inputs | x), block_size=block_size), learned)
    grads = jax.tree.map(lambda g, o: jnp.asarray(g, o.dtype), cotangents, outputs)
    return outputs, pull(grads)[0]


def in_float64(op, inputs, cotangents, **size):
    with jax.enable_x64(True):
        wide = {
            name: np.asarray(x, np.float64) if name in LEARNED and x is not None else x for name, x in inputs.items()
        }
        return jax.device_get(value_and_gradients(op, wide, cotangents, **size))


def no_lse_of_empty(inputs, cotangents):
    """The lse of a query that sees nothing is -inf whatever the inputs: it takes no part in the loss."""
    out, lse = cotangents
    return out, np.where(inputs["positions"][..., None] >= 0, lse, 0)


@functools.cache
def truth(name: str):
    inputs, cotangents, size = case_of(name)
    return in_float64(reference.block_attention, inputs, no_lse_of_empty(inputs, cotangents), **size)


def assert_close(ours, theirs, tolerance):
    for name, expected in theirs.items():
        scale = np.abs(expected).max()
        assert scale > 0.1, name
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


# Several tiles and spans; packed rows; without ids; empty and ragged rows without bias.
@pytest.mark.parametrize("name", ["k1_g16_spans", "k2_g1_packed", "dense_without_bias"])
def test_gradients_in_float64(name):
    inputs, cotangents, size = case_of(name)
    (out, lse), grads = in_float64(block_attention, inputs, cotangents, **size)
    (true_out, true_lse), true_grads = truth(name)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, true_out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, true_lse, rtol=0, atol=1e-13)
    assert set(grads) == set(true_grads) == {name for name in LEARNED if inputs[name] is not None}
    assert_close(grads, true_grads, 1e-12)


def test_gradients_in_float32():
    inputs, cotangents, size = case_of("k1_g16_spans")
    _, grads = jax.device_get(value_and_gradients(block_attention, inputs, cotangents, **size))
    assert all(grads[name].dtype == np.float32 for name in LEARNED)
    assert_close(grads, truth("k1_g16_spans")[1], 2e-6)


def test_gradients_in_bfloat16_are_as_good_as_their_rounding():
    inputs, cotangents, size = case_of("k1_g16_spans")
    cast = {name: inputs[name].astype(jnp.bfloat16) for name in ("q", "k", "v")}
    rounded = inputs | {name: x.astype(np.float32) for name, x in cast.items()}
    cotangents = (np.asarray(cotangents[0].astype(jnp.bfloat16), np.float32), cotangents[1])
    _, true = in_float64(reference.block_attention, rounded, cotangents, **size)
    _, grads = jax.device_get(value_and_gradients(block_attention, inputs | cast, cotangents, **size))
    # delta is taken from the rounded output and dlogits are rounded once, then each gradient once.
    for name in LEARNED:
        assert grads[name].dtype == (np.float32 if name == "bias" else jnp.bfloat16)
        error = np.sqrt(np.mean((grads[name].astype(np.float64) - true[name]) ** 2))
        assert error < float(jnp.finfo(jnp.bfloat16).eps) * np.sqrt(np.mean(true[name] ** 2)), name


@pytest.mark.parametrize("offset", [-1e3, 1e3])
def test_a_large_bias_on_every_token_cancels(offset):
    inputs, cotangents, size = case_of("k1_g16_spans")
    shifted = inputs | {"bias": inputs["bias"] + np.float32(offset)}
    _, grads = jax.device_get(value_and_gradients(block_attention, shifted, cotangents, **size))
    assert_close(grads, truth("k1_g16_spans")[1], 1e-3)


@pytest.mark.parametrize("name", ["k1_g16_spans", "k2_g4_ragged", "dense_packed"])
def test_nan_that_nobody_sees_does_not_spread(name):
    """Into values and gradients: from blocks that nobody selected, padding, and queries that are padding."""
    inputs, cotangents, size = case_of(name)
    seen = np.asarray(
        reference.token_mask(
            *(
                inputs[name] if inputs[name] is None else jnp.asarray(inputs[name])
                for name in ("block_ids", "positions")
            ),
            None if inputs["first_block"] is None else jnp.asarray(inputs["first_block"]),
            num_tokens=inputs["k"].shape[2],
            **size,
        )
    ).any(2)
    seen = np.broadcast_to(seen, inputs["bias"].shape)  # without ids, all heads see the same
    assert 0.02 < seen.mean() < 0.98
    real = inputs["positions"] >= 0
    poisoned = inputs | {
        "q": np.where(real[..., None, None], inputs["q"], np.nan),
        "k": np.where(seen[..., None], inputs["k"], np.nan),
        "v": np.where(seen[..., None], inputs["v"], np.nan),
        "bias": np.where(seen, inputs["bias"], np.nan),
    }
    (out, lse), grads = jax.device_get(value_and_gradients(block_attention, inputs, cotangents, **size))
    (dirty_out, dirty_lse), dirty = jax.device_get(value_and_gradients(block_attention, poisoned, cotangents, **size))
    np.testing.assert_array_equal(dirty_out, out)
    np.testing.assert_array_equal(dirty_lse, lse)
    for name in LEARNED:
        np.testing.assert_array_equal(dirty[name], grads[name], err_msg=name)
    assert (grads["v"][~seen] == 0).all() and (grads["bias"][~seen] == 0).all()
    assert (grads["q"][~real] == 0).all()


def test_gradients_of_padding_do_not_spread():
    """A loss may make anything of the -inf of an empty query."""
    inputs, (out, lse), size = case_of("k2_g4_ragged")
    padding = inputs["positions"] < 0
    wild = np.where(padding[..., None, None], np.nan, out), np.where(padding[..., None], np.nan, lse)
    _, grads = jax.device_get(value_and_gradients(block_attention, inputs, wild, **size))
    _, expected = jax.device_get(value_and_gradients(block_attention, inputs, (out, lse), **size))
    for name in LEARNED:
        np.testing.assert_array_equal(grads[name], expected[name], err_msg=name)
