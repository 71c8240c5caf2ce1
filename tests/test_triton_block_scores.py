"""The Triton kernels of block scores in Pallas' interpreter."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import OFFSETS, assert_twice_as_far_at_most, with_exact_products
from scores_checks import assert_close, definition, inputs_of, with_nan

from pallas_kernels import _backend, _inputs, block_scores, blocks
from pallas_kernels.block_scores.cases import SMALL, make_inputs, options

STATIC = ("num_blocks", "block_size", "stride")


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


@functools.partial(jax.jit, static_argnames=STATIC)
def run(inputs, **options):
    return block_scores(**inputs, **options, implementation="triton")


# Every K, G and D; packed, ragged with an empty row, few queries of hundreds of windows, rows without any window.
@pytest.mark.parametrize(
    "name",
    [
        "k1_g1_one_row", "k1_g8_packed", "k1_g16_spans", "k2_g1_packed", "k2_g4_ragged", "k2_g8_chunk",
        "k4_g4_blocks_of_64", "no_window",
    ],
)  # fmt: skip
def test_matches_the_reference(name):
    inputs, sizes = inputs_of(name), options(SMALL[name])
    scores = run(inputs, **sizes)
    assert scores.dtype == jnp.float32
    assert_close(scores, definition(inputs, **sizes))


def test_large_logits_are_as_good_as_by_natural_exponentials():
    """Their common part is subtracted before the change of base."""
    inputs, sizes = inputs_of("k2_g8_chunk"), options(SMALL["k2_g8_chunk"])
    true = np.asarray(definition(with_exact_products(inputs, 0, "pooled_keys"), **sizes), np.float64)
    real = np.isfinite(true)
    for offset in OFFSETS:
        large = with_exact_products(inputs, offset, "pooled_keys")  # sums are exact: the scores are the same
        ours, natural = (np.asarray(scores(large, **sizes))[real] for scores in (run, definition))
        assert_twice_as_far_at_most(ours, natural, true[real])


@pytest.mark.parametrize("name", ["k1_g8_packed", "k2_g4_ragged"])
def test_nan_stays_with_its_query(name):
    inputs, sizes = inputs_of(name), options(SMALL[name])
    dirty, untouched = with_nan(inputs)
    ours, clean = (np.asarray(run(x, **sizes))[untouched] for x in (dirty, inputs))
    np.testing.assert_array_equal(ours, clean)


@pytest.mark.parametrize("group", [3, 6])
def test_any_group_size(group):
    case = _inputs.small(2, group, 32, (100,), (41,))
    inputs = make_inputs(case, jax.random.key(1))
    assert_close(run(inputs, **options(case)), definition(inputs, **options(case)))


def test_bfloat16_takes_float32_sums():
    inputs, sizes = inputs_of("k2_g8_chunk"), options(SMALL["k2_g8_chunk"])
    inputs = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("q", "pooled_keys")}
    scores = run(inputs, **sizes)
    assert scores.dtype == jnp.float32
    assert_close(scores, definition(inputs, **sizes))


@pytest.mark.parametrize("name, back", [("k1_g16_spans", 550), ("k1_g8_packed", 0), ("k2_g4_ragged", 0)])
def test_nan_that_nobody_sees_does_not_spread(name, back):
    """From windows after the last query, those between documents, and queries that are padding."""
    inputs, sizes = inputs_of(name), options(SMALL[name])
    positions = jnp.where(inputs["positions"] >= 0, inputs["positions"] - back, -1)
    inputs = inputs | {"positions": positions}
    geometry = {name: sizes[name] for name in ("block_size", "stride")}
    first = blocks.query_first_blocks(positions, inputs["first_block"], sizes["block_size"])
    visible = blocks.visible_windows(positions, first, inputs["pooled_keys"].shape[2], **geometry)
    seen, real = visible.any(1)[:, None, :, None], (positions >= 0)[..., None, None]
    assert not seen.all() and (back > 0 or not real.all())
    dirty = {
        "q": jnp.where(real, inputs["q"], jnp.nan),
        "pooled_keys": jnp.where(seen, inputs["pooled_keys"], jnp.nan),
    }
    np.testing.assert_array_equal(run(inputs | dirty, **sizes), run(inputs, **sizes))


@pytest.mark.parametrize("back", [72, 76, 583])
def test_the_last_window_touches_the_first_block_of_the_next_chunk(back):
    """Kernels visit 128 windows at once: the last query sees 256, 255 and 128 of them."""
    inputs, sizes = inputs_of("k1_g16_spans"), options(SMALL["k1_g16_spans"])
    inputs = inputs | {"positions": inputs["positions"] - back}
    seen = (int(inputs["positions"].max()) + 1) // sizes["stride"] - 1
    assert seen == {72: 256, 76: 255, 583: 128}[back]
    assert_close(run(inputs, **sizes), definition(inputs, **sizes))


def test_later_windows_leave_earlier_queries_alone_to_the_bit():
    case, inputs, kept = SMALL["k1_g1_one_row"], inputs_of("k1_g1_one_row"), 100
    pooled = inputs["pooled_keys"]
    changed = np.where((np.arange(pooled.shape[2]) < kept // case.stride - 1)[:, None], pooled, 9.0)
    before, after = (run(inputs | {"pooled_keys": jnp.asarray(x)}, **options(case)) for x in (pooled, changed))
    np.testing.assert_array_equal(before[:, :, :kept], after[:, :, :kept])
    assert (np.asarray(before)[:, :, kept + 4 :] != np.asarray(after)[:, :, kept + 4 :]).any()


def test_large_logits_do_not_overflow():
    case, inputs = SMALL["k2_g8_chunk"], inputs_of("k2_g8_chunk")
    inputs = inputs | {"q": inputs["q"] * 1e4}
    scores = np.asarray(run(inputs, **options(case)))
    assert not np.isnan(scores).any() and scores.max() <= case.group + 1e-5
    np.testing.assert_allclose(scores, definition(inputs, **options(case)), rtol=0, atol=1e-2)
