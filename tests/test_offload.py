"""The offloaded cache is invisible in the results, and does what it promises to memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import LENGTHS, NEW, OFFLOADED, but_slow, lively_model, random_tokens, small_config, step

import nosa_jax
from nosa_jax import CacheConfig
from nosa_jax.attention.dense import dense_attention_in_cache
from nosa_jax.cache import host_store, state
from nosa_jax.decode import run_step
from nosa_jax.locality import replay_misses
from pallas_kernels.block_attention.reference import block_attention_ref

J = 8
M = -(-(300 + NEW) // 16)


@pytest.fixture(scope="module")
def on_device(model, tokens):
    cache = CacheConfig(offload=False)
    return nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=NEW, cache=cache, record=True)


@pytest.fixture
def poisoned(monkeypatch):
    """NaN in every slot and host block that nothing was written to."""
    empty_state = state.empty_state

    def allocate(shape, dtype):
        return jax.device_put(jnp.full(shape, jnp.nan, dtype), jax.memory.Space.Host)

    calls = []

    def poisoned_state(*args):
        calls.append(args)
        empty = empty_state(*args)
        return dataclasses.replace(empty, pool=jnp.full_like(empty.pool, jnp.nan))

    monkeypatch.setattr(host_store, "allocate", allocate)
    monkeypatch.setattr("nosa_jax.decode.prompt.empty_state", poisoned_state)
    yield
    assert calls  # or a program compiled without the poison was found


@pytest.mark.parametrize("slots", but_slow((J, J + 1, M), J + 1, M))  # test_bits takes more
def test_bit_identical_for_any_number_of_slots(model, tokens, on_device, poisoned, slots):
    cache = CacheConfig(offload=True, slots=slots)
    gen = nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=NEW, cache=cache, record=True)
    np.testing.assert_array_equal(gen.logits, on_device.logits)
    np.testing.assert_array_equal(gen.tokens, on_device.tokens)
    np.testing.assert_array_equal(gen.block_ids, on_device.block_ids)
    assert np.isfinite(gen.logits).all()
    # What crossed is what an LRU of that size would have missed.
    positions = LENGTHS[:, None, None] - 1 + np.arange(NEW)
    predicted = replay_misses(np.asarray(gen.block_ids), positions, model.config.attention, min(slots, M))
    np.testing.assert_array_equal(gen.fetched, predicted)
    if slots == M:  # nothing is ever evicted: only blocks that the prompt's end did not select come, once
        assert (np.asarray(gen.fetched).sum(-1) <= M - J).all()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["infllmv2", "dma"])
def test_bit_identical_for_the_rivals(tokens, variant):
    model = lively_model(small_config().with_attention(variant=variant))
    runs = [
        nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=NEW, cache=cache, record=True)
        for cache in (CacheConfig(offload=False), CacheConfig(slots=J))
    ]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)


def test_full_attention_stays_on_the_device(tokens):
    model = lively_model(small_config().with_attention(variant="full"))
    running, _ = nosa_jax.prefill(model, tokens, LENGTHS, max_length=320)
    assert running.host is None
    assert running.table is None


@pytest.mark.parametrize("fresh", [True, False])
def test_dense_attention_of_new_rows_needs_no_cache(fresh):
    """The same of the new tokens alone as of the whole cache, whose unwritten memory may hold NaN."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 20, 4, 16), *[(2, 2, 20, 16)] * 2))
    lengths = np.array([[20], [7]])
    positions = jnp.asarray(np.where(np.arange(20) < lengths, np.arange(20), -1), jnp.int32)
    written = (positions >= 0)[:, None, :, None]
    cached = tuple(
        jnp.concatenate([jnp.where(written, x, jnp.nan), jnp.full((2, 2, 12, 16), jnp.nan)], 2) for x in (k, v)
    )
    out = dense_attention_in_cache(q, (k, v), cached, positions, 16, fresh=fresh)
    expected, _ = block_attention_ref(q, *cached, None, None, positions, block_size=16)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    if fresh:  # and it looks at nothing else
        nothing = tuple(jnp.full_like(x, jnp.nan) for x in cached)
        np.testing.assert_array_equal(dense_attention_in_cache(q, (k, v), nothing, positions, 16, fresh=True), out)


@pytest.fixture(scope="module")
def running(model, tokens):
    """A running batch with the cache offloaded, and the first token to feed."""
    running, logits = nosa_jax.prefill(model, tokens, LENGTHS, max_length=300 + NEW, cache=OFFLOADED)
    return running, jnp.argmax(logits, -1).astype(jnp.int32)


def test_memory_kinds(running):
    state, _ = running
    assert state.host.sharding.memory_kind == "pinned_host"
    assert state.pool.sharding.memory_kind != "pinned_host"


