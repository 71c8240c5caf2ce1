"""The Triton kernels of a decode step in Pallas' interpreter: values, bits, and what must not be read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig
from pallas_kernels import (
    _backend,
    _inputs,
    append_pooled_keys,
    block_scores,
    decode_attention,
    fetch_blocks,
    update_and_attend,
    write_back_blocks,
)
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.block_scores import cases as score_cases
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.fetch_blocks import cases as fetch_cases
from pallas_kernels.fetch_blocks import reference as fetch_reference

EPS = float(jnp.finfo(jnp.float32).eps)
WILD = np.array([-(2**31), -2, 2**26, 2**31 - 1], np.int32)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


def run(op, inputs, implementation="triton", **static):
    return jax.jit(functools.partial(op, implementation=implementation, **static))(**inputs)


# ---- transport ----


@pytest.mark.parametrize("name", fetch_cases.SMALL)
def test_moves_like_numpy(name):
    inputs = fetch_cases.make_inputs(fetch_cases.SMALL[name], jax.random.key(0))
    ids = np.asarray(inputs["block_ids"]).copy()
    ids[0, 0, 0], ids[-1, -1, -1] = WILD[0], WILD[3]
    inputs["block_ids"] = jnp.asarray(ids)
    plain = on_numpy(inputs)
    np.testing.assert_array_equal(run(fetch_blocks, inputs), fetch_reference.fetch_blocks(**plain))
    host = run(write_back_blocks, inputs)
    assert host.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(host, fetch_reference.write_back_blocks(**plain))


# ---- attention ----


@functools.cache
def made(name):
    return attention_cases.make_inputs(attention_cases.SMALL[name], jax.random.key(4))


def attention_of(name):
    """A copy, with a hole amid the first selection."""
    ids = np.asarray(made(name)["block_ids"]).copy()
    ids[0, 0, 1] = -1
    return made(name) | {"block_ids": jnp.asarray(ids)}


@pytest.mark.parametrize("name", attention_cases.SMALL)
def test_attention(name):
    inputs = attention_of(name)
    expected = np.asarray(attention_reference.decode_attention(**inputs | {"layer": int(inputs["layer"])}))
    out = run(decode_attention, inputs)
    np.testing.assert_allclose(out, expected, rtol=0, atol=16 * EPS * np.abs(expected).max())


def test_attention_ignores_ids_and_slots_out_of_range():
    inputs = attention_of("k2_g4_ragged")
    ids, slots = (np.asarray(inputs[name]) for name in ("block_ids", "slots"))
    pool = jnp.where(jnp.isnan(inputs["pool"]), 1e3, inputs["pool"])  # finite, so that reading it would show

    def widen(array, extra):
        return jnp.asarray(np.concatenate([array, np.broadcast_to(extra, (*array.shape[:2], 8))], axis=-1))

    clean = inputs | {"pool": pool, "block_ids": widen(ids, -1), "slots": widen(slots, -1)}
    wild = clean | {
        "block_ids": widen(ids, [*WILD, 0, 0, 0, 0]),
        "slots": widen(slots, [0, 1, 2, 3, *(-1, -(2**31), 2**31 - 1, pool.shape[3])]),
    }
    np.testing.assert_array_equal(run(decode_attention, wild), run(decode_attention, clean))


def offloaded(name):
    """(inputs with a pool in which blocks are stale, the same with all of them in it). One token fills its block."""
    inputs = attention_of(name)
    rng = np.random.default_rng(0)
    pool, ids = inputs["pool"], np.asarray(inputs["block_ids"])
    batch, kv_heads, _ = ids.shape
    size, dim = pool.shape[5:]
    shape = (*pool.shape[:3], int(ids.max()) + 1, *pool.shape[4:])
    host = jax.device_put(jnp.asarray(rng.standard_normal(shape), pool.dtype), jax.memory.Space.Host)
    positions = np.asarray(inputs["positions"]).copy()
    positions[0] = positions[0] // size * size + size - 1
    own = positions[:, None, None] // size
    loads = np.where((rng.random(ids.shape) < 0.3) & (ids != own), ids, -1)
    loads[0, 0, 0] = WILD[3]
    token = {name: jnp.asarray(rng.standard_normal((batch, kv_heads, dim)), pool.dtype) for name in ("k", "v")}
    given = inputs | token | {"positions": jnp.asarray(positions), "host": host, "loads": jnp.asarray(loads)}
    fetched = run(fetch_blocks, {"pool": pool, "host": host, "block_ids": given["loads"], "slots": given["slots"],
                                 "layer": given["layer"]})  # fmt: skip
    return given, given | {"pool": fetched, "host": None, "loads": None}


@pytest.mark.parametrize("name", ["k1_g16", "k2_g4_ragged", "k2_g8_no_bias"])
def test_one_step_of_the_cache_gives_the_bits_of_its_parts(name):
    given, resident = offloaded(name)
    out, pool, host = run(update_and_attend, given)
    # As XLA composes it: the pool and the host store to the bit.
    _, xla_pool, xla_host = run(update_and_attend, given, "xla")
    np.testing.assert_array_equal(pool, xla_pool)
    np.testing.assert_array_equal(host, xla_host)
    assert (np.asarray(host) != np.asarray(given["host"])).any() and host.sharding.memory_kind == "pinned_host"
    # Without a host store, and by attention alone over the resulting pool: the output to the bit.
    np.testing.assert_array_equal(run(update_and_attend, resident)[0], out)
    alone = {name: given[name] for name in ("q", "bias", "slots", "block_ids", "positions", "layer")}
    np.testing.assert_array_equal(run(decode_attention, alone | {"pool": pool}), out)
    portable = run(update_and_attend, given, zero_copy=False)
    for ours, other in zip((out, pool, host), portable, strict=True):
        np.testing.assert_array_equal(ours, other)


# ---- what the selection reads ----


@pytest.mark.parametrize("dim, dtype", [(64, "bfloat16"), (1, "float32")])
def test_appending_one_token_at_a_time(dim, dtype):
    """To the bit as XLA; a row that starts later, one without a token every other step, windows beyond the cache."""
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 50, dim)), dtype)

    def state(implementation):
        pooled, sums = jnp.zeros((2, 3, 2, 9, dim), dtype), jnp.zeros((2, 3, 2, 2, dim), jnp.float32)
        append = jax.jit(functools.partial(append_pooled_keys, stride=4, implementation=implementation))
        start, layer = jnp.array([0, 3, 0], jnp.int32), jnp.int32(1)
        for step in range(tokens.shape[2]):
            count = jnp.array([1, 1, step % 2], jnp.int32)
            pooled, sums = append(pooled, sums, tokens[:, :, step : step + 1], start, count, layer)
            start += count
        return pooled, sums

    for ours, xla in zip(state("triton"), state("xla"), strict=True):
        assert (np.asarray(xla[1]) != 0).any()
        np.testing.assert_array_equal(ours, xla)


@pytest.mark.parametrize("group, lengths", [(1, (1100, 63)), (4, (205, 100, 5)), (16, (1100, 63))])
def test_scores_of_one_query(group, lengths):
    """From the second layer of a cache: every row at its own length, NaN in the other layer and in later windows."""
    case = _inputs.small(2, group, 64, *((length,) for length in lengths), queries=1)
    inputs = score_cases.make_inputs(case, jax.random.key(0))
    positions = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    pooled, options = inputs["pooled_keys"], score_cases.options(case)
    expected = np.asarray(block_scores(inputs["q"], pooled, positions, implementation="xla", **options))
    window = jnp.arange(pooled.shape[2]) * case.stride + 2 * case.stride - 1
    poisoned = jnp.where((window <= positions)[:, None, :, None], pooled, jnp.nan)
    cache = jnp.stack([jnp.full_like(pooled, jnp.nan), poisoned])
    given = {"q": inputs["q"], "pooled_keys": cache, "positions": positions, "layer": jnp.int32(1)}
    ours = np.asarray(run(block_scores, given, **options))
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
    real = np.isfinite(expected)
    np.testing.assert_allclose(ours[real], expected[real], rtol=2e-5, atol=1e-7)


# ---- the whole step ----


def test_offloaded_decoding_is_bit_identical():
    """Every kernel of a step at once, against the same step with the whole cache on the device."""
    model = lively_model(small_config())
    tokens, lengths = random_tokens(2, 150, seed=2), np.array([150, 79])

    def logits(cache):
        step = jax.jit(lambda *arguments: nosa_jax.decode_step(*arguments))
        state, logits = nosa_jax.prefill(model, tokens, lengths, max_length=200, cache=cache)
        for _ in range(20):
            state, logits = step(model, state, jnp.argmax(logits, -1).astype(jnp.int32))
            yield np.asarray(logits)

    expected = list(logits(CacheConfig(offload=False)))
    np.testing.assert_array_equal(list(logits(CacheConfig(slots=9))), expected)
