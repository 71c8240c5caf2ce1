"""Locality measures against the official model's numbers, brute force, and selections made by hand.

golden/locality.{json,npz} come from runs of the paper's public PyTorch code (thunlp/NOSA at 94d5f75, random weights,
CPU): per case the decode steps' selections `block_ids` [L, B, K, T, J] and, for steps 1 .. T-1, its locality numbers.
"""

import json
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slots import Lru

from nosa_jax import locality
from nosa_jax.config import AttentionConfig

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "locality.json").read_text())
SMALL = {"block_size": 4, "pooling_window": 4, "pooling_stride": 2}
TINY = AttentionConfig(num_selected_blocks=6, num_sink_blocks=1, num_local_blocks=2, num_query_blocks=2, **SMALL)


def golden(name):
    case = CASES[name]
    local = case["window_size"] // case["block_size"] + 1
    attention = AttentionConfig(
        variant=case["variant"],
        block_size=case["block_size"],
        num_selected_blocks=case["topk"],
        num_sink_blocks=case["init_blocks"],
        num_local_blocks=local,
        num_query_blocks=case["select_blocks"] - 1,
    )
    with np.load(GOLDEN / "locality.npz") as arrays:
        numbers = {key.split("/")[1]: arrays[key] for key in arrays.files if key.startswith(name + "/")}
    ids = numbers["block_ids"].astype(np.int32)
    positions = np.array(case["prompt_lengths"], np.int32)[:, None] + np.arange(ids.shape[3], dtype=np.int32)
    return case["summary"], attention, ids, positions, numbers


# --- Reuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_official_numbers_step_by_step(name):
    _, attention, ids, positions, numbers = golden(name)
    rows = positions[:, None]
    for key, ours in (
        ("all", locality.gamma(ids)),
        ("excl", locality.gamma_unforced(ids, rows, attention)),
        ("excl_both", locality.gamma_unforced(ids, rows, attention, both_sides=True)),
    ):
        assert np.isnan(ours[..., 0]).all()
        np.testing.assert_array_equal(ours[..., 1:], numbers[key])
    np.testing.assert_array_equal(locality.new_blocks(ids)[..., 1:], numbers["new_blocks"])


@pytest.mark.parametrize("name", CASES)
def test_official_means(name):
    summary, attention, ids, positions, _ = golden(name)
    for row in range(ids.shape[1]):
        one = slice(row, row + 1)
        report = locality.locality_report(ids[:, one], positions[one], attention, bytes_per_block=1, slots=[8])
        for layer, head in np.ndindex(report.gamma.shape):
            expected = summary[f"s{row}/L{layer}"][head]
            for key, ours in (
                ("overlap_all", report.gamma),
                ("overlap_excl_sink_window", report.gamma_unforced),
                ("new_blocks_per_step", report.new_blocks),
            ):
                number = np.nan if expected[key] is None else expected[key]
                np.testing.assert_allclose(ours[layer, head], number, rtol=1e-6)


def test_by_hand():
    # Blocks of 4 tokens, 1 sink, 2 local; the query moves from block 5 into block 6 at the second step.
    ids = np.array([[0, 2, 4, 5, -1], [0, 3, 4, 5, 6], [-1] * 5], np.int32)
    positions = np.array([23, 24, -1], np.int32)
    np.testing.assert_array_equal(locality.is_forced(ids, positions, TINY), [[1, 0, 1, 1, 0], [1, 0, 0, 1, 1], [0] * 5])
    np.testing.assert_array_equal(locality.counted_steps(ids), [False, True, False])
    np.testing.assert_array_equal(locality.shared_blocks(ids), [0, 3, 0])
    np.testing.assert_array_equal(locality.new_blocks(ids), [0, 2, 0])
    np.testing.assert_array_equal(locality.gamma(ids), np.float32([np.nan, 3 / 5, np.nan]))
    # Unforced at the second step: 3 and 4; block 4 was selected before, but as a local block.
    np.testing.assert_array_equal(locality.gamma_unforced(ids, positions, TINY), np.float32([np.nan, 1 / 2, np.nan]))
    both = locality.gamma_unforced(ids, positions, TINY, both_sides=True)
    np.testing.assert_array_equal(both, np.float32([np.nan, 0, np.nan]))
    assert float(locality.mean_over_steps(locality.gamma(ids))) == np.float32(3 / 5)


