"""Pools and histories against brute force: the offline optimum, distances of reuse, working sets."""

from __future__ import annotations

import itertools

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nosa_jax import locality
from nosa_jax.config import AttentionConfig

P, J = 4, 4
ATTENTION = AttentionConfig(
    block_size=P,
    pooling_window=4,
    pooling_stride=2,
    num_selected_blocks=J,
    num_sink_blocks=0,
    num_local_blocks=2,
    num_query_blocks=1,
)
SEEDS = st.integers(0, 2**32 - 1)


def traces(seed: int, lanes: int, steps: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [lanes, steps, J] and positions [lanes, steps] of rows that read: the own block and some others, often those
    of the step before; rows stop at different steps."""
    rng = np.random.default_rng(seed)
    ids = np.full((lanes, steps, J), -1, np.int32)
    positions = np.full((lanes, steps), -1, np.int32)
    for lane in range(lanes):
        before: set[int] = set()
        for step in range(int(rng.integers(2, steps + 1))):
            own = (first + step) // P
            keep = [block for block in before if block < own and rng.random() < 0.6]
            fresh = rng.permutation(own)[: rng.integers(0, J)].tolist()
            chosen = {own, *list(dict.fromkeys([*keep, *fresh]))[: J - 1]}
            ids[lane, step, : len(chosen)] = sorted(chosen)
            positions[lane, step], before = first + step, chosen
    return ids, positions


def fewest(ids: np.ndarray, positions: np.ndarray, slots: int) -> int:
    """The least number of fetches after the first step, by trying whatever a pool could keep at every step."""
    costs = {frozenset(ids[0][ids[0] >= 0].tolist()): 0}
    for wanted, position in zip(ids[1:], positions[1:], strict=True):
        wanted = set(wanted[wanted >= 0].tolist())
        if not wanted:
            break
        after: dict[frozenset[int], int] = {}
        for pool, cost in costs.items():
            missing = wanted - pool
            if position % P == 0:
                missing -= {position // P}
            others = sorted(pool - wanted)
            room = min(slots - len(wanted), len(others))
            for kept in itertools.combinations(others, room):
                key = frozenset(wanted | set(kept))
                after[key] = min(after.get(key, 10**9), cost + len(missing))
        costs = after
    return min(costs.values())


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(J, 7), st.integers(0, 30))
def test_belady_is_the_best_that_any_pool_could_do(seed, slots, first):
    ids, positions = traces(seed, 2, 12, first)
    misses = locality.belady_misses(ids, positions, ATTENTION, slots)
    assert misses.shape == (2, 12) and misses.dtype == np.int32
    assert misses.sum(1).tolist() == [fewest(*row, slots) for row in zip(ids, positions, strict=True)]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([4, 7]), st.integers(0, 60))
def test_least_recently_used_is_never_better_and_its_distances_tell_all_pools(seed, slots, first):
    ids, positions = traces(seed, 6, 40, first)
    ids, positions = ids.reshape(3, 2, 40, J), positions.reshape(3, 2, 40)
    lru = np.asarray(locality.replay_misses(ids, positions, ATTENTION, slots))
    best = locality.belady_misses(ids, positions, ATTENTION, slots)
    assert (best.sum(-1) <= lru.sum(-1)).all()
    all_of_it = 25  # nobody has to leave
    pools = [
        misses(ids, positions, ATTENTION, all_of_it) for misses in (locality.belady_misses, locality.replay_misses)
    ]
    np.testing.assert_array_equal(*pools)
    distance = locality.reuse_distance(ids)
    starts = (positions % P == 0)[..., None] & (ids == positions[..., None] // P)
    absent = (ids >= 0) & ~starts & ((distance < 0) | (distance >= slots))
    np.testing.assert_array_equal(absent.sum(-1)[..., 1:], lru[..., 1:])


def test_belady_by_hand():
    # Three slots hold one selection and no more: what is new is fetched.
    ids = np.array([[0, 1, 3], [1, 2, 3], [0, 2, 3], [0, 1, 3]], np.int32)
    assert locality.belady_misses(ids, 12, ATTENTION, 3).tolist() == [0, 1, 1, 1]
    assert locality.belady_misses(ids, 12, ATTENTION, 4).tolist() == [0, 1, 0, 0]
    # Four slots: 1, which nobody wants again, leaves for 3, where recency gives up 0, which comes back at once.
    ids = np.array([[0, 1, 4], [1, 2, 4], [2, 3, 4], [0, 3, 4], [0, 2, 4]], np.int32)
    assert locality.belady_misses(ids, 17, ATTENTION, 4).tolist() == [0, 1, 1, 0, 0]
    assert locality.replay_misses(ids, 17, ATTENTION, 4).tolist() == [0, 1, 1, 1, 0]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 7))
def test_histories_match_sets(seed, window):
    ids, _ = traces(seed, 2, 14, 9)
    since, sizes = locality.reuse_time(ids), locality.working_set(ids, window)
    for lane, row in enumerate(ids.tolist()):
        sets = [set(step) - {-1} for step in row]
        for step, chosen in enumerate(sets):
            union = set().union(*sets[max(0, step - window + 1) : step + 1])
            assert sizes[lane, step] == (len(union) if chosen else 0)
            for place, block in enumerate(row[step]):
                before = [step - t for t in range(step) if block in sets[t]]
                assert since[lane, step, place] == (min(before) if before and block >= 0 else 0)


def test_reuse_distance_by_hand():
    ids = np.array([[0, 1, 2], [1, 2, 3], [0, 3, -1], [2, 3, -1]], np.int32)
    # At the third step 3, 2 and 1 were used after 0; of those of one step the highest id is the most recent.
    expected = [[-1, -1, -1], [1, 0, -1], [3, 0, -1], [2, 0, -1]]
    assert locality.reuse_distance(ids).tolist() == expected
    assert locality.reuse_time(ids).tolist() == [[0, 0, 0], [1, 1, 0], [2, 1, 0], [2, 1, 0]]


def test_how_far_and_how_much_a_query_reads():
    ids = np.array([[0, 2, 5, -1], [0, 4, 5, 6], [-1, -1, -1, -1]], np.int32)
    positions = np.array([22, 24, -1], np.int32)  # the third token of block 5, the first one of block 6
    assert locality.attended_distance(ids, positions, ATTENTION).tolist() == [[5, 3, 0, -1], [6, 2, 1, 0], [-1] * 4]
    assert locality.attended_tokens(ids, positions, ATTENTION).tolist() == [4 + 4 + 3, 4 + 4 + 4 + 1, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ids: locality.belady_misses(ids, 0, ATTENTION, 3), ValueError, "slots: must hold one selection, J = 4"),
        (lambda ids: locality.belady_misses(ids + 2, 0, ATTENTION, 4), ValueError, "must not name blocks behind"),
        (lambda ids: locality.working_set(ids, 0), ValueError, "window: must be >= 1"),
        (lambda ids: locality.reuse_time(ids[0]), ValueError, r"block_ids: must have shape \[..., T, J\]"),
    ],
)
def test_errors(call, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=message):
        call(np.zeros((3, 4), np.int32))
