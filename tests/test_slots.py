"""The slot table against an LRU written with an OrderedDict."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nosa_jax.cache.slots import empty_table, filled_table, resolve

BATCH, STEPS = 3, 10


@jax.jit
def replay(table, wanted, steps):
    """Resolves `wanted` [steps, BATCH, J] in order; every step's Resolution."""

    def step(table, inputs):
        resolution = resolve(table, *inputs)
        return resolution.table, resolution

    return jax.lax.scan(step, table, (wanted, steps))[1]


class Lru:
    """Resident blocks, least recently used first; blocks of one step by ascending id."""

    def __init__(self, size):
        self.size, self.blocks = size, OrderedDict()

    def use(self, wanted):
        """The set of blocks that were not resident."""
        missing = set(wanted) - set(self.blocks)
        for block in wanted:
            if block in self.blocks:
                self.blocks.move_to_end(block)  # none of these may be evicted below
        for block in missing:
            if len(self.blocks) == self.size:
                self.blocks.popitem(last=False)
            self.blocks[block] = True
        for block in sorted(wanted):
            self.blocks.move_to_end(block)
        return missing


@st.composite
def runs(draw):
    """(wanted [STEPS, BATCH, J] in any order with -1 anywhere, number of slots)"""
    width, slots = draw(st.sampled_from([(1, 1), (1, 3), (3, 3), (4, 5), (4, 9)]))
    blocks = st.sets(st.integers(0, 2 * width + 3), max_size=width)
    wanted = np.full((STEPS, BATCH, width), -1, np.int32)
    for cell in np.ndindex(STEPS, BATCH):
        chosen = sorted(draw(blocks))
        wanted[cell][: len(chosen)] = chosen
    if draw(st.booleans()):
        wanted = np.random.default_rng(draw(st.integers(0, 99))).permuted(wanted, axis=-1)
    return wanted, slots


@settings(max_examples=60, deadline=None)
@given(runs())
def test_matches_an_ordered_dict(run):
    wanted, slots = run
    # Rows are at positions of their own, as in a batch of unequal prompts.
    steps = np.arange(STEPS, dtype=np.int32)[:, None] + np.array([0, 7, 100], np.int32)
    results = jax.device_get(replay(empty_table((BATCH, slots)), wanted, steps))
    for row in range(BATCH):
        lru = Lru(slots)
        for t in range(STEPS):
            ids = wanted[t, row]
            table, taken = results.table.blocks[t, row], results.slots[t, row]
            missing = lru.use(ids[ids >= 0].tolist())
            resident = table[table >= 0].tolist()

            assert set(ids[results.missing[t, row]].tolist()) == missing
            assert sorted(resident) == sorted(lru.blocks)  # the same evictions, and no block twice
            assert (taken[ids < 0] == -1).all()
            assert not results.missing[t, row][ids < 0].any()
            np.testing.assert_array_equal(table[taken[ids >= 0]], ids[ids >= 0])  # wanted blocks are where it says
            assert (results.table.last_used[t, row][taken[ids >= 0]] == steps[t, row]).all()


@settings(max_examples=15, deadline=None)
@given(runs())
def test_resident_blocks_stay_in_their_slot(run):
    wanted, slots = run
    steps = np.broadcast_to(np.arange(STEPS, dtype=np.int32)[:, None], (STEPS, BATCH))
    results = jax.device_get(replay(empty_table((BATCH, slots)), wanted, steps))
    before = np.concatenate([np.full((1, BATCH, slots), -1), results.table.blocks[:-1]])
    for cell in np.ndindex(STEPS, BATCH):
        changed = set(np.flatnonzero(before[cell] != results.table.blocks[cell]).tolist())
        loaded = set(results.slots[cell][results.missing[cell]].tolist())
        assert changed == loaded


def test_ties_evict_the_lowest_block_id():
    table = filled_table(jnp.array([[3, 5, 8, 9]], jnp.int32), jnp.array([10], jnp.int32), 4)
    result = resolve(table, jnp.array([[5, 20, 21, -1]], jnp.int32), jnp.array([11], jnp.int32))
    np.testing.assert_array_equal(result.table.blocks, [[20, 5, 21, 9]])
    np.testing.assert_array_equal(result.slots, [[1, 0, 2, -1]])
    np.testing.assert_array_equal(result.missing, [[False, True, True, False]])
    np.testing.assert_array_equal(result.table.last_used, [[11, 11, 11, 10]])


def test_empty_slots_go_before_old_blocks():
    table = filled_table(jnp.array([0, 1, -1], jnp.int32), jnp.array(0, jnp.int32), 4)
    result = resolve(table, jnp.array([6, 7, -1], jnp.int32), jnp.array(1, jnp.int32))
    np.testing.assert_array_equal(result.table.blocks, [0, 1, 6, 7])


@pytest.mark.parametrize("slots", [4, 6])
def test_filled_table_is_the_first_resolution(slots):
    wanted = jnp.array([[0, 2, 5, 7], [0, 1, -1, -1]], jnp.int32)
    step = jnp.array([40, 3], jnp.int32)
    resolved = resolve(empty_table((2, slots)), wanted, step).table
    filled = filled_table(wanted, step, slots)
    np.testing.assert_array_equal(filled.blocks, resolved.blocks)
    np.testing.assert_array_equal(filled.last_used, resolved.last_used)


def test_fewer_slots_than_columns_when_all_blocks_fit():
    # A short sequence: J = 4 but only 2 blocks exist, and the pool is clamped to them.
    table = filled_table(jnp.array([0, 1, -1, -1], jnp.int32), jnp.array(5, jnp.int32), 2)
    np.testing.assert_array_equal(table.blocks, [0, 1])
    result = resolve(table, jnp.array([0, 1, -1, -1], jnp.int32), jnp.array(6, jnp.int32))
    np.testing.assert_array_equal(result.slots, [0, 1, -1, -1])
    assert not result.missing.any()
