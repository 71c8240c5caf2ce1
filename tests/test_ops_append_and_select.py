"""A token up to its selection and slots: XLA and the Triton kernels in Pallas' interpreter against the references."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_calls import CALLS
from support import but_slow

from pallas_kernels import KernelUnsupportedError, Projected, Sizes, _backend, append_and_select
from pallas_kernels.append_and_select.cases import SMALL, Case, make_inputs, options
from pallas_kernels.append_and_select.reference import append_and_select_ref
from pallas_kernels.bench.work import on_numpy

IMPLEMENTATIONS = ("xla", "triton")


@functools.cache
def compiled(implementation, sizes):
    return jax.jit(functools.partial(append_and_select, implementation=implementation, sizes=sizes))


def run(implementation, inputs, sizes):
    with _backend.interpreted():
        return jax.device_get(compiled(implementation, sizes)(**inputs))


@functools.cache
def made(name):
    return make_inputs(SMALL[name], jax.random.key(0))


def assert_like_reference(out, inputs, sizes, dtype="float32"):
    """Integers must be equal, floats as in `append_token`."""
    expected = append_and_select_ref(**on_numpy(inputs), sizes=sizes)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    atol = 1e-5 if dtype == "float32" else 0.02
    for (path, ours), true in zip(jax.tree.leaves_with_path(out), jax.tree.leaves(expected), strict=True):
        if ours.dtype == np.int32:
            np.testing.assert_array_equal(ours, true, jax.tree_util.keystr(path))
        else:
            rtol = float(jnp.finfo(ours.dtype).eps)
            np.testing.assert_allclose(
                np.asarray(ours, np.float64), true, rtol, atol, err_msg=jax.tree_util.keystr(path)
            )


def forced_as(inputs, ids):
    """Of all layers, with other ids in other layers."""
    layers = jax.tree.leaves(inputs["selectable"].summaries)[0].shape[0]
    return jnp.asarray(np.stack([np.full_like(ids, -1)] * (layers - 1) + [ids]))


def forced_of(inputs, sizes):
    """Distinct, ascending, padded; the first row's first head chooses for itself."""
    rng, positions = np.random.default_rng(1), np.asarray(inputs["positions"])
    ids = np.full((len(positions), inputs["projected"].qkv.shape[1], sizes.num_selected_blocks), -1, np.int32)
    for row, head in np.ndindex(*ids.shape[:2]):
        own = max(int(positions[row]), 0) // sizes.block_size  # a row without a token is given blocks all the same
        some = np.union1d(rng.integers(0, own + 1, 4), own)
        ids[row, head, : some.size] = some
    ids[0, 0] = -1
    return forced_as(inputs, ids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", but_slow(SMALL, "infllmv2", "long", "other_stride", "no_table", "bfloat16"))
def test_matches_the_reference(name, implementation):
    case, inputs, sizes = SMALL[name], made(name), options(SMALL[name])["sizes"]
    out = run(implementation, inputs, sizes)
    _, _, residence, count = out
    given = inputs
    if case.dtype != "float32":  # scores may tie but for rounding: what follows from the own selection must be right
        expected = append_and_select_ref(**on_numpy(inputs), sizes=sizes)[2].block_ids
        assert (residence.block_ids == expected).mean() > 0.9
        given = inputs | {"forced_block_ids": forced_as(inputs, residence.block_ids)}
    assert_like_reference(out, given, sizes, case.dtype)
    for row, position in enumerate(case.positions):
        for ids in residence.block_ids[row]:
            ids, own = ids[ids >= 0].tolist(), position // case.block_size
            assert len(ids) == min(case.num_selected_blocks, own + 1) and ids == sorted(set(ids))
            window = range(max(0, own + 1 - case.num_local_blocks), own + 1)
            assert {*range(min(case.num_sink_blocks, own + 1)), *window} <= set(ids)
    if case.slots:
        assert 0 < count.sum() < (residence.block_ids >= 0).sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", but_slow(("nosa", "dma", "no_table"), "dma", "no_table"))
def test_forced_blocks(name, implementation):
    """In the place of a selection where a row and head has any, except in rows without a token."""
    inputs, sizes = made(name), options(SMALL[name])["sizes"]
    inputs = inputs | {"forced_block_ids": forced_of(inputs, sizes)}
    out = run(implementation, inputs, sizes)
    assert_like_reference(out, inputs, sizes)
    ids, forced = out[2].block_ids, np.asarray(inputs["forced_block_ids"][-1])
    assert (ids[0, 0] >= 0).any()
    np.testing.assert_array_equal(ids[0, 1], forced[0, 1])
    assert (ids[np.array(SMALL[name].positions) < 0] == -1).all()


def by_hand(shared, num_blocks=40):
    """One head, whose window number `shared[b]` in row b is all that its query looks at."""
    case = Case((num_blocks * 16 - 1,) * len(shared), num_blocks, 1, 1, 32, slots=0, biased=False)
    inputs = make_inputs(case, jax.random.key(0))
    projected, selectable = inputs["projected"], inputs["selectable"]
    plain = Projected(projected.qkv, jnp.ones_like(projected.cos), jnp.zeros_like(projected.sin))
    means, sums = jax.tree.map(np.array, selectable.summaries.pooled_keys)
    means[:], query = 0, np.asarray(projected.qkv)[:, 0, 0]
    for row, window in enumerate(shared):
        means[-1, row, 0, window] = 2 * query[row]
    summaries = selectable.summaries._replace(pooled_keys=(jnp.asarray(means), jnp.asarray(sums)))
    return inputs | {"projected": plain, "selectable": selectable._replace(summaries=summaries)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_block(implementation):
    """Block m shares window 4m - 1 with the one before, also where other programs weigh the windows of that."""
    starts = (5, 16, 17, 32)  # windows are weighed 64 at a time: those of 16 blocks
    inputs = by_hand([4 * m - 1 for m in starts])
    *_, residence, _ = run(implementation, inputs, Sizes(40, 16, 4, 4, 1, 2, 0))
    assert residence.block_ids[:, 0].tolist() == [[0, m - 1, 38, 39] for m in starts]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_counts_from_the_token_that_completes_it(implementation):
    """Its mean is not in the cache yet when windows are weighed. It covers tokens of block 29 and of the own, 30."""
    inputs, position = by_hand([0]), 30 * 16 + 3
    qkv, summaries = inputs["projected"].qkv, inputs["selectable"].summaries
    means, sums = (jnp.zeros_like(x) for x in summaries.pooled_keys)
    sums = sums.at[-1, :, :, 0].set(8 * 2 * qkv[:, :, 0] - qkv[:, :, 1])  # with the new key 8 times twice the query
    selectable = inputs["selectable"]._replace(summaries=summaries._replace(pooled_keys=(means, sums)))
    inputs = inputs | {"selectable": selectable, "positions": jnp.array([position], jnp.int32)}
    _, _, residence, _ = run(implementation, inputs, Sizes(40, 16, 4, 3, 1, 1, 0))
    assert residence.block_ids.tolist() == [[[0, 29, 30]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_go_to_the_lowest_blocks(implementation):
    """Three by query, then two by importance, between sink and window: of either all is equal."""
    inputs, sizes = made("nosa"), options(SMALL["nosa"])["sizes"]
    summaries = inputs["selectable"].summaries
    flat = {
        name: jax.tree.map(jnp.zeros_like, getattr(summaries, name)) for name in ("pooled_keys", "pooled_importance")
    }
    selectable = inputs["selectable"]._replace(summaries=summaries._replace(**flat))
    ids = run(implementation, inputs | {"selectable": selectable}, sizes)[2].block_ids
    assert ids[0].tolist() == [[0, 1, 2, 3, 4, 5, 18, 19, 20]] * 2


def test_one_step_after_the_other():
    """Each step on what the one before left, from block to block, with a row that starts and ends."""
    case = dataclasses.replace(SMALL["nosa"], positions=(300, -1, 3, 311, 155))
    sizes, rng, inputs = options(case)["sizes"], np.random.default_rng(0), make_inputs(case, jax.random.key(2))
    kept, positions, loaded = (
        dict.fromkeys(IMPLEMENTATIONS, inputs["selectable"]),
        np.array(case.positions, np.int32),
        0,
    )
    for step in range(22):
        qkv = jnp.asarray(rng.standard_normal(inputs["projected"].qkv.shape, np.float32))
        given = inputs | {"projected": inputs["projected"]._replace(qkv=qkv), "positions": jnp.asarray(positions)}
        out = {name: run(name, given | {"selectable": kept[name]}, sizes) for name in IMPLEMENTATIONS}
        ours, theirs = jax.tree.leaves_with_path(out["triton"]), jax.tree.leaves(out["xla"])
        for (path, x), y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, 1e-5, 1e-5, err_msg=f"step {step}{jax.tree_util.keystr(path)}")
        kept = {name: selectable for name, (_, selectable, *_) in out.items()}
        loaded += out["xla"][3].sum()
        positions = np.where(positions >= 0, positions + 1, -1).astype(np.int32)
        positions[1] = {2: 0, 12: -1}.get(step, positions[1])
    blocks, last_used = kept["triton"].table
    assert loaded > 0 and (last_used[-1, [0, 2, 3, 4]].max(-1) == positions[[0, 2, 3, 4], None] - 1).all()
    assert all(np.unique(held[held >= 0]).size == (held >= 0).sum() for held in blocks.reshape(-1, case.slots))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("resident", [0.0, 1.0])
def test_tables_of_more_slots_than_a_warp_has_threads(implementation, resident):
    """Nothing of the selection is there, or all that can be."""
    case = dataclasses.replace(SMALL["long"], resident=resident)
    inputs, sizes = make_inputs(case, jax.random.key(3)), options(case)["sizes"]
    out = run(implementation, inputs, sizes)
    assert_like_reference(out, inputs, sizes)
    # The second row's own block begins with this token: it takes a slot, and nothing is loaded.
    assert out[3][:, 0].tolist() == ([60, 59] if resident == 0 else [0, 0])
    assert (out[2].slots[1] >= 0).all() and out[2].loads[1, 0, -1] == -1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_positions_out_of_range_touch_nothing_else(implementation):
    inputs, sizes = made("nosa"), options(SMALL["nosa"])["sizes"]
    at = lambda *positions: inputs | {"positions": jnp.array(positions, jnp.int32)}
    calm = run(implementation, at(320, -1, -1, -1, -1), sizes)
    out = run(implementation, at(320, -(2**31), 336, 2**31 - 1, -7), sizes)
    held = lambda selectable: jax.tree.leaves((selectable.summaries, selectable.table))
    none = [1, 4]
    for old, quiet, new in zip(held(inputs["selectable"]), held(calm[1]), held(out[1]), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_array_equal(new[1][none], old[1][jnp.array(none)])
        np.testing.assert_array_equal(new[1, 0], quiet[1, 0])
    _, _, residence, count = out
    assert all((x[none] == -1).all() for x in residence) and not count[none].any()
    for ours, quiet in zip(jax.tree.leaves(out[2:]), jax.tree.leaves(calm[2:]), strict=True):
        np.testing.assert_array_equal(ours[0], quiet[0])
    # Rows beyond the end mean nothing, but name no blocks and slots that are not there.
    assert residence.block_ids.max() < 21 and residence.slots.max() < 12


# ---- what is refused ----


def changed(**parts):
    """The right arguments with parts of their tuples replaced, by names such as sizes__stride."""
    arrays, static = CALLS["append_and_select"]
    given = arrays | static
    for name, value in parts.items():
        argument, _, field = name.partition("__")
        given = given | {argument: given[argument]._replace(**{field: value}) if field else value}
    return given


RIGHT = CALLS["append_and_select"][0]["selectable"]
BLOCKS, LAST_USED = RIGHT.table
BARE = RIGHT.summaries._replace(pooled_keys=None, importance=None, pooled_importance=None)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"projected": (1, 2, 3)}, TypeError, r"^projected: must be an? Projected, got tuple"),
        ({"sizes": 3}, TypeError, r"^sizes: must be an? Sizes, got int"),
        ({"sizes__stride": 0}, ValueError, r"^sizes\.stride: must be >= 1, got 0"),
        ({"sizes__stride": 2.0}, TypeError, r"^sizes\.stride: must be an int"),
        ({"sizes__stride": 5}, ValueError, r"^sizes\.block_size: must be a multiple of stride = 5, got 16"),
        (
            {"sizes__num_blocks": 2**27},
            ValueError,
            r"^sizes\.num_blocks: must be below 2\*\*31 / block_size = 134217728",
        ),
        ({"sizes__num_blocks": 4}, ValueError, r"^selectable\.summaries: must have the 7 windows .*= 4 blocks, got 5"),
        ({"sizes__stride": 4}, ValueError, r"^selectable\.summaries: must have the 11 windows .*, got 5"),
        (
            {"sizes__num_local_blocks": 3},
            ValueError,
            r"^sizes\.num_selected_blocks: must hold the 4 blocks of sink and",
        ),
        ({"sizes__num_query_blocks": 2}, ValueError, r"^sizes\.num_selected_blocks: must hold sink, local and query"),
        (
            {"selectable": RIGHT._replace(summaries=BARE, scale=None, delta=None)},
            ValueError,
            r"^selectable\.summaries: must hold pooled keys, importance, or both, got neither",
        ),
        (
            {"selectable__table": (BLOCKS,)},
            ValueError,
            r"^selectable\.table: must be \(blocks, last_used\), got 1 arrays",
        ),
        (
            {"selectable__table": (BLOCKS[0], LAST_USED)},
            ValueError,
            r"^selectable\.table\[0\]: must have shape .*slots\]",
        ),
        (
            {"selectable__table": (BLOCKS, LAST_USED[:1])},
            ValueError,
            r"^selectable\.table\[1\]: must have shape .*slots\]",
        ),
        (
            {"selectable__table": (BLOCKS[..., :2], LAST_USED[..., :2])},
            ValueError,
            r"^selectable\.table: must have slots for a selection of 3 blocks, got 2",
        ),
        ({"forced_block_ids": BLOCKS[0]}, ValueError, r"^forced_block_ids: must have shape .*L, B, K, J\]"),
        ({"forced_block_ids": BLOCKS[..., :2]}, ValueError, r"^forced_block_ids: must have shape .*L, B, K, J\]"),
        ({"forced_block_ids": BLOCKS * 1.0}, TypeError, r"^forced_block_ids: must hold integers"),
    ],
)
def test_bad_arguments(without_type_checker, changes, error, message):
    with pytest.raises(error, match=message):
        append_and_select(**changed(**changes))


