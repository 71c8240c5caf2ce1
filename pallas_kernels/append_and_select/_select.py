"""In a kernel, a program per row and KV head: from the order of blocks to a selection and its slots.

A warp for every 256 blocks, mostly one: every step needs the whole answer of the one before, and threads of one warp
wait for nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _backend, blocks
from pallas_kernels._lists import List
from pallas_kernels.select_blocks.triton import with_ties

_NEVER = jnp.iinfo(jnp.int32).max


class Picks(NamedTuple):
    """num_blocks: of a row. block_size: P. selected: all blocks of a selection. sink, local: forced ones.

    by_query: picked by query score where there are both scores.
    """

    num_blocks: int
    block_size: int
    selected: int
    sink: int
    local: int
    by_query: int


class _Listed(NamedTuple):
    """A selection in parts: sinks before, a window at the end, and what was chosen in between.

    end: of the chosen ones in the list. window: its first block. own: its last one, the query's.
    """

    sinks: Any
    end: Any
    window: Any
    own: Any

    def fixed(self, lane):
        """Which places of the list need no looking up, and what is there."""
        in_window = self.window + lane - self.end
        block = jnp.where(lane < self.sinks, lane, jnp.where(in_window <= self.own, in_window, -1))
        return (lane < self.sinks) | (lane >= self.end), block

    def place(self, block, of_chosen):
        """The place in the list of any block, -1 where it is not selected."""
        in_window = jnp.where(block <= self.own, self.end + block - self.window, -1)
        return jnp.where(block < self.sinks, block, jnp.where(block >= self.window, in_window, of_chosen))


def _counts_from(keys, thresholds):
    """How many keys are at least as large as each of three thresholds."""
    first, second, third = ((keys >= threshold).astype(jnp.int32) for threshold in thresholds)
    if keys.size < 1 << 10:  # one sum for all of them: a sum waits for all warps
        packed = jnp.sum(first + (second << 10) + (third << 20))
        return packed & 1023, (packed >> 10) & 1023, packed >> 20
    packed = jnp.sum(first + (second << 16))
    return packed & 65535, packed >> 16, jnp.sum(third)


def _best(keys, eligible, count):
    """Mask of the `count` largest eligible keys, ties to the lowest index, where one query waits for each count.

    Two bits of the threshold at a time, from the highest in which eligible keys differ.
    """
    keys = jnp.where(eligible, keys, jnp.iinfo(jnp.int32).min)
    least, most = jnp.min(jnp.where(eligible, keys, jnp.iinfo(jnp.int32).max)), jnp.max(keys)
    spread = most - least
    exponent = (jax.lax.bitcast_convert_type(spread.astype(jnp.float32), jnp.int32) >> 23) - 127
    # A spread that does not fit has the highest bit set.
    shift = jnp.where(spread < 0, 30, jnp.maximum(exponent, 0) & ~1)

    def unsettled(state):
        shift, _, found = state
        return (shift >= 0) & (found != count)

    def settle(state):
        shift, start, found = state
        threshold, candidates = start, [start + jnp.left_shift(jnp.int32(digit), shift) for digit in (1, 2, 3)]
        for candidate, above in zip(candidates, _counts_from(keys, candidates), strict=True):
            taken = (above >= count) & (candidate > start)  # counts fall as candidates rise, unless those wrap
            threshold, found = jnp.where(taken, candidate, threshold), jnp.where(taken, above, found)
        return shift - 2, threshold, found

    _, threshold, found = jax.lax.while_loop(unsettled, settle, (shift, least, jnp.int32(-1)))
    return with_ties(keys, threshold, count, found, jnp.int32(jnp.iinfo(jnp.int32).min))


def _choose(query_keys, fill, own, picks, lanes):
    """Mask of the blocks that are chosen by score, and the whole selection.

    Sink and window are taken without looking: only what lies between them has lanes.
    """
    block = jnp.arange(lanes, dtype=jnp.int32)
    sinks = jnp.minimum(picks.sink, own + 1)
    window = jnp.maximum(own + 1 - picks.local, sinks)
    eligible, count = (block >= sinks) & (block < window), picks.selected - sinks - (own + 1 - window)
    chosen = jnp.zeros((lanes,), jnp.bool_)
    if query_keys is not None and fill is not None and picks.by_query > 0:
        chosen = _best(query_keys, eligible, jnp.int32(picks.by_query))
        count -= jnp.sum(chosen, dtype=jnp.int32)
    chosen |= _best(query_keys if fill is None else fill, eligible & ~chosen, count)
    return chosen, _Listed(sinks, sinks + jnp.sum(chosen, dtype=jnp.int32), window, own)


def _slots_of(absent, age, slot):
    """[J]: the slots that the absent blocks are given, in the order in which they leave."""
    rank = _backend.running_count(absent) - 1

    def give(turn, state):
        before, given = state
        oldest = jnp.min(jnp.where(age > before, age, _NEVER))
        leaves = jnp.max(jnp.where((age == oldest) & (age < _NEVER), slot, -1))
        return oldest, jnp.where(absent & (rank == turn), leaves, given)

    none = jnp.int32(jnp.iinfo(jnp.int32).min), jnp.full_like(rank, -1)
    return jax.lax.fori_loop(0, jnp.sum(absent, dtype=jnp.int32), give, none)[1]


def select_kernel(
    layer, positions, query_keys, fill, forced, _table, ids, slots, loads, table, count, places, residents,
    *, lanes, picks,
):  # fmt: skip
    """places [max(lanes, M)], residents [J]: of every block its place in the selection, of every place the slot that
    holds its block already. lanes: how many blocks may be chosen by score, padded. _table: whose memory `table` is.
    """
    head, row = (_backend.program_id(axis) for axis in range(2))
    here, position = (row, head), positions[row]
    own = jnp.minimum(blocks.query_blocks(position, picks.block_size), picks.num_blocks - 1)
    listed_ids = List(ids, here)
    lane, block = listed_ids.lanes(), jnp.arange(lanes, dtype=jnp.int32)
    in_list = lane < picks.selected
    # All is asked for before anything is waited for.
    every_lane = (*here, _backend.ds(0, lanes))
    by_query, by_importance = (None if ref is None else ref[every_lane] for ref in (query_keys, fill))
    if table is not None:
        held, last_used = (List(ref, (_backend.layer_index(layer, ref), *here)) for ref in table)
        slot = held.lanes()
        in_table = slot < table[0].shape[-1]
        block_held, used = held.load(slot, in_table), last_used.load(slot, in_table)
    given, is_given = jnp.full_like(lane, -1), position != position  # none is given
    if forced is not None:
        given = List(forced, (_backend.layer_index(layer, forced), *here)).load(lane, in_list)
        given = jnp.where(given < picks.num_blocks, given, -1)
        is_given = (position >= 0) & (jnp.max(given) >= 0)

    chosen, listed = _choose(by_query, by_importance, own, picks, lanes)
    rank = jnp.where(chosen, listed.sinks + _backend.running_count(chosen) - 1, -1)
    is_fixed, fixed = listed.fixed(lane)
    listed_ids.store(rank, block, chosen)
    listed_ids.store(lane, fixed, is_fixed)
    if table is not None:
        of_block = List(places, here)
        every = of_block.lanes()
        if forced is not None:
            of_block.store(every, jnp.full_like(every, -1), is_given & (every >= 0))
        of_block.store(block, rank, ~is_given & (block >= 0))
        of_place = List(residents, here)
        of_place.store(lane, jnp.full_like(lane, -1), in_list)
    _backend.barrier()
    want = listed_ids.load(lane, in_list)
    if forced is not None:
        want = jnp.where(is_given, given, want)
        if table is not None:
            of_block.store(given, lane, is_given & in_list)
        _backend.barrier()
        listed_ids.store(lane, want, in_list)
    if table is None:
        return

    place = of_block.load(block_held, in_table)
    place = jnp.where(is_given, place, listed.place(block_held, place))
    place = jnp.where((block_held >= 0) & in_table, place, -1)
    of_place.store(place, slot, place >= 0)
    _backend.barrier()
    found = of_place.load(lane, want >= 0)
    absent = (want >= 0) & (found < 0)
    # Who was used longest ago leaves first, empty slots before all others, ties to the lowest block.
    age = jnp.where(block_held < 0, slot - table[0].shape[-1], used * picks.num_blocks + block_held)
    age = jnp.where((place < 0) & in_table, age, _NEVER)
    where = jnp.where(absent, _slots_of(absent, age, slot), found)
    starts_now = (position % picks.block_size == 0) & (want == own)
    List(slots, here).store(lane, where, in_list)
    missing = absent & ~starts_now
    List(loads, here).store(lane, jnp.where(missing, want, -1), in_list)
    count[here] = jnp.sum(missing, dtype=jnp.int32)
    last_used.store(slot, position, place >= 0)
    held.store(where, want, absent)
    last_used.store(where, position, absent)
