"""How prompts are read: in groups of rows and chunks of tokens that fit a budget, at widths that programs share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LENGTHS, OFFLOADED, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig, presets
from nosa_jax.cache import host_store, staging
from nosa_jax.cache.state import device_bytes
from nosa_jax.cache.working_set import DEFAULT_BYTES, Limits, Reading, plan_reading, rounded
from nosa_jax.decode import widths
from pallas_kernels import fetch_blocks

ROOM = 400


def reading(budget, cache):
    """How three rows of 300 tokens are read."""
    return nosa_jax.plan(
        small_config(), 3, ROOM, cache, dtype=jnp.float32, prompt=300, working_set=budget
    ).reading  # fmt: skip


def reading_more(state, width, budget):
    """How so many more tokens are."""
    row_bytes = device_bytes(state) // 3
    limits = Limits(None, budget)
    config = small_config()
    return plan_reading(
        config, 3, width, state.num_blocks, dtype=jnp.float32, row_bytes=row_bytes, fresh=False,
        offloaded=state.host is not None, limits=limits,
    )  # fmt: skip


def budgets(cache):
    """For all rows, two at a time, one at a time, and one in chunks: the smallest that will do."""
    sizes = {}
    for budget in range(6_000_000, 1_000_000, -50_000):
        try:
            found = reading(budget, cache)
        except ValueError:
            break
        sizes[found.rows, found.chunk] = found.bytes
    return sizes


def same_state(one, other):
    """All but what no token has reached, to rounding; where blocks lie and how long rows are, to the bit."""
    np.testing.assert_array_equal(one.lengths, other.lengths)
    if one.table is not None:
        np.testing.assert_array_equal(one.table.blocks, other.table.blocks)
        np.testing.assert_array_equal(one.table.last_used, other.table.last_used)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for row, length in enumerate(np.asarray(one.lengths)):
        full = length // one.block_size
        if one.host is None:
            close(one.pool[:, row, :, :full], other.pool[:, row, :, :full])
        else:
            pages = np.asarray(one.page_table)[row, :full]
            close(np.asarray(one.host)[:, pages], np.asarray(other.host)[:, pages])
        windows = max(0, int(length) // 4 - 1)
        close(one.pooled_keys.pooled[:, row, :, :windows], other.pooled_keys.pooled[:, row, :, :windows])


@pytest.mark.parametrize(
    ("cache", "chunked"),
    [
        (OFFLOADED, False),
        pytest.param(OFFLOADED, True, marks=pytest.mark.slow),
        pytest.param(CacheConfig(offload=False), True, marks=pytest.mark.slow),
    ],
)
def test_groups_and_chunks_read_what_one_pass_reads(model, tokens, cache, chunked):
    """Three rows in twos: the second group begins with a row that is done."""
    found = budgets(cache)
    assert {rows for rows, _ in found} == ({3, 2, 1} if cache.offload else {3, 1})
    read = functools.partial(nosa_jax.prefill, model, tokens, LENGTHS, max_length=ROOM, cache=cache)
    state, logits = read()
    more, counts = random_tokens(3, 70, seed=8), np.array([70, 0, 33])
    grown, after = nosa_jax.extend(model, state, more, counts)
    budget, for_more, rows = found.get((2, None), found[1, None]), 5_500_000, 2
    if chunked:
        budget, for_more, rows = min(found.values()), 2_000_000, 1
    if not cache.offload:  # a group's copy of its rows is most of it
        for_more, rows = budget + 60_000, 1
    part, of_part = read(working_set=budget)
    np.testing.assert_allclose(of_part, logits, rtol=1e-4, atol=1e-5)
    same_state(part, state)
    assert reading_more(part, 512, for_more).rows == rows
    part, of_part = nosa_jax.extend(model, part, more, counts, working_set=for_more)
    np.testing.assert_allclose(of_part[counts > 0], after[counts > 0], rtol=1e-4, atol=1e-4)
    same_state(part, grown)


@pytest.mark.parametrize("chunk", [None, pytest.param(128, marks=pytest.mark.slow)])
def test_dense_prompts_are_read_as_full_reads_them(model, tokens, chunk):
    """What they leave behind is the variant's: decoding goes on sparse, with what each row's last token selected."""
    rooms = {"max_length": ROOM, "cache": OFFLOADED, "chunk": chunk}
    state, logits = nosa_jax.prefill(model, tokens, LENGTHS, dense=True, **rooms)
    full = nosa_jax.with_attention(model, variant="full")
    _, expected = nosa_jax.prefill(full, tokens, LENGTHS, max_length=ROOM, cache=CacheConfig(offload=False))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    sparse, others = nosa_jax.prefill(model, tokens, LENGTHS, **rooms)
    assert float(jnp.abs(logits - others).max()) > 1e-3
    # The first layer sees the same tokens either way, so it selects the same blocks.
    np.testing.assert_array_equal(state.table.blocks[0], sparse.table.blocks[0])
    _, after = nosa_jax.jit_decode_step(model, state, jnp.zeros(3, jnp.int32))
    assert bool(jnp.isfinite(after).all())


@pytest.mark.slow
def test_what_must_not_be_gone_on_from_is_nan_under_jit(model, tokens):
    """Rows without room for their tokens, and ids out of the vocabulary, read whole or in chunks."""
    state, _ = nosa_jax.prefill(model, tokens[:, :30], max_length=40)
    more = random_tokens(3, 12, seed=8)
    wrong = jnp.asarray(more).at[0, 3].set(-1).at[1, 11].set(1000)
    extend = jax.jit(nosa_jax.extend)
    counts = jnp.array([12, 10, 11])
    grown, logits = extend(model, state, more, counts)
    assert np.isnan(logits).all(-1).tolist() == [True, False, True] and grown.lengths.tolist() == [40, 40, 40]
    assert np.isnan(extend(model, state, wrong, jnp.array([10, 10, 3]))[1]).all(-1).tolist() == [True, False, False]
    expected = nosa_jax.extend(model, state, more[:, :10], np.array([10, 10, 10]))[1]
    np.testing.assert_allclose(logits[1], expected[1], rtol=1e-4, atol=1e-5)
    prefill = jax.jit(functools.partial(nosa_jax.prefill, max_length=20, chunk=5))
    assert np.isnan(prefill(model, wrong, jnp.array([12, 11, 7]))[1]).all(-1).tolist() == [True, False, False]


def test_tokens_stay_where_they_were_put(model):
    """Padding moves nothing: a call of any width runs where its arguments lie."""
    device = jax.devices()[-1]
    for width in (32, 37):
        tokens = jax.device_put(random_tokens(1, width), device)
        padded = widths.padded(tokens, 48)
        assert padded.devices() == {device} and padded.committed and padded.shape == (1, 48)
        np.testing.assert_array_equal(padded[:, :width], tokens)


@pytest.mark.slow
def test_short_turns_of_wide_arrays_are_short(model, tokens, monkeypatch):
    """How much is read follows the longest row, not the width of what it stands in."""
    state, _ = nosa_jax.prefill(model, tokens[:, :30], max_length=ROOM)
    monkeypatch.setattr(widths, "pieces", lambda width, pieces=widths.pieces: asked.append(width) or pieces(width))
    asked = []
    nosa_jax.extend(model, state, tokens, np.array([3, 0, 5]))
    assert asked == [5]


def test_in_place_and_beside(model, tokens):
    """`jit_extend` goes on as `extend` does and takes the state with it."""
    state, _ = nosa_jax.prefill(model, tokens, LENGTHS, max_length=ROOM, cache=OFFLOADED)
    more = random_tokens(3, 70, seed=8)
    beside, logits = nosa_jax.extend(model, state, more)
    assert not state.pool.is_deleted()
    in_place, again = nosa_jax.jit_extend(model, state, more)
    assert state.pool.is_deleted() and state.host.is_deleted()
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_array_equal(in_place.lengths, beside.lengths)
    same_state(in_place, beside)


def test_only_blocks_that_filled_up_cross(model, tokens, monkeypatch):
    """What prompt and extension did not fill keeps what the memory held."""
    allocate = lambda shape, dtype: jax.device_put(jnp.full(shape, jnp.nan, dtype), jax.memory.Space.Host)
    monkeypatch.setattr(host_store, "allocate", allocate)
    staged = []  # what crosses for which layer

    def fetch(pool, host, page_table, ids, slots, layer, **options):
        jax.debug.callback(lambda *seen: staged.append(tuple(map(int, seen))), layer, (ids >= 0).sum())
        return fetch_blocks(pool, host, page_table, ids, slots, layer, **options)

    monkeypatch.setattr(staging, "fetch_blocks", fetch)
    room = ROOM + 16  # a program of its own
    state, _ = nosa_jax.prefill(model, tokens, LENGTHS, max_length=room, cache=OFFLOADED)
    for counts in (np.zeros(3, int), np.array([20, 1, 3])):
        if counts.any():
            state, _ = nosa_jax.extend(model, state, random_tokens(3, 20, seed=8), counts)
        untouched = np.isnan(np.asarray(state.host)).all((0, 2, 3, 4, 5))[np.asarray(state.page_table)]
        for row, length in enumerate(LENGTHS + counts):
            assert untouched[row].tolist() == [block >= length // 16 for block in range(room // 16)]
    jax.effects_barrier()
    before = int((LENGTHS // 16).sum())  # every layer is staged once, a layer ahead, and nothing after the last
    assert sorted(staged) == [(0, before), (1, before), (2, 0)]


def test_a_working_set_too_small_for_a_row(model, tokens):
    for call in (
        lambda: nosa_jax.prefill(model, tokens, max_length=ROOM, working_set=1000),
        lambda: nosa_jax.generate(model, tokens, working_set=1000),
        lambda: nosa_jax.plan(model.config, 3, ROOM, working_set=1000),
    ):
        with pytest.raises(ValueError, match=r"^working_set: must hold a chunk of 256 tokens of one row, \d+ bytes"):
            call()
    state, _ = nosa_jax.prefill(model, tokens, max_length=ROOM)
    for call in (nosa_jax.extend, nosa_jax.jit_extend):
        with pytest.raises(ValueError, match=r"^working_set: must hold one row, \d+ bytes, got 1000\."):
            call(model, state, tokens[:, :10], working_set=1000)
    with pytest.raises(ValueError, match=r"^working_set: must be a number of bytes >= 1 or None, got 0"):
        nosa_jax.extend(model, state, tokens[:, :10], working_set=0)


def test_what_an_extension_holds_is_part_of_the_check(model, tokens, monkeypatch):
    state, _ = nosa_jax.prefill(model, tokens, max_length=ROOM, cache=OFFLOADED)
    limit = lambda size: monkeypatch.setattr("nosa_jax.decode.checks.device_limit", lambda: size)
    held = sum(x.nbytes for x in jax.tree.leaves(dataclasses.replace(state, host=None)))
    needed = reading_more(state, 64, None).bytes
    limit(nosa_jax.cache.memory.Limit(needed + held - 1, "for a test"))
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"^extend: .*Lower working_set, or go on in place"):
        nosa_jax.extend(model, state, tokens[:, :10])
    limit(nosa_jax.cache.memory.Limit(needed + held, "for a test"))
    host = nosa_jax.cache.memory.Limit(2 * state.host.nbytes - 1, "here")
    monkeypatch.setattr("nosa_jax.decode.checks.host_limit", lambda: host)
    with pytest.raises(nosa_jax.CacheTooLargeError, match=r"^extend: a copy of the host store .*jit_extend"):
        nosa_jax.extend(model, state, tokens[:, :10])
    limit(nosa_jax.cache.memory.Limit(needed, "for a test"))
    nosa_jax.jit_extend(model, state, tokens[:, :10])


def test_the_working_set_of_many_rows_is_bounded():
    """Of the released model: 1, 16 and 64 rows of 16K, and rows of 128K, which are read in chunks."""
    plans = [nosa_jax.plan(presets.nosa_8b(), rows, 16384) for rows in (1, 16, 64)]
    assert all(plan.device["prefill"] <= DEFAULT_BYTES for plan in plans)
    assert [plan.reading.rows for plan in plans] == [1, 1, 1] and plans[0].reading.chunk is None
    long = nosa_jax.plan(presets.nosa_8b(), 4, 131072)
    assert long.reading.chunk is not None and long.device["prefill"] <= DEFAULT_BYTES
    assert nosa_jax.plan(presets.nosa_8b(), 64, 16384, prompt=512).reading.rows > 2  # a copy of their slots counts
    huge = nosa_jax.plan(presets.nosa_8b(), 1, 2**23)  # more than the default, which only a budget of one's own forbids
    assert huge.reading == Reading(1, 256, huge.device["prefill"]) and huge.device["prefill"] > DEFAULT_BYTES


def test_a_layer_staged_ahead_is_counted():
    """Where rows have blocks in host memory: two copies more of a staged layer, for each row that is read."""
    sizes = functools.partial(plan_reading, small_config(), 3, 300, 25, dtype=jnp.float32, row_bytes=0)
    layer = 3 * 25 * 2 * 2 * 16 * 32 * 4  # rows, blocks, KV heads, keys and values
    for fresh, chunk, more in ((False, None, 2), (False, 100, 2), (True, 100, 2), (True, None, 0)):
        ahead, alone = (sizes(fresh=fresh, offloaded=where, limits=Limits(chunk)) for where in (True, False))
        assert ahead.rows == alone.rows == 3 and ahead.bytes - alone.bytes == more * layer


@given(st.integers(1, 2**20))
def test_widths(count):
    room = rounded(count)
    assert count <= room <= max(count * 9 / 8, count + 15)
    assert rounded(room) == room
    pieces = list(widths.pieces(count))
    assert [begin for begin, _ in pieces] == [sum(size for _, size in pieces[:i]) for i in range(len(pieces))]
    assert sum(size for _, size in pieces) >= count > pieces[-1][0]
    assert {size for _, size in pieces} <= {64, 512, 4096}


def test_few_widths():
    assert len({rounded(count) for count in range(1024, 2048)}) <= 9
    assert {size for count in range(1, 4096) for _, size in widths.pieces(count)} == {64, 512}
