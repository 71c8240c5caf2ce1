"""What has to hold on a GPU as on a CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig

pytestmark = pytest.mark.gpu


def test_offloaded_decoding_is_bit_identical():
    model = lively_model(small_config())
    tokens, lengths = random_tokens(3, 300, seed=2), np.array([300, 128, 33])
    runs = [
        nosa_jax.generate(model, tokens, lengths, max_new_tokens=50, cache=cache, record=True)
        for cache in (CacheConfig(offload=False), CacheConfig(slots=8), CacheConfig(slots=12))
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.logits, runs[0].logits)


def test_memory_kinds():
    model = lively_model(small_config())
    prefill = jax.jit(nosa_jax.prefill, static_argnames="max_length")
    state, _ = prefill(model, random_tokens(1, 40), max_length=200)
    assert state.host.sharding.memory_kind == "pinned_host"
    assert state.pool.sharding.memory_kind == "device"
