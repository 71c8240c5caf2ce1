"""Block attention in XLA: values against the reference, and what its contract promises about ids, NaN and causality."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import (
    assert_as_good,
    assert_lse_close,
    assert_same_bits,
    assert_values_close,
    bits,
    definition,
    in_dtype,
    rounded_weights,
)

from pallas_kernels import block_attention
from pallas_kernels.block_attention.cases import SMALL, make_inputs, options

GOLDEN = Path(__file__).parent / "golden" / "cases"


@functools.partial(jax.jit, static_argnames=("block_size", "scale"))
def xla(inputs, *, block_size, scale=None):
    return block_attention(**inputs, block_size=block_size, scale=scale, implementation="xla")


@functools.cache
def made(name: str):
    return make_inputs(SMALL[name], jax.random.key(7))


def inputs_of(name: str):
    return dict(made(name))  # a copy: a test that changes it must not change what the next one sees


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name):
    inputs, size = inputs_of(name), options(SMALL[name])
    out, lse = bits(xla(inputs, **size))
    assert_values_close((out, lse), definition(inputs, **size))
    padding = np.asarray(inputs["positions"]) < 0
    assert (out[padding] == 0).all() and (lse[padding] == -np.inf).all()
    assert np.isfinite(lse[~padding]).all()


@pytest.mark.parametrize("name", ["k1_g1_one_row", "k4_g8_rows"])
@pytest.mark.parametrize("has_ids", [True, False])
def test_whole_rows_go_without_positions(name, has_ids):
    """The bits that their numbers give; also at the places before the padding of a shorter row."""
    inputs, size = inputs_of(name), options(SMALL[name])
    inputs |= {} if has_ids else {"block_ids": None}
    real = np.asarray(inputs["positions"]) >= 0
    for ours, theirs in zip(
        *(bits(xla(inputs | {"positions": p}, **size)) for p in (None, inputs["positions"])), strict=True
    ):
        np.testing.assert_array_equal(ours[real], theirs[real])
    assert_values_close(xla(inputs | {"positions": None}, **size), definition(inputs | {"positions": None}, **size))


@pytest.mark.parametrize("name", ["k1_g16_spans", "k2_g1_packed"])
def test_bfloat16_is_as_good_as_its_rounding(name):
    inputs, size = in_dtype(inputs_of(name), jnp.bfloat16), options(SMALL[name])
    truth, true_lse = bits(definition(in_dtype(inputs, jnp.float32), **size))
    naive, _ = jax.jit(functools.partial(rounded_weights, **size))(**inputs)
    out, lse = bits(xla(inputs, **size))
    assert out.dtype == jnp.bfloat16 and lse.dtype == np.float32
    assert_as_good(out, naive, truth)
    assert_lse_close(lse, true_lse)


def test_matches_the_published_kernel():
    """Prefill over selected blocks of 64, without bias; heads of a group share their ids."""
    with np.load(GOLDEN / "units_ops.npz") as file:
        q, k, v, ids, out, lse = (
            jnp.asarray(file[f"attn_prefill.{name}"]) for name in ("q", "k", "v", "topk_idx", "out", "lse_per_qhead")
        )
    inputs = {
        "q": q[None], "k": k.swapaxes(0, 1)[None], "v": v.swapaxes(0, 1)[None], "bias": None,
        "block_ids": ids[None].astype(jnp.int32), "positions": jnp.arange(len(q), dtype=jnp.int32)[None],
        "first_block": None,
    }  # fmt: skip
    ours, our_lse = xla(inputs, block_size=64)
    np.testing.assert_allclose(ours[0], out, rtol=0, atol=2e-6)
    np.testing.assert_allclose(our_lse[0].T, lse, rtol=0, atol=2e-6)


def test_scale():
    inputs = inputs_of("k1_g16_spans")
    out, lse = xla(inputs, block_size=16, scale=0.3)
    same_out, same_lse = xla(inputs | {"q": inputs["q"] * (0.3 * 8)}, block_size=16)  # 1/sqrt(64) is the default
    np.testing.assert_allclose(out, same_out, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, same_lse, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["k2_g1_packed", "dense_packed"])
def test_packed_documents_are_what_they_are_alone(name):
    case, inputs = SMALL[name], inputs_of(name)
    out, lse = bits(xla(inputs, **options(case)))
    places = [(b, *place) for b, row in enumerate(case.rows.rows) for place in case.rows.documents(row)]
    width = max(length for _, _, length in places)

    def alone(x, axis):
        """Every document as a row of its own."""
        x = np.concatenate([np.asarray(x), np.zeros_like(x)], axis)
        return np.stack([x[b].take(np.arange(start, start + width), axis - 1) for b, start, _ in places])

    ids = inputs["block_ids"]
    if ids is not None:
        first = np.array([start // 16 for _, start, _ in places])[:, None, None, None]
        ids = jnp.asarray(alone(ids, 2) - first)  # padding stays negative
    lengths = np.array([length for _, _, length in places])[:, None]
    rows = {
        "q": alone(inputs["q"], 1), "k": alone(inputs["k"], 2), "v": alone(inputs["v"], 2),
        "bias": alone(inputs["bias"], 2), "positions": np.where(np.arange(width) < lengths, np.arange(width), -1),
    }  # fmt: skip
    rows = {name: jnp.asarray(x, jnp.int32 if name == "positions" else None) for name, x in rows.items()}
    alone_out, alone_lse = definition(rows | {"block_ids": ids, "first_block": None}, block_size=16)
    for row, (b, start, length) in enumerate(places):
        here = slice(start, start + length)
        np.testing.assert_allclose(out[b, here], alone_out[row, :length], rtol=0, atol=4e-6)
        np.testing.assert_allclose(lse[b, here], alone_lse[row, :length], rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["k1_g16_spans", "k4_g4_blocks_of_64"])
def test_ids_in_any_order_with_garbage_between(name):
    inputs, size = inputs_of(name), options(SMALL[name])
    ids = np.asarray(inputs["block_ids"])
    # Without the own block and a local one, so that no number may stand for one of them unseen.
    own = np.asarray(inputs["positions"])[:, None, :, None] // size["block_size"]
    ids = np.where(ids >= np.maximum(own - 1, 1), -1, ids)
    blocks = SMALL[name].rows.num_blocks
    garbage = np.array([*range(-100, 0), blocks, 32 * -(-blocks // 32), 2**26, 2**31 - 1, -(2**31)], np.int32)
    garbage = np.broadcast_to(garbage, (*ids.shape[:-1], len(garbage)))
    fuzzed = np.random.default_rng(0).permuted(np.concatenate([ids, garbage], axis=-1), axis=-1)
    padded = np.concatenate([ids, np.full_like(garbage, -1)], axis=-1)
    plain, messy = (xla(inputs | {"block_ids": jnp.asarray(x)}, **size) for x in (padded, fuzzed))
    assert_same_bits(messy, plain)


def test_a_query_without_blocks_sees_nothing():
    inputs = inputs_of("k1_g16_spans")
    ids = inputs["block_ids"].at[:, :, 5].set(-1)
    out, lse = bits(xla(inputs | {"block_ids": ids}, block_size=16))
    assert (out[:, 5] == 0).all() and (lse[:, 5] == -np.inf).all()
    plain_out, plain_lse = bits(xla(inputs, block_size=16))
    others = np.arange(out.shape[1]) != 5
    assert_same_bits((out[:, others], lse[:, others]), (plain_out[:, others], plain_lse[:, others]))


def test_a_query_of_nan_is_not_one_that_sees_nothing():
    """NaN comes out as NaN, in the lse too, whose -inf means that there was nothing to see; others do not notice."""
    inputs, size = inputs_of("k2_g4_ragged"), options(SMALL["k2_g4_ragged"])
    broken = inputs | {"q": inputs["q"].at[0, 7].set(jnp.nan)}
    (out, lse), (clean, clean_lse) = bits(xla(broken, **size)), bits(xla(inputs, **size))
    assert np.isnan(out[0, 7]).all() and np.isnan(lse[0, 7]).all()
    assert np.isnan(definition(broken, **size)[1][0, 7]).all()
    others = np.arange(out.shape[1]) != 7
    assert_same_bits((out[:, others], lse[:, others]), (clean[:, others], clean_lse[:, others]))


@pytest.mark.parametrize("offset", [-1e3, 1e3])
def test_a_large_bias_on_every_token_cancels(offset):
    inputs = inputs_of("k1_g16_spans")
    out, lse = xla(inputs, block_size=16)
    shifted_out, shifted_lse = xla(inputs | {"bias": inputs["bias"] + offset}, block_size=16)
    # Logits near 1000 are rounded to 2^-14.
    np.testing.assert_allclose(shifted_out, out, rtol=0, atol=2e-3)
    np.testing.assert_allclose(shifted_lse - offset, lse, rtol=0, atol=2e-3)


def test_one_token_far_above_the_rest():
    # What was summed before it must decay to nothing, what comes after must add nothing.
    inputs = inputs_of("k1_g16_spans")
    peak = 600  # far from both ends: other spans are visited before and after
    ids = jnp.broadcast_to(jnp.asarray([0, 1, peak // 16, 66, 67, 68], jnp.int32), inputs["block_ids"].shape)
    bias = inputs["bias"].at[:, :, peak].add(500.0)
    out, _ = xla(inputs | {"bias": bias, "block_ids": ids}, block_size=16)
    expected = np.broadcast_to(inputs["v"][:, :, peak], out.shape)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["k1_g4_short", "k1_g16_spans", "k2_g16_rows", "dense_without_bias"])
def test_later_tokens_leave_earlier_queries_alone_to_the_bit(name):
    """The first queries, while all after them changes: tokens, importance, and what later queries select."""
    inputs, size = inputs_of(name), options(SMALL[name])
    other = make_inputs(SMALL[name], jax.random.key(8))
    before_out, before_lse = bits(xla(inputs, **size))
    for kept in (1, 21, 30):  # tiles of 16 queries and more: their edges and their insides
        last = np.asarray(inputs["positions"])[:, kept - 1]
        later = np.arange(inputs["k"].shape[2]) > last[:, None]
        after = np.arange(inputs["q"].shape[1]) >= kept
        masks = {
            "q": after[None, :, None, None],
            "k": later[:, None, :, None],
            "v": later[:, None, :, None],
            "bias": later[:, None],
            "block_ids": after[None, None, :, None],
        }
        changed = {n: jnp.asarray(np.where(m, other[n], inputs[n])) for n, m in masks.items() if inputs[n] is not None}
        out, lse = bits(xla(inputs | changed, **size))
        assert_same_bits((out[:, :kept], lse[:, :kept]), (before_out[:, :kept], before_lse[:, :kept]))
        real = np.asarray(inputs["positions"])[:, kept:] >= 0
        assert (out[:, kept:] != before_out[:, kept:])[real].mean() > 0.9


def test_memory_is_bounded_by_a_tile():
    """Neither [T, S] logits nor [T, J * P] gathered keys: for 8192 tokens each would take a gigabyte and more."""
    shapes = {
        "q": (1, 8192, 4, 64), "k": (1, 1, 8192, 64), "v": (1, 1, 8192, 64), "bias": (1, 1, 8192),
    }  # fmt: skip
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    ids = jax.ShapeDtypeStruct((1, 1, 8192, 64), jnp.int32)
    positions = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(inputs, ids, positions):
        out, lse = block_attention(**inputs, block_ids=ids, positions=positions, block_size=64, implementation="xla")
        return out.sum() + lse.sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(inputs, ids, positions).compile()
    logits = 4 * 4 * 8192 * 8192
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 8


@pytest.mark.parametrize("batch, length, tokens", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_to_attend(batch, length, tokens):
    q, k = jnp.ones((batch, length, 4, 16)), jnp.ones((batch, 2, tokens, 16))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    ids = jnp.zeros((batch, 2, length, 3), jnp.int32)
    out, lse = block_attention(q, k, k, None, ids, positions, block_size=16)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == q.shape[:-1] and bool(jnp.isneginf(lse).all())