def test_first_position_stands_for_all():
    _, attention, ids, positions, _ = golden("g4_red_1500")
    np.testing.assert_array_equal(
        locality.gamma_unforced(ids, 1500, attention), locality.gamma_unforced(ids, positions[:, None], attention)
    )


def test_works_under_jit():
    _, attention, ids, positions, _ = golden("g4_short_200")
    measure = jax.jit(lambda ids, p: (locality.gamma(ids), locality.replay_misses(ids, p, attention, 5)))
    np.testing.assert_array_equal(measure(ids, positions[:, None])[0], locality.gamma(ids))


# --- Replay --------------------------------------------------------------------------------------------------------


def expected_misses(ids, positions, block_size, slots):
    """One row [T, J] with the OrderedDict pool."""
    pool, misses, before = Lru(slots), [], False
    for wanted, position in zip(ids.tolist(), positions.tolist(), strict=True):
        wanted = [block for block in wanted if block >= 0]
        missing = pool.use(wanted)
        if position % block_size == 0:
            missing.discard(position // block_size)
        misses.append(len(missing) if before else 0)
        before = before or bool(wanted)
    return misses


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([6, 7, 9]), st.integers(0, 11))
def test_replay_matches_an_ordered_dict(seed, slots, first):
    rng = np.random.default_rng(seed)
    ids = np.full((2, 2, 12, 6), -1, np.int32)
    positions = first + np.array([[0], [5]]) + np.arange(12)
    ends = rng.integers(0, 13, 2)
    for layer, row, t in np.ndindex(2, 2, 12):
        if t < ends[row]:
            own = positions[row, t] // 4
            others = rng.permutation(own)[: rng.integers(0, 6)]
            ids[layer, row, t, : len(others) + 1] = np.sort([*others, own])
    positions = np.where(np.arange(12) < ends[:, None], positions, -1).astype(np.int32)
    misses = locality.replay_misses(ids, positions, TINY, slots)
    for layer, row in np.ndindex(2, 2):
        assert misses[layer, row].tolist() == expected_misses(ids[layer, row], positions[row], 4, slots)


def test_a_block_that_starts_now_is_not_fetched():
    ids = np.array([[0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 2, 3]], np.int32)
    # Position 12 starts block 3: it takes the slot of block 1, which must come back one step later, then block 0.
    assert locality.replay_misses(ids, 11, TINY, 3).tolist() == [0, 0, 1, 1]
    assert locality.replay_misses(ids, 12, TINY, 3).tolist() == [0, 1, 1, 1]
    assert locality.replay_misses(ids, 11, TINY, 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["g4_red_1500", "infllmv2_g4_red_1500"])
def test_replay_of_official_selections(name):
    _, attention, ids, positions, _ = golden(name)
    few, more = (np.asarray(locality.replay_misses(ids, positions[:, None], attention, slots)) for slots in (8, 12))
    starts = (positions % 64 == 0)[:, None]
    # With exactly J slots in a full selection, the pool is S_(t-1): what is new is fetched, unless it starts now.
    expected = np.asarray(locality.new_blocks(ids)) - starts * (np.arange(ids.shape[3]) > 0)
    np.testing.assert_array_equal(few, expected)
    assert more.sum() < few.sum()


def test_bytes():
    assert locality.block_bytes(AttentionConfig(), head_dim=128) == 32 * 1024
    misses = np.arange(24, dtype=np.int32).reshape(2, 2, 2, 3)
    expected = misses.sum(0).sum(1) * 1000
    np.testing.assert_array_equal(locality.bytes_per_token(misses, 1000), expected)
    huge = np.full((1, 1, 1, 1), 2**20, np.int32)
    assert locality.bytes_per_token(huge, 2**15).tolist() == [[2**35]]


# --- Guarantees ----------------------------------------------------------------------------------------------------


