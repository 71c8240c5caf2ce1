"""The Triton kernels of block attention in Pallas' interpreter: values, gradients, ids, NaN.

Compiling for the interpreter takes seconds, so tests share the few cases and differ in what these hold.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    OFFSETS,
    assert_as_good,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    assert_twice_as_far_at_most,
    assert_values_close,
    case_of,
    definition,
    fuzzed_ids,
    in_bfloat16,
    in_dtype,
    no_lse_of_empty,
    of_case,
    poisoned,
    rounded_weights,
    seen_tokens,
    triton,
    true_gradients,
    truth,
    value_and_gradients,
    with_exact_products,
)
from support import but_slow

from pallas_kernels import _backend, _inputs
from pallas_kernels.block_attention import triton as kernels
from pallas_kernels.block_attention.cases import SMALL, Case
from pallas_kernels.block_attention.reference import block_attention_ref


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


def run(inputs, cotangents, op=triton, **size):
    return jax.device_get(value_and_gradients(op, inputs, cotangents, **size))


def assert_matches(inputs, cotangents, true, **size):
    outputs, grads = run(inputs, cotangents, **size)
    assert_values_close(outputs, true[0])
    assert set(grads) == set(true[1])
    assert_close(grads, true[1], 2e-6)


# Together every K, every G and D; packed, ragged with an empty row, the last queries of a row; without bias.
@pytest.mark.parametrize(
    "name",
    but_slow(
        (
            "k1_g16_spans", "k2_g1_packed", "k2_g4_ragged", "k2_g8_chunk", "k2_g16_rows", "k4_g4_blocks_of_64",
            "k1_g8_packed", "dense_packed", "dense_chunk", "dense_without_bias",
        ),
        "k2_g8_chunk", "k2_g16_rows", "k4_g4_blocks_of_64", "k1_g8_packed", "dense_packed", "dense_without_bias",
    ),
)  # fmt: skip
def test_matches_the_reference(name):
    inputs, cotangents, size = case_of(name)
    assert_matches(inputs, cotangents, truth(name), **size)


@pytest.mark.parametrize("group", but_slow((3, 6), 6))
def test_any_group_size(group):
    inputs, cotangents, size = of_case(Case(_inputs.small(2, group, 32, (70,), (41,))))
    assert_matches(inputs, cotangents, true_gradients(inputs, cotangents, **size), **size)


@pytest.mark.slow
@pytest.mark.parametrize("group, block_size", [(3, 16), (6, 48), (16, 128)])
def test_dense_attention_with_any_group_and_blocks(group, block_size):
    """Documents that start on multiples of the caller's blocks, in tiles and blocks of the kernels' own."""
    rows = _inputs.small(2, group, 32, (150, 20, 200), (131,), block_size=block_size)
    inputs, cotangents, size = of_case(Case(rows, dense=True))
    assert_matches(inputs, cotangents, true_gradients(inputs, cotangents, **size), **size)


@pytest.mark.parametrize(
    "name", but_slow(("k1_g16_spans", "k2_g1_packed", "dense_without_bias"), "k2_g1_packed", "dense_without_bias")
)
def test_bfloat16_is_as_good_as_its_rounding(name):
    inputs, cotangents, size = case_of(name)
    (low, low_cotangents), wide = in_bfloat16(inputs, no_lse_of_empty(inputs, cotangents))
    (true_out, true_lse), true = true_gradients(*wide, **size)
    (naive_out, _), naive = run(low, low_cotangents, rounded_weights, **size)
    (out, lse), grads = run(low, low_cotangents, **size)
    assert out.dtype == jnp.bfloat16 and lse.dtype == np.float32
    assert_as_good(out, naive_out, true_out)
    assert_lse_close(lse, true_lse)
    for learned in grads:
        assert grads[learned].dtype == low[learned].dtype
        assert_as_good(grads[learned], naive[learned], true[learned])


# ---- ids ----


def without_a_third(ids):
    """Some of the selected blocks, so that no garbage may stand for one of the others unseen."""
    return np.where(np.random.default_rng(0).random(ids.shape) < 0.3, -1, ids)


def test_ids_of_nothing_that_is_seen_are_ignored():
    """Extremes of the type, beyond either end, in the future, of another document: between the real ones."""
    inputs, cotangents, size = case_of("k2_g1_packed")
    ids, num_blocks = without_a_third(inputs["block_ids"]), SMALL["k2_g1_packed"].rows.num_blocks
    plain = inputs | {"block_ids": ids}
    messy = inputs | {"block_ids": fuzzed_ids(plain, num_blocks, **size)}
    assert ((messy["block_ids"] >= 0) & (messy["block_ids"] < num_blocks)).sum() > 1.1 * (ids >= 0).sum()
    ours = run(messy, cotangents, **size)
    assert_same_bits(ours, run(plain, cotangents, **size))
    assert_values_close(ours[0], definition(messy, **size))


@pytest.mark.slow
def test_ids_in_any_order():
    inputs, cotangents, size = case_of("k1_g16_spans")
    shuffled = np.random.default_rng(0).permuted(inputs["block_ids"], axis=-1)
    assert (shuffled != inputs["block_ids"]).mean() > 0.5
    assert_same_bits(run(inputs | {"block_ids": shuffled}, cotangents, **size), run(inputs, cotangents, **size))


def test_a_query_without_blocks_sees_nothing():
    """Neither its own output nor its gradients, whatever it and they hold; the others do not notice."""
    inputs, (out, lse), size = case_of("k1_g16_spans")
    blind = np.isin(np.arange(out.shape[1]), (5, 8, 9, 10, 11, 36))  # tiles have 4 queries
    empty = inputs | {"block_ids": np.where(blind[:, None], -1, inputs["block_ids"])}
    quiet = np.where(blind[:, None, None], 0, out), np.where(blind[:, None], 0, lse)
    (clean_out, clean_lse), clean = run(empty, quiet, **size)
    assert (clean_out[:, blind] == 0).all() and (clean_lse[:, blind] == -np.inf).all()
    assert (clean["q"][:, blind] == 0).all()
    assert_values_close((clean_out, clean_lse), definition(empty, **size))
    assert_close(clean, true_gradients(empty, quiet, **size)[1], 2e-6)
    wild = np.where(blind[:, None, None], np.nan, out), np.where(blind[:, None], np.nan, lse)
    nobody = empty | {"q": np.where(blind[:, None, None], np.float32(np.nan), inputs["q"])}
    assert_same_bits(run(nobody, wild, **size), ((clean_out, clean_lse), clean))


# ---- NaN that nobody sees ----


def last_queries_moved_back(inputs):
    """By three blocks, the selection with them: there are tokens after the last query."""
    return inputs | {"positions": inputs["positions"] - 48, "block_ids": inputs["block_ids"] - 3}


def behind_caches(inputs):
    """Every row behind another number of tokens, of which the cache has room for more; padding amid the queries."""
    positions = np.array(inputs["positions"]) - np.array([[7], [60]])
    positions[:, 5:8] = -1
    return inputs | {"positions": np.maximum(positions, -1)}


def own_block_left_out(inputs):
    """After the 20th query nobody selects block 1, of which that query saw the start."""
    ids = inputs["block_ids"]
    late = np.arange(ids.shape[2])[:, None] > 20
    return inputs | {"block_ids": np.where(late & (ids == 1), -1, ids)}


@pytest.mark.parametrize(
    "name, change",
    [
        ("k1_g16_spans", dict),
        ("k2_g1_packed", dict),
        ("k2_g4_ragged", dict),
        ("k1_g16_spans", last_queries_moved_back),
        ("k2_g4_ragged", own_block_left_out),
        pytest.param("dense_packed", dict, marks=pytest.mark.slow),
        ("dense_chunk", behind_caches),
    ],
)
def test_nan_that_nobody_sees_does_not_spread(name, change):
    """Into values and gradients: from tokens, and from queries that are padding and their gradients."""
    inputs, (out, lse), size = case_of(name)
    inputs = change(inputs)
    seen, real = seen_tokens(inputs, **size), inputs["positions"] >= 0
    assert 0.02 < seen.mean() < 0.98
    wild = np.where(real[..., None, None], out, np.nan), np.where(real[..., None], lse, np.nan)
    outputs, grads = run(inputs, (out, lse), **size)
    assert_same_bits(run(poisoned(inputs, **size), wild, **size), (outputs, grads))
    assert all((grads[n][~seen] == 0).all() for n in ("k", "v", "bias") if n in grads)
    assert (grads["q"][~real] == 0).all() and (outputs[0][~real] == 0).all()
    # And what is seen counts, with the weight it has.
    assert_values_close(outputs, definition(inputs, **size))


# ---- sums of the backward pass ----


@pytest.mark.parametrize(
    "name, length", [("k2_g1_packed", 16), pytest.param("k4_g4_blocks_of_64", 64, marks=pytest.mark.slow)]
)
def test_gradients_summed_in_segments(monkeypatch, name, length):
    """Blocks that more queries selected than one program adds up."""
    inputs, cotangents, size = case_of(name)
    ids = inputs["block_ids"]
    assert (ids == 0).any(-1).sum(-1).max() > 2 * length
    monkeypatch.setattr(kernels, "SEGMENT", length)
    anew = functools.partial(triton)  # compiled with this length
    outputs, grads = run(inputs, cotangents, anew, **size)
    assert_values_close(outputs, truth(name)[0])
    assert_close(grads, truth(name)[1], 2e-6)


# ---- what all logits have in common, and the largest values ----


@pytest.mark.parametrize("name, where", [("k1_g16_spans", "bias"), ("k1_g16_spans", "q"), ("dense_chunk", "q")])
@pytest.mark.parametrize("offset", but_slow(OFFSETS, 50, -50, -500, 5000))
def test_large_logits_are_as_good_as_by_natural_exponentials(name, where, offset):
    """Their common part is subtracted before the change of base, forward and backward."""
    inputs, cotangents, size = case_of(name)
    cotangents = no_lse_of_empty(inputs, cotangents)
    inputs = with_exact_products(inputs, offset if where == "q" else 0.0)
    if where == "bias":
        inputs |= {"bias": inputs["bias"] + np.float32(offset)}
    (out, lse), grads = run(inputs, cotangents, **size)
    (naive_out, naive_lse), naive = run(inputs, cotangents, block_attention_ref, **size)
    (true_out, true_lse), true = true_gradients(inputs, cotangents, **size)
    seen = np.isfinite(true_lse)
    assert_twice_as_far_at_most(out, naive_out, true_out)
    assert_twice_as_far_at_most(lse[seen], naive_lse[seen], true_lse[seen])
    for learned in true:
        assert_twice_as_far_at_most(grads[learned], naive[learned], true[learned])


def test_a_bias_that_stands_for_minus_infinity():
    """-1e30 on some tokens hides them; on all of them it changes nothing."""
    inputs, cotangents, size = case_of("k1_g16_spans")
    hidden = np.where(np.arange(inputs["k"].shape[2]) % 3 == 1, np.float32(-1e30), inputs["bias"])
    outputs, _ = run(inputs | {"bias": hidden}, cotangents, **size)
    assert_values_close(outputs, definition(inputs | {"bias": hidden}, **size))
    (out, _), _ = run(inputs | {"bias": np.full_like(hidden, -1e29)}, cotangents, **size)
    assert np.isfinite(out).all()


def test_values_near_the_largest_bfloat16_have_a_finite_average():
    """Sums of a few of them are beyond float32."""
    (low, cotangents), _ = in_bfloat16(*case_of("k1_g16_spans")[:2])
    size = {"block_size": 16}
    largest = float(jnp.finfo(jnp.bfloat16).max)
    signs = np.where(np.random.default_rng(0).random(low["v"].shape) < 0.3, -1, 1)
    low = low | {"v": jnp.asarray(signs * largest, jnp.bfloat16), "q": (0.1 * low["q"]).astype(jnp.bfloat16)}
    out = np.asarray(run(low, jax.tree.map(np.zeros_like, cotangents), **size)[0][0], np.float64)
    scaled = in_dtype(low, np.float32) | {"v": signs.astype(np.float32)}
    true = np.asarray(definition(scaled, **size)[0], np.float64)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out / largest, true, rtol=0, atol=2**-7)
