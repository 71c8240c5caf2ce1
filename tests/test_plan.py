"""The plan counts what is really allocated."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, baselines, presets
from nosa_jax.cache import memory
from nosa_jax.cache.plan import default_rates
from nosa_jax.cache.state import empty_state
from nosa_jax.cache.step_costs import expected_misses, parameter_bytes, step_bytes
from pallas_kernels import device


@pytest.mark.parametrize(
    ("variant", "cache"),
    [
        ("nosa", CacheConfig()),
        ("nosa", CacheConfig(slots=9)),
        ("nosa", CacheConfig(offload=False)),
        ("infllmv2", CacheConfig()),
        ("dma", CacheConfig()),
        ("full", CacheConfig()),
    ],
)
def test_bytes_equal_the_arrays(variant, cache):
    config = small_config().with_attention(variant=variant)
    plan = nosa_jax.plan(config, 3, 333, cache, dtype=jnp.float32)
    state = jax.eval_shape(lambda: empty_state(config, 3, 333, cache, jnp.float32))
    sizes = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(value))
        for name, value in vars(state).items()
        if name not in ("max_length", "transport")
    }
    assert plan.host_bytes == sizes["host"]
    assert plan.device["pool"] == sizes["pool"]
    assert plan.device.get("pooled keys", 0) == sizes["pooled_keys"]
    assert plan.device.get("importance", 0) == sizes["importance"] + sizes["pooled_importance"]
    assert plan.device.get("slot tables", 0) == sizes["table"] + sizes["page_table"]
    model = lively_model(config)
    assert plan.device["weights"] == sum(x.nbytes for x in jax.tree.leaves(model))


def test_importance_is_float32_in_a_16_bit_model():
    model = nosa_jax.cast(lively_model(small_config()), jnp.bfloat16)
    assert parameter_bytes(model.config, jnp.bfloat16) == sum(x.nbytes for x in jax.tree.leaves(model))


@pytest.mark.parametrize("variant", ["nosa", "infllmv2", "dma", "full"])
def test_bytes_of_a_step_follow_the_rows(variant):
    """By hand: blocks of 16 tokens, 8 selected, windows every 4 tokens; two layers of two KV heads of 32, float32."""
    config = small_config().with_attention(variant=variant)
    bias, scored = variant in ("nosa", "dma"), variant in ("nosa", "infllmv2")
    attended = (2 + 8) if variant != "full" else (2 + 20)  # blocks of rows of 20 and 320 tokens
    expected = attended * (2 * 16 * 32 * 4 + 16 * 4 * bias) + ((20 // 4 - 1) + (320 // 4 - 1)) * 32 * 4 * scored
    moved = step_bytes(config, [20, 320], dtype=jnp.float32, fetched=1.5, offloaded=True)
    assert moved.device == parameter_bytes(config, jnp.float32) + 4 * expected  # tied: the input embedding is read
    assert moved.link == 4 * 2 * (1.5 + 1 / 16) * 4096
    assert step_bytes(config, [20, 320], dtype=jnp.float32, fetched=0, offloaded=False).link == 0
    untied = dataclasses.replace(config, tie_embeddings=False)
    moved_untied = step_bytes(untied, [20, 320], dtype=jnp.float32, fetched=1.5, offloaded=True)
    assert moved_untied == moved  # the output's embedding for the input's


def test_rates_are_those_of_the_card_at_hand(monkeypatch):
    assert default_rates() == device.RATES["NVIDIA H200"]  # of an unknown card
    monkeypatch.setattr("nosa_jax.cache.plan.current_device", lambda: device.Device("gpu", "NVIDIA H100 80GB HBM3"))
    jax.devices()
    assert default_rates() == (3.0e12, 55e9)
    plan = nosa_jax.plan(small_config(), 1, 8)
    assert (plan.hbm_bytes_per_second, plan.link_bytes_per_second) == (3.0e12, 55e9)
    assert nosa_jax.plan(small_config(), 1, 8, link_bytes_per_second=1e9).link_bytes_per_second == 1e9


def test_the_released_8b_model():
    """512 MiB of cache per 16K request, 128 MiB of it selected (the paper's own figures)."""
    plan = nosa_jax.plan(presets.nosa_8b(), 1, 16384, CacheConfig(slots=64))
    assert plan.host_bytes == 512 * 2**20
    assert plan.device["pool"] == 128 * 2**20
    assert plan.block_bytes == 32 * 2**10
    assert plan.device["weights"] == pytest.approx(16.4e9, rel=0.01)
    assert plan.misses_per_step == pytest.approx(3.58)
    assert "tokens/s" in str(plan) and f"host memory             {plan.host_bytes / 1e9:.3f} GB\n" in str(plan)
    tiny = nosa_jax.plan(presets.tiny(), 1, 512, CacheConfig(slots=8))
    assert f"host memory             {tiny.host_bytes / 1e6:.3f} MB\n" in str(tiny)  # not 0.000 GB
    assert plan.to_dict()["tokens_per_second"] == plan.tokens_per_second


def test_expected_misses_fall_with_slots():
    config = presets.nosa_8b()
    misses = [expected_misses(config, slots) for slots in (64, 72, 80, 96, 128, 256)]
    assert misses == sorted(misses, reverse=True)
    assert misses[2] == pytest.approx(1.20)
    assert misses[4] == misses[5] == pytest.approx(0.71)
    assert expected_misses(config.with_attention(variant="infllmv2"), 64) == pytest.approx(7.1, rel=0.01)


def test_default_slots_and_clamping():
    attention = small_config().attention
    assert CacheConfig().resolve_slots(attention, 100) == 10
    assert CacheConfig().resolve_slots(attention, 4) == 4
    assert CacheConfig(slots=50).resolve_slots(attention, 20) == 20
    assert CacheConfig(offload=False).resolve_slots(attention, 20) is None
    state, _ = nosa_jax.prefill(lively_model(small_config()), random_tokens(1, 20), max_length=30)
    assert state.pool.shape[3] == state.num_blocks == 2
    np.testing.assert_array_equal(state.table.blocks[0, 0, 0], [0, 1])


def test_host_store_and_pool_share_a_laptops_memory(monkeypatch):
    config, cache = small_config(), CacheConfig(slots=500)
    plan = nosa_jax.plan(config, 2, 8000, cache, dtype=jnp.float32)
    assert plan.host_bytes == plan.device["pool"]
    monkeypatch.setattr(memory, "_physical_memory", lambda: plan.host_bytes + plan.device_bytes - 1)
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"memory, less the host store\). Lower batch \(2\)"):
        plan.require_memory(allocated=("weights",))
    monkeypatch.setattr(memory, "_physical_memory", lambda: plan.host_bytes + plan.device_bytes)
    plan.require_memory(allocated=("weights",))
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"Lower batch \(4\)"):
        plan.require_memory(allocated=("weights",), devices=2)
    monkeypatch.setattr(memory, "_physical_memory", lambda: plan.host_bytes - 1)
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"Lower batch \(2\) or max_length [^.]*\.$"):
        plan.require_memory()  # neither slots nor a working set change the store