def test_what_no_kernel_takes():
    keys, sums = RIGHT.summaries.pooled_keys
    half = RIGHT._replace(summaries=RIGHT.summaries._replace(pooled_keys=(keys.astype(jnp.bfloat16), sums)))
    wide = RIGHT._replace(table=tuple(jnp.zeros((*BLOCKS.shape[:3], 2000), jnp.int32) for _ in range(2)))
    windows = lambda count: RIGHT._replace(
        summaries=BARE._replace(pooled_keys=(jnp.zeros((*keys.shape[:3], count, keys.shape[4])), sums)),
        scale=None, delta=None,
    )  # fmt: skip
    for changes, reason in (
        ({"selectable": half}, "qkv and pooled keys must have one dtype, got float32 and bfloat16"),
        ({"selectable": wide}, "it takes 1024 blocks of a selection and slots, got 3 and 2000"),
        (
            {"selectable": windows(8), "sizes__block_size": 24},
            "block_size / stride must be a power of two up to 64, got 3",
        ),
        ({"selectable": windows(9999), "sizes__num_blocks": 5000}, "it takes 4096 blocks"),
    ):
        with _backend.interpreted(), pytest.raises(KernelUnsupportedError, match=f"cannot run: {reason}"):
            append_and_select(**changed(**changes), implementation="triton")