def forced_set(own, attention):
    return {m for m in range(own + 1) if m < attention.num_sink_blocks or m > own - attention.num_local_blocks}


def best(scores, blocks, count):
    return set(sorted(blocks, key=lambda m: (-scores[m], m))[: max(0, count)])


def select(positions, importance, query_scores, attention):
    """Brute force: forced blocks, the best by query score, then by importance; and R_t of every step."""
    budget = attention.num_selected_blocks
    ids, required = np.full((len(positions), budget), -1, np.int32), []
    for t, position in enumerate(positions):
        own = int(position) // attention.block_size
        forced = forced_set(own, attention)
        unforced = set(range(own + 1)) - forced
        room = budget - len(forced)
        by_query = {"nosa": attention.num_query_blocks, "infllmv2": room, "dma": 0}[attention.variant]
        chosen = best(query_scores[t], unforced, by_query)
        chosen |= best(importance, unforced - chosen, room - len(chosen))
        ids[t, : len(forced | chosen)] = sorted(forced | chosen)
        required.append(forced | best(importance, unforced, room - by_query))
    return ids, required


BLOCKS, STEPS = 14, 26
LAYOUTS = [(6, 1, 2, 2), (6, 0, 3, 1), (5, 2, 2, 1), (7, 1, 2, 0)]


