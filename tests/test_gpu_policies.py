"""Policies of other systems on a GPU: their kernel's values, and bits wherever units lie. Run with `pytest -m gpu`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import AttentionConfig, CacheConfig, baselines, cast
from pallas_kernels import rebuilt_attention
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.rebuilt_attention.cases import SMALL, make_inputs
from pallas_kernels.rebuilt_attention.reference import rebuilt_attention_ref

pytestmark = pytest.mark.gpu

POLICIES = {
    "shadowkv": baselines.ShadowKV(chunk=8, rank=16, budget=256, local_chunks=4, outlier_chunks=4),
    "arkvale": baselines.ArkVale(page=16, budget=20, page_topks=12, sink=2, window=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_attention_with_rebuilt_keys(name):
    inputs = make_inputs(SMALL[name], jax.random.key(3))
    expected = rebuilt_attention_ref(**on_numpy(inputs), scale=0.4).astype(np.float32)
    bound = (2**-7 if SMALL[name].dtype == "bfloat16" else 3e-6) * np.abs(expected).max()
    ours = jax.jit(functools.partial(rebuilt_attention, implementation="triton", scale=0.4))(**inputs)
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", POLICIES)
def test_where_units_lie_changes_no_bit(name):
    """Rows of different lengths, 200 tokens each: in host memory by both transports, and on the device."""
    model = cast(lively_model(small_config(attention=AttentionConfig(variant="full"))), jnp.bfloat16)
    lengths = np.array([2000, 1500, 700, 33])
    tokens = random_tokens(4, lengths.max(), seed=2)
    run = functools.partial(nosa_jax.generate, model, tokens, lengths, max_new_tokens=200, record=True)
    expected = jax.device_get(run(cache=CacheConfig(offload=False, policy=POLICIES[name])))
    assert np.isfinite(expected.logits).all() and not expected.fetched.any()
    for transport in ("auto", "device_put"):
        ours = jax.device_get(run(cache=CacheConfig(policy=POLICIES[name], transport=transport)))
        np.testing.assert_array_equal(ours.logits, expected.logits)
        np.testing.assert_array_equal(ours.block_ids, expected.block_ids)
        assert ours.fetched.any()
