"""Pages of the host store: what rows may grow to, which pages they have, and that it is invisible in the results."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import LENGTHS, NEW, OFFLOADED, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig
from nosa_jax.cache.pages import Pages, Rooms, page_table_of, rooms_of
from nosa_jax.cache.state import empty_state, with_pages

ROOM = 300 + NEW  # as in other files, which then share the programs of prefill and step
P, M = 16, 22  # tokens of a block, blocks of a row
STORE = 3 * M  # pages, as three rows have them that may all grow to ROOM
LIMITS = np.array([ROOM, 138, 9], np.int32)  # 22, 9 and 1 pages; two rows are full after some of the steps
FEED = random_tokens(13, 3, seed=6)


@functools.cache
def _made():
    """The program that makes three empty rows."""
    return jax.jit(lambda rooms: empty_state(small_config(), 3, ROOM, OFFLOADED, jnp.float32, rooms, STORE))


def empty(limits, table):
    """Empty rows, with NaN where nothing was written."""
    state = _made()(Rooms(jnp.asarray(limits, jnp.int32), jnp.asarray(table, jnp.int32)))
    host = jax.device_put(jnp.full(state.host.shape, jnp.nan), jax.memory.Space.Host)
    return dataclasses.replace(state, host=host, pool=jnp.full_like(state.pool, jnp.nan))


def own(limits=(ROOM,) * 3):
    """Empty rows with pages in their order, for every block."""
    return empty(limits, np.arange(STORE).reshape(3, M))


def read(model, state, tokens, lengths):
    """Rows with the first tokens of each, in pieces that share a program."""
    for begin in range(0, max(lengths), 64):
        part = tokens[:, begin : begin + 64]
        state, _ = nosa_jax.jit_extend(model, state, part, np.clip(lengths - begin, 0, part.shape[1]))
    return state


def steps(model, state, feed=FEED):
    """The logits of each step [n, 3, V], and the state after them."""
    found = []
    for token in feed:
        state, logits = nosa_jax.jit_decode_step(model, state, jnp.asarray(token))
        found.append(np.asarray(logits))
    return np.stack(found), state


@pytest.fixture(scope="module")
def expected(model, tokens):
    """The logits of all steps after the prompts, and the state after them."""
    return steps(model, read(model, own(), tokens, LENGTHS))


def until_full(logits):
    """Logits [n, 3, V] of steps after prompts of LENGTHS, with NaN where a row was full by LIMITS."""
    length = LENGTHS + np.arange(1, 1 + len(logits))[:, None]
    return np.where((length <= LIMITS)[..., None], logits, np.nan)


@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1), ragged=st.booleans())
def test_any_pages_give_the_bits_of_own_pages(model, tokens, expected, seed, ragged):
    """Any order of them, and rows that have only what their limits need of a store with more."""
    pages = np.random.default_rng(seed).permutation(STORE)
    limits = LIMITS if ragged else np.full(3, ROOM)
    counts = -(-limits // P)
    table = page_table_of(np.split(pages[: counts.sum()], counts.cumsum()[:-1]), M)
    logits, state = steps(model, read(model, empty(limits, table), tokens, LENGTHS))
    np.testing.assert_array_equal(logits, until_full(expected[0]) if ragged else expected[0])
    np.testing.assert_array_equal(state.lengths, np.minimum(LENGTHS + len(FEED), limits))


def test_limits_per_row_take_the_pages_that_they_need(model, tokens):
    """And they compute what one limit for all computes."""
    of_all, first = nosa_jax.prefill(model, tokens, LENGTHS, max_length=ROOM, cache=OFFLOADED)
    for limits in (LIMITS.tolist(), jnp.asarray(LIMITS)):
        state, logits = nosa_jax.prefill(model, tokens, LENGTHS, max_length=limits, cache=OFFLOADED)
        np.testing.assert_array_equal(logits, first)
    assert state.host.shape[1] == 22 + 9 + 1 and of_all.host.shape[1] == STORE
    np.testing.assert_array_equal(state.limits, LIMITS)
    assert of_all.limits.tolist() == [ROOM] * 3 and state.max_length == of_all.max_length == ROOM
    np.testing.assert_array_equal(state.page_table, page_table_of(Pages(32).give([22, 9, 1]), M))
    plans = [nosa_jax.plan(model.config, 3, limit, OFFLOADED, dtype=jnp.float32) for limit in (ROOM, LIMITS)]
    assert [(plan.pages, plan.host_bytes) for plan in plans] == [(STORE, of_all.host.nbytes), (32, state.host.nbytes)]
    assert plans[0].device == plans[1].device and plans[1].hbm_bytes_per_token < plans[0].hbm_bytes_per_token
    assert "3 x at most 350 tokens" in str(plans[1]) and "3 x 350 tokens" in str(plans[0])
    for row, length in enumerate(LENGTHS):
        ours, theirs = (np.asarray(x.host)[:, np.asarray(x.page_table)[row, : length // P]] for x in (state, of_all))
        np.testing.assert_array_equal(ours, theirs)


def test_limits_per_row_must_be_known_under_jit(model, tokens):
    prefill = lambda limits: nosa_jax.prefill(model, tokens, LENGTHS, max_length=limits, cache=OFFLOADED)
    assert jax.eval_shape(lambda: prefill(LIMITS))[0].host.shape[1] == 32
    for traced in (lambda x: prefill(x), lambda x: prefill([x[0], 138, 9])):
        with pytest.raises(TypeError, match=r"^max_length: one per row must be known where jax\.jit traces, .*one int"):
            jax.eval_shape(traced, LIMITS)


def test_a_refilled_row_is_a_fresh_row(model, tokens, expected):
    """A batch goes on while one of its rows is emptied, moved to other pages and filled with another prompt."""

    def running():
        pages = Pages(STORE)
        rows = pages.give([M] * 3)
        other = np.where(np.arange(3)[:, None] == 1, random_tokens(300, seed=8), tokens)
        state = read(model, empty([ROOM] * 3, page_table_of(rows, M)), other, np.array([300, 210, 1]))
        return steps(model, state, FEED[:1])[1], rows[1], pages

    state, old, pages = running()
    pages.take_back(old)
    (ids,) = pages.give([9])
    assert set(ids) <= set(old)
    state = with_pages(state, 1, ids, 138)
    assert state.lengths.tolist() == [301, 0, 2] and state.limits.tolist() == [ROOM, 138, ROOM]
    assert state.page_table[1].tolist() == [*ids, *[-1] * (M - 9)]
    state = read(model, state, tokens, np.array([0, 128, 0]))
    ours, state = steps(model, state)
    logits, fresh = expected
    np.testing.assert_array_equal(ours[:, 1], until_full(logits)[:, 1])
    for cache in ("pooled_keys", "pooled_importance"):
        x, y = (getattr(each, cache).pooled[:, 1, :, : 138 // 4 - 1] for each in (state, fresh))
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(ours[:, [0, 2]], steps(model, running()[0])[0][:, [0, 2]])


@pytest.mark.parametrize(
    ("variant", "cache"),
    [("nosa", CacheConfig(offload=False)), ("infllmv2", OFFLOADED), ("dma", OFFLOADED), ("full", CacheConfig())],
)
def test_a_row_of_any_state_can_be_emptied(variant, cache):
    """Traced, too, with what a compiled step of a batch is given; without a host store there are no pages."""
    config = small_config().with_attention(variant=variant)
    state = jax.jit(lambda: empty_state(config, 3, 64, cache, jnp.float32))()
    used = None if state.table is None else jax.tree.map(lambda x: x + 2, state.table)
    state = dataclasses.replace(state, lengths=jnp.full(3, 40, jnp.int32), table=used)
    if state.pooled_importance is not None:
        sums = state.pooled_importance._replace(sums=jnp.ones_like(state.pooled_importance.sums))
        state = dataclasses.replace(state, pooled_importance=sums)
    ids = None if state.host is None else jnp.array([9, 7], jnp.int32)
    for put in (with_pages, jax.jit(with_pages)):
        after = put(state, jnp.int32(2), ids, jnp.int32(20))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert after.lengths.tolist() == [40, 40, 0] and after.limits.tolist() == [64, 64, 20]
        if ids is not None:
            assert after.page_table.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 7, -1, -1]]
            assert all((x[:, 2] == -1).all() and (x[:, :2] == 1).all() for x in after.table)
        if state.pooled_importance is not None:
            np.testing.assert_array_equal(after.pooled_importance.sums[:, 2], 0)
            np.testing.assert_array_equal(after.pooled_importance.sums[:, :2], 1)


def test_a_full_row_is_refused_by_its_own_limit(model, tokens):
    state = dataclasses.replace(own(), lengths=jnp.asarray(LENGTHS, jnp.int32))
    state = with_pages(state, 2, [44, 45], 0)
    with pytest.raises(ValueError, match=r"^tokens: .* row 2 has max_length = 0, got 1 for row 2\. "):
        nosa_jax.decode_step(model, state, FEED[0])
    with pytest.raises(ValueError, match=r"^tokens: .* row 1 has max_length = 350, got 378 for row 1\. "):
        nosa_jax.extend(model, state, tokens, np.array([10, 250, 0]))


def test_devices_have_equal_stores():
    """Every device of a mesh has the pages of the one whose rows need most, and its rows are in its own."""
    rooms, pages = rooms_of(np.array([20, 33, 16, 1, 100, 64], np.int32), P, devices=3)
    assert pages == 11 and rooms.limits.tolist() == [20, 33, 16, 1, 100, 64]
    table = np.asarray(rooms.page_table)
    assert table.shape == (6, 7)
    held = [row[row >= 0].tolist() for row in table]
    assert held == [[0, 1], [2, 3, 4], [11], [12], [22, 23, 24, 25, 26, 27, 28], [29, 30, 31, 32]]


def _states(**changes):
    state = jax.jit(lambda: empty_state(small_config(), 2, 64, OFFLOADED, jnp.float32, pages=10))()
    return dataclasses.replace(state, **changes)


def _pages():
    pages = Pages(6)
    pages.give([4])
    pages.share([1])
    return pages


BAD = {
    "too many pages": (lambda: _pages().give([1, 2]), r"counts: must add up to at most 2, the free pages, got 3\. "),
    "a negative count": (lambda: _pages().give([1, -1]), r"counts: must hold numbers >= 0, got -1\. "),
    "half a page": (lambda: _pages().give([0.5]), r"counts: must hold numbers >= 0, got 0\.5\. "),
    "nobody's page": (lambda: _pages().take_back([0, 5]), r"ids: .* to take back, got page 5\. "),
    "nobody's page to share": (lambda: _pages().share([0, 4]), r"ids: .* to share, got page 4\. "),
    "a page that is not there": (lambda: _pages().take_back([6]), r"ids: .* got page 6 of 6\. "),
    "a negative page": (lambda: _pages().share([-1]), r"ids: must hold numbers >= 0, got -1\. "),
    "more owners than there are": (lambda: _pages().take_back([0, 1, 1, 1]), r"ids: .*, got page 1 3 times, with 2"),
    "owners of no page": (lambda: _pages().owners(6), r"page: must be <= 5, got 6\. "),
    "a negative store": (lambda: Pages(-1), r"total: must be >= 0, got -1\. "),
    "a row wider than its table": (lambda: page_table_of([[0, 1]], 1), r"rows: .* num_blocks = 1 pages, got 2 for row"),
    "a row that is not there": (lambda: with_pages(_states(), 2, [0], 0), r"row: must be <= 1, got 2\. "),
    "no pages": (lambda: with_pages(_states(), 0, None, 0), r"ids: must be the row's pages, got None\. "),
    "more pages than blocks": (lambda: with_pages(_states(), 0, range(5), 0), r"ids: .* at most M = 4 pages, got 5\. "),
    "pages of no store": (lambda: with_pages(_states(), 0, [3, 10], 9), r"ids: .* in \[0, 10\), got 10\. "),
    "a page twice": (lambda: with_pages(_states(), 0, [3, 3], 9), r"ids: must be distinct, got \[3, 3\]\. "),
    "a limit beyond the pages": (lambda: with_pages(_states(), 0, [3, 4], 33), r"limit: must be at most 32, .* got 33"),
    "a negative limit": (lambda: with_pages(_states(), 0, [3, 4], -1), r"limit: must be >= 0, got -1\. "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


_ACTS = st.tuples(st.sampled_from(["give", "share", "take_back"]), st.lists(st.integers(-1, 4), max_size=3))


@given(acts=st.lists(_ACTS, max_size=30))
@example(acts=[("give", [2, 1]), ("share", [0, 0, 1]), ("take_back", [0, 0]), ("take_back", [0, 0]), ("give", [2])])
def test_the_allocator_counts_as_a_dict_does(acts):
    """What is given is free, every page has as many owners as it should, and an error changes nothing."""
    total = 4
    pages, owners = Pages(total), Counter()
    for act, numbers in acts:
        named = Counter(numbers)
        if act == "give":
            right = min(numbers, default=0) >= 0 and sum(numbers) <= total - len(owners)
        else:
            right = all(owners[page] >= (named[page] if act == "take_back" else 1) for page in numbers)
        owners = +owners  # asking made entries
        try:
            given = getattr(pages, act)(numbers)
        except ValueError:
            assert not right
        else:
            assert right
            if act == "give":
                assert [len(ids) for ids in given] == numbers and all(ids.dtype == np.int32 for ids in given)
                named = Counter(int(page) for ids in given for page in ids)
                assert not named.keys() & owners.keys() and set(named.values()) <= {1}
            owners = owners - named if act == "take_back" else owners + named
        assert [pages.owners(page) for page in range(total)] == [owners[page] for page in range(total)]
        owners = +owners
        assert (pages.free, pages.used) == (total - len(owners), len(owners))