@st.composite
def selections(draw):
    """What a configuration is made of, positions, and both scores; the type checker of tests, which draws at random
    itself, is kept out of the drawing."""
    fields = draw(st.sampled_from(["nosa", "infllmv2", "dma"])), *SMALL.values(), *draw(st.sampled_from(LAYOUTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first = draw(st.integers(0, BLOCKS * 4 - STEPS))
    levels = draw(st.sampled_from([2, 4, 1000]))  # few levels: many ties
    importance = rng.integers(0, levels, BLOCKS).astype(np.float32)
    query_scores = rng.integers(0, levels, (STEPS, BLOCKS)).astype(np.float32)
    return fields, np.arange(first, first + STEPS, dtype=np.int32), importance, query_scores


@settings(max_examples=40, deadline=None)
@given(selections(), st.integers(0, 2**32 - 1))
def test_guarantees_hold_for_real_selections_only(case, seed):
    fields, positions, importance, query_scores = case
    attention = AttentionConfig(*fields)
    ids, required = select(positions, importance, query_scores, attention)
    assert np.asarray(locality.holds_required_blocks(ids, positions, importance, attention)).all()
    assert np.asarray(locality.meets_guaranteed_overlap(ids, positions, attention)).all()
    unchanged = np.asarray(locality.unchanged_inside_block(ids, positions, attention))
    sets = [set(row.tolist()) - {-1} for row in ids]
    stays = [t == 0 or positions[t] % 4 == 0 or sets[t] == sets[t - 1] for t in range(STEPS)]
    assert unchanged.tolist() == stays
    assert unchanged.all() or attention.variant != "dma"

    # Swap one block for an unselected one, at any step: wrong exactly where the block was required.
    rng = np.random.default_rng(seed)
    swapped, wrong = ids.copy(), np.zeros(STEPS, bool)
    for t in range(STEPS):
        spare = sorted(set(range(positions[t] // 4 + 1)) - sets[t])
        if spare:
            out = rng.choice(sorted(sets[t]))
            wrong[t] = out in required[t]
            swapped[t] = sorted((sets[t] - {out}) | {rng.choice(spare)})
    checked = np.asarray(locality.holds_required_blocks(swapped, positions, importance, attention))
    np.testing.assert_array_equal(checked, ~wrong)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["nosa", "infllmv2", "dma"]), st.sampled_from(LAYOUTS), st.integers(1, 200))
def test_guaranteed_overlap_is_the_theorem(variant, layout, position):
    attention = AttentionConfig(variant, *SMALL.values(), *layout)
    own = position // 4
    forced = len(forced_set(own, attention))
    unforced = own + 1 - forced
    room = attention.num_selected_blocks - forced
    by_query = {"nosa": attention.num_query_blocks, "infllmv2": room, "dma": 0}[variant]
    size = min(attention.num_selected_blocks, own + 1)
    picked = min(unforced, max(0, room - by_query))
    bound = size - min(by_query, unforced - picked) - (position % 4 == 0)
    assert int(locality.guaranteed_overlap(position, attention)) == bound


def test_guaranteed_overlap_at_released_settings():
    positions = np.array([9999, 64 * 200], np.int32)
    assert locality.guaranteed_overlap(positions, AttentionConfig()).tolist() == [49, 48]
    assert locality.guaranteed_overlap(positions, AttentionConfig(variant="dma")).tolist() == [64, 63]
    assert locality.guaranteed_overlap(positions, AttentionConfig(variant="infllmv2")).tolist() == [18, 17]


def test_checks_see_wrong_sizes_and_future_blocks():
    importance = np.arange(8, dtype=np.float32)
    right = np.array([[0, 1, 2, 3, 4, -1]], np.int32)
    check = lambda ids: locality.holds_required_blocks(np.array(ids, np.int32), 17, importance, TINY).tolist()
    assert check(right) == [True]
    assert check([[0, 1, 3, 4, -1, -1]]) == [False]  # block 2 is visible and there is room
    assert check([[0, 1, 2, 3, 4, 5]]) == [False]  # block 5 lies in the future
    assert check([[0, 1, 2, 4, 4, -1]]) == [False]
    assert check([[0, 1, 2, 3, 4, 99]]) == [False]
    assert check([[-1] * 6]) == [True]


@pytest.mark.parametrize("name", CASES)
def test_official_selections_meet_the_bound(name):
    _, attention, ids, positions, _ = golden(name)
    assert np.asarray(locality.meets_guaranteed_overlap(ids, positions[:, None], attention)).all()


# --- Report --------------------------------------------------------------------------------------------------------


def report(name, **options):
    _, attention, ids, positions, _ = golden(name)
    return locality.locality_report(
        ids, positions, attention, bytes_per_block=locality.block_bytes(attention, 64), **options
    )


def test_report_numbers():
    _, attention, ids, positions, numbers = golden("g4_red_b3_persample")
    measured = report("g4_red_b3_persample", slots=[10, 8])
    assert measured.label == "nosa" and measured.steps == 3 * 39 and list(measured.misses) == [8, 10]
    np.testing.assert_allclose(measured.gamma, numbers["all"].mean((1, 3), dtype=np.float64), rtol=1e-12)
    misses = np.asarray(locality.replay_misses(ids, positions[:, None], attention, 10))
    per_token = locality.bytes_per_token(misses, measured.block_bytes)
    assert measured.bytes_per_token(10) == pytest.approx(per_token[:, 1:].mean())
    # Positions 1501 .. 1539 lie in blocks 23 and 24.
    assert measured.positions.tolist() == [1472, 1536]
    steps = positions[0, 1:] >= 1536
    assert measured.gamma_by_position[1] == pytest.approx(numbers["all"][..., steps].mean(dtype=np.float64))
    best = locality.belady_misses(ids, positions[:, None], attention, 10)
    np.testing.assert_allclose(measured.optimal_misses[10], best[..., 1:].mean((1, 3)), rtol=1e-12)
    assert (measured.optimal_misses[10] <= measured.misses[10]).all() and misses.sum() > best.sum()
    for layer, head in np.ndindex(2, 2):
        since = locality.reuse_time(ids)[layer, :, head]
        assert measured.steps_away[layer, head] == pytest.approx((since[since > 1] - 1).mean())
        far = (positions[..., None] // 64 - ids[layer, :, head])[:, 1:]
        far = far[(far >= attention.num_local_blocks) & (ids[layer, :, head, 1:] >= attention.num_sink_blocks)]
        assert measured.distance_unforced[layer, head] == pytest.approx(far.mean())
    late = locality.working_set(ids, 16)[..., 15:]
    np.testing.assert_allclose(measured.working_set[16], late.mean((1, 3)), rtol=1e-12)
    assert np.isnan(measured.working_set[64]).all()  # longer than the recording
    read = (8 - 1) * 64 + positions % 64 + 1
    assert measured.dense_share == pytest.approx(read[:, 1:].sum() / (positions[:, 1:] + 1).sum())
    # One block begins on the way: 8 selected, of which one by the query.
    assert measured.guaranteed_gamma == pytest.approx((7 * 38 + 6) / 39 / 8)


def test_padded_steps_do_not_count():
    _, attention, ids, positions, numbers = golden("g4_red_1500")
    misses = np.asarray(locality.replay_misses(ids, positions[:, None], attention, 8))
    ids[..., 36:, :], positions[:, 36:] = -1, -1
    measured = locality.locality_report(ids, positions, attention, bytes_per_block=1, slots=[8])
    assert measured.steps == 35
    np.testing.assert_allclose(measured.gamma, numbers["all"][..., :35].mean((1, 3), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(measured.misses[8], misses[..., 1:36].mean((1, 3)), rtol=1e-12)


def test_tables():
    reports = {"nosa": report("g4_red_1500"), "infllmv2": report("infllmv2_g4_red_1500", slots=[8, 9])}
    lines = str(reports["nosa"]).splitlines()
    assert lines[0] == "nosa: 47 steps; 8 blocks of 64 tokens selected; a block is 16 KiB; guaranteed gamma 0.872"
    reuse, transfers = lines[1:8], lines[11:18]  # names, four heads, mean and sum
    assert len({len(line) for line in reuse}) == 1 and len({len(line) for line in transfers}) == 1
    columns = [" ".join(table[0].split()) for table in (reuse, transfers)]
    assert columns[0] == "layer head gamma unforced new away far share set@16 set@64"
    sizes = (8, 10, 12, 16)
    assert columns[1].split()[2:] == [f"{name}@{slots}" for name in ("miss", "min", "KiB") for slots in sizes]
    assert reuse[-1].split()[:3] == ["sum", "-", "-"] and lines[-1].startswith("miss, min, KiB: per step")

    side_by_side = locality.comparison_table(reports).splitlines()
    assert side_by_side[0].split() == ["nosa", "infllmv2"]
    assert len({len(line) for line in side_by_side}) == 1
    cells = {line[:-20].strip(): line[-20:].split() for line in side_by_side[1:]}
    assert cells["gamma"] == [f"{r.gamma.mean():.3f}" for r in reports.values()]
    assert cells["misses per step, 9 slots"][0] == "-" and cells["misses per step, 16 slots"][1] == "-"
    assert cells["KiB per token, 8 slots"] == [f"{r.bytes_per_token(8) / 2**10:.1f}" for r in reports.values()]
    assert "gamma, layer 1" in cells


def test_report_without_unforced_blocks_is_valid_json():
    measured = report("g4_short_200", slots=[4])
    stored = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert stored["gamma"] == [[1.0, 1.0], [1.0, 1.0]]
    assert stored["gamma_unforced"] == [[None, None], [None, None]]
    assert stored["bytes_per_token"] == {"4": 0.0} and stored["attention"]["num_sink_blocks"] == 1
    assert " - " in str(measured)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda ids: locality.replay_misses(ids, 0, TINY, 5),
            ValueError,
            "slots: must hold one selection, J = 6, got 5",
        ),
        (lambda ids: locality.gamma_unforced(ids, np.arange(4), TINY), ValueError, r"positions: must broadcast"),
        (lambda ids: locality.gamma_unforced(ids, np.zeros(3), TINY), TypeError, "positions: must hold integers"),
        (lambda ids: locality.gamma(ids[0]), ValueError, r"block_ids: must have shape \[..., T, J\]"),
        (lambda ids: locality.gamma(ids * 1.0), TypeError, "block_ids: must hold integers"),
        (lambda ids: locality.guaranteed_overlap(5, AttentionConfig(variant="full")), ValueError, "must be sparse"),
        (lambda ids: one_step_report(ids[:1]), ValueError, "must hold two steps in a row"),
    ],
)
def test_errors(call, error, message, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # as users run: our own messages, not the type checker's
    with pytest.raises(error, match=message):
        call(np.zeros((3, 6), np.int32))


def one_step_report(ids):
    return locality.locality_report(ids[None, None, None], np.zeros((1, 1), np.int32), TINY, bytes_per_block=1)
