"""Gradients of block attention in XLA against automatic differentiation of the definition, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    LEARNED,
    assert_close,
    case_of,
    in_bfloat16,
    in_float64,
    poisoned,
    seen_tokens,
    true_gradients,
    truth,
    value_and_gradients,
)
from op_calls import CALLS

from pallas_kernels import block_attention
from pallas_kernels.block_attention import cudnn
from pallas_kernels.block_attention.reference import block_attention_ref
from pallas_kernels.block_attention.xla import Settings


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


def test_gradients_of_the_two_halves_of_cudnn(monkeypatch):
    """What stands for cuDNN here runs anywhere: with XLA's lse it has the gradients of the definition."""
    fused = jax.nn.dot_product_attention
    anywhere = lambda *arguments, implementation, **options: fused(*arguments, implementation="xla", **options)
    monkeypatch.setattr(cudnn.jax.nn, "dot_product_attention", anywhere)
    inputs, cotangents, size = case_of("k1_g1_one_row")
    inputs = inputs | {"bias": None, "block_ids": None, "positions": None}
    settings = Settings(size["block_size"], inputs["q"].shape[-1] ** -0.5)

    def attend(*, q, k, v, bias, block_ids, positions, first_block, block_size):
        return cudnn.attend(settings, q, k, v, bias, block_ids, positions, first_block)

    (out, lse), grads = in_float64(attend, inputs, cotangents, **size)
    (true_out, true_lse), true_grads = in_float64(block_attention_ref, inputs, cotangents, **size)
    np.testing.assert_allclose(lse, true_lse, rtol=0, atol=1e-13)
    np.testing.assert_allclose(out, true_out, rtol=0, atol=1e-6)  # its softmax is in float32
    assert_close(grads, true_grads, 1e-6)


def test_gradients_in_float32():
    inputs, cotangents, size = case_of("k1_g16_spans")
    _, grads = jax.device_get(value_and_gradients(block_attention, inputs, cotangents, **size))
    assert all(grads[name].dtype == np.float32 for name in LEARNED)
    assert_close(grads, truth("k1_g16_spans")[1], 2e-6)


def test_gradients_in_bfloat16_are_as_good_as_their_rounding():
    inputs, cotangents, size = case_of("k1_g16_spans")
    low, wide = in_bfloat16(inputs, cotangents)
    _, true = true_gradients(*wide, **size)
    _, grads = jax.device_get(value_and_gradients(block_attention, *low, **size))
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
    seen, real = seen_tokens(inputs, **size), inputs["positions"] >= 0
    assert 0.02 < seen.mean() < 0.98
    (out, lse), grads = jax.device_get(value_and_gradients(block_attention, inputs, cotangents, **size))
    (dirty_out, dirty_lse), dirty = jax.device_get(
        value_and_gradients(block_attention, poisoned(inputs, **size), cotangents, **size)
    )
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


def test_forward_mode_says_what_to_use():
    """There is one derivative, in reverse mode, and forward mode over it."""
    arrays, static = CALLS["block_attention"]
    loss = lambda q: block_attention(**(arrays | {"q": q}), **static)[0].sum()
    q = arrays["q"]
    with pytest.raises(TypeError, match=r"^block_attention: has derivatives in reverse mode, .*Use jax\.grad"):
        jax.jvp(loss, (q,), (q,))
    product = jax.eval_shape(lambda q: jax.jvp(jax.grad(loss), (q,), (q,))[1], q)
    assert product.shape == q.shape