_SET_LIMIT = """
import os, jax, nosa_jax
nosa_jax.plan(nosa_jax.presets.nosa_8b(), 64, 65536)  # uses no device
nosa_jax.set_host_memory_limit(200)
assert os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "200"
jax.devices()
try:
    nosa_jax.set_host_memory_limit(300)
except RuntimeError as error:
    assert "before JAX first uses a device" in str(error)
    print("refused")
"""


def test_host_memory_limit():
    done = subprocess.run([sys.executable, "-c", _SET_LIMIT], capture_output=True, text=True, timeout=120)
    assert done.stdout == "refused\n", done.stderr
    with pytest.raises(ValueError, match="gib: must be >= 1, got 0"):
        nosa_jax.set_host_memory_limit(0)


def test_weights_count_where_one_memory_is_all(monkeypatch):
    """The machine's memory is not what is free of it: on a CPU the weights take their part."""
    model, tokens = lively_model(small_config()), random_tokens(1, 20)
    plan = nosa_jax.plan(model.config, 1, 24, dtype=jnp.float32, prompt=20)
    limit = plan.host_bytes + plan.device_bytes
    monkeypatch.setattr(memory, "_physical_memory", lambda: limit)
    nosa_jax.prefill(model, tokens, max_length=24)
    monkeypatch.setattr(memory, "_physical_memory", lambda: limit - 1)
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"weights 0\.00"):
        nosa_jax.prefill(model, tokens, max_length=24)


@pytest.mark.parametrize(
    ("call", "record", "entry"),
    [
        ("generate", ["logits"], 2 * 128 * 4),
        ("generate", "block_ids", 2 * 2 * 2 * 8 * 4),
        ("generate", True, 2 * 128 * 4 + 2 * 2 * 2 * 9 * 4),
    ],
)
def test_records_are_part_of_the_check(monkeypatch, call, record, entry):
    """Twice: as they are written, one entry per step first, and as they are returned."""
    model, tokens, new = lively_model(small_config()), random_tokens(2, 20), 4
    plan = nosa_jax.plan(model.config, 2, 20 + new, dtype=jnp.float32, prompt=20)
    limit = plan.host_bytes + plan.device_bytes + 2 * new * entry
    monkeypatch.setattr(memory, "_physical_memory", lambda: limit)
    traced = lambda: jax.eval_shape(lambda: getattr(nosa_jax, call)(model, tokens, max_new_tokens=new, record=record))
    traced()
    monkeypatch.setattr(memory, "_physical_memory", lambda: limit - 1)
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"record less\. .*records 0\.00"):
        traced()


def test_configurations_hold_numbers_of_python(without_type_checker):
    """However they are given: a configuration is hashed, compared and written as JSON."""
    config = small_config()
    numbers = {
        field.name: np.int64(value) if type(value) is int else np.float64(value) if type(value) is float else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }
    attention = dataclasses.replace(config.attention, block_size=np.int32(16), num_sink_blocks=jnp.int32(1))
    again = dataclasses.replace(config, **numbers | {"attention": attention, "tie_embeddings": np.True_})
    assert again == config and repr(again) == repr(config)
    rope = nosa_jax.RopeConfig(
        np.float32(10000), "longrope", [1, 2.0], np.array([1.0, 2.0]), np.int64(64), attention_factor=np.float64(1.5)
    )
    assert rope == nosa_jax.RopeConfig(10000.0, "longrope", (1.0, 2.0), (1.0, 2.0), 64, 1.5)
    assert hash(rope) and "np." not in repr(rope)
    plan = nosa_jax.plan(config, np.int64(2), 30.0)
    assert plan == nosa_jax.plan(config, 2, 30) and isinstance(plan.max_length, int)


def test_rows_without_number_are_planned_at_once():
    plan = nosa_jax.plan(presets.nosa_8b(), 10**9, 10**6)
    assert plan.batch == 10**9 and plan.reading.rows == nosa_jax.plan(presets.nosa_8b(), 100, 10**6).reading.rows


def test_a_policy_that_has_room_for_all_units_fetches_none():
    config, policy = presets.nosa_8b(variant="full"), baselines.ShadowKV()
    short, long = (nosa_jax.plan(config, 1, n, CacheConfig(policy=policy)).misses_per_step for n in (3072, 8192))
    assert short == 0 and long == pytest.approx(policy.fetch_share * 384)