@pytest.mark.slow
def test_host_store_holds_the_blocks_of_the_on_device_cache(model, tokens):
    """Every full block lies in the host store, written back once it filled up, as the on-device cache has it."""
    feed = random_tokens(40, 3, seed=9)
    ends = []
    for cache in (CacheConfig(offload=False), OFFLOADED):
        running, _ = nosa_jax.prefill(model, tokens, LENGTHS, max_length=300 + NEW, cache=cache)
        for token in feed:
            running, _ = step(model, running, token)
        ends.append(running)
    whole, offloaded = ends
    np.testing.assert_array_equal(offloaded.lengths, LENGTHS + 40)
    host, pages = np.asarray(offloaded.host), np.asarray(offloaded.page_table)
    for row, length in enumerate(LENGTHS + 40):
        full = length // 16
        np.testing.assert_array_equal(
            host[:, pages[row, :full]], np.moveaxis(np.asarray(whole.pool)[:, row, :, :full], 2, 1)
        )
    # And each resident full block is a copy of its host block.
    for index in np.argwhere(np.asarray(offloaded.table.blocks) >= 0):
        layer, row, head, slot = index
        block = int(offloaded.table.blocks[tuple(index)])
        if block < (LENGTHS[row] + 40) // 16:
            np.testing.assert_array_equal(
                np.asarray(offloaded.pool)[layer, row, head, slot], host[layer, pages[row, block], head]
            )


def test_slots_hold_the_last_selection_after_prefill(on_device, running):
    state, _ = running
    np.testing.assert_array_equal(state.table.blocks[..., :J], on_device.block_ids[..., 0, :])
    assert (np.asarray(state.table.blocks[..., J:]) == -1).all()


def test_inactive_rows_stay_as_they_are(model, running):
    """A row that stopped changes nothing of its state but keeps the batch going."""
    state, token = running
    active = jnp.array([True, False, True])
    after, _ = run_step(model, state, token, active)
    np.testing.assert_array_equal(after.lengths, state.lengths + active)

    def row(x):
        return np.asarray(x)[:, 1]

    pages = np.asarray(state.page_table)[1]
    np.testing.assert_array_equal(np.asarray(after.host)[:, pages], np.asarray(state.host)[:, pages])
    before_leaves, after_leaves = (
        [s.pool, *s.table, *s.pooled_keys, s.importance, *s.pooled_importance] for s in (state, after)
    )
    for x, y in zip(before_leaves, after_leaves, strict=True):
        np.testing.assert_array_equal(row(x), row(y))


def test_a_row_at_max_length_stays_as_it_is_under_jit(model, running):
    state, token = running
    full = dataclasses.replace(state, lengths=state.lengths.at[1].set(state.max_length))
    after, _ = step(model, full, token)
    np.testing.assert_array_equal(after.lengths, full.lengths + jnp.array([1, 0, 1]))
    np.testing.assert_array_equal(after.pool[:, 1], full.pool[:, 1])


def test_logits_that_must_not_be_gone_on_from_are_nan(model, running):
    """Of a row that is full, and of ids out of the vocabulary, where values cannot be looked at."""
    state, token = running
    full = dataclasses.replace(state, lengths=state.lengths.at[1].set(state.max_length))
    assert np.isnan(step(model, full, token)[1]).all(-1).tolist() == [False, True, False]
    wrong = token.at[0].set(-1).at[2].set(model.config.vocab_size)
    assert np.isnan(step(model, state, wrong)[1]).all(-1).tolist() == [True, False, True]


def test_step_makes_no_hidden_transfers(model, running):
    state, token = running
    step(model, state, token)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(model, state, token))


def test_the_loop_compiles_once(model, running):
    state, token = running
    step(model, state, token)
    compiled = step._cache_size()
    for _ in range(4):
        state, logits = step(model, state, token)
        token = jnp.argmax(logits, -1).astype(jnp.int32)
    assert step._cache_size() == compiled


@pytest.mark.parametrize("function", ["prefill", "extend", "decode_step", "generate"])
def test_entry_points_can_be_jitted_by_the_user(model, tokens, running, function):
    state, token = running
    calls = {
        "prefill": lambda model, tokens: nosa_jax.prefill(model, tokens, LENGTHS, max_length=320)[1],
        "extend": lambda model, tokens: nosa_jax.extend(model, state, tokens[:, :5])[1],
        "decode_step": lambda model, tokens: nosa_jax.decode_step(model, state, token)[1],
        "generate": lambda model, tokens: nosa_jax.generate(model, tokens, LENGTHS, max_new_tokens=3).tokens,
    }
    lowered = jax.jit(calls[function]).lower(model, tokens)
    assert lowered.out_info.shape == (3, 3 if function == "generate" else 128)
