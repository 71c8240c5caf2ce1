"""Decode attention in XLA: values, and the same bits wherever the blocks lie."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_attention, decode_attention, update_and_attend
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.cases import SMALL, arguments, make_inputs, offloaded

GOLDEN = Path(__file__).parent / "golden" / "cases"
EPS = float(jnp.finfo(jnp.float32).eps)

xla = jax.jit(lambda inputs: decode_attention(**inputs, implementation="xla"))
reference_of = jax.jit(lambda inputs, layer: reference.decode_attention_ref(**inputs, layer=layer), static_argnums=1)


def definition(inputs):
    return reference_of({name: x for name, x in inputs.items() if name != "layer"}, int(inputs["layer"]))


@functools.cache
def made(name: str):
    return make_inputs(SMALL[name], jax.random.key(4))


def inputs_of(name: str):
    return dict(made(name))  # a copy: a test that changes it must not change what the next one sees


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name):
    inputs = inputs_of(name)
    out, expected = np.asarray(xla(inputs)), np.asarray(definition(inputs))
    np.testing.assert_allclose(out, expected, rtol=0, atol=16 * EPS * np.abs(expected).max())
    empty = np.asarray(inputs["positions"]) < 0
    assert (out[empty] == 0).all() and (np.abs(out[~empty]).max((1, 2)) > 0.1).all()


@pytest.mark.parametrize("name", ["k1_g16", "k2_g4_ragged", "k2_g8_no_bias"])
def test_one_step_of_the_cache_matches_the_reference(name):
    """The pool to the bit, with ids and slots that mean nothing among the loads."""
    given = offloaded(inputs_of(name), jax.random.key(0), 0.3)
    given["loads"] = given["loads"].at[0, 0, 0].set(2**31 - 1)
    assert (np.asarray(given["loads"]) >= 0).sum() > 1
    step = jax.jit(functools.partial(update_and_attend, implementation="xla"))
    out, pool = step(**arguments(given))
    expected, true_pool = reference.update_and_attend_ref(**on_numpy(arguments(given)))
    np.testing.assert_array_equal(pool, true_pool)
    np.testing.assert_allclose(out, expected, rtol=0, atol=16 * EPS * np.abs(expected).max())
    assert (np.asarray(pool) != np.asarray(given["pool"])).any()


def test_bfloat16_is_as_good_as_its_rounding():
    inputs = inputs_of("k2_g4_ragged")
    inputs = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("q", "pool")}
    wide = inputs | {name: inputs[name].astype(jnp.float32) for name in ("q", "pool")}
    expected = np.asarray(definition(wide))
    out = xla(inputs)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - expected)
    # Weights are rounded once (they add up to 1), the output once.
    values = np.nanmax(np.abs(np.asarray(wide["pool"][:, :, :, :, 1])))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert (error <= eps / 2 * (np.abs(expected) + values)).all()
    assert np.sqrt(np.mean(error**2)) <= eps / 2 * np.sqrt(np.mean(expected**2))


def place(host, block_ids, slots, rng):
    """A pool of `slots` with the blocks of `host` in random places and NaN elsewhere, and where each block lies."""
    pool = np.full((*host.shape[:3], slots, *host.shape[4:]), np.nan, host.dtype)
    taken = np.full_like(block_ids, -1)
    for cell in np.ndindex(*block_ids.shape[:2]):
        ids = block_ids[cell][block_ids[cell] >= 0]
        taken[cell][: len(ids)] = rng.choice(slots, len(ids), replace=False)
        pool[:, *cell, taken[cell][: len(ids)]] = host[:, *cell, ids]
    return pool, taken


@pytest.mark.parametrize("name", ["k2_g4_ragged", "k2_g8_no_bias"])
def test_same_bits_in_any_slots(name):
    """Small pools, large ones, and one slot per block: what offloaded and on-device decoding are."""
    case, inputs = SMALL[name], inputs_of(name)
    ids, slots, pool = (np.asarray(inputs[x]) for x in ("block_ids", "slots", "pool"))
    expected = np.asarray(xla(inputs))
    host = np.full((*pool.shape[:3], case.num_blocks, *pool.shape[4:]), np.nan, pool.dtype)
    for b, head, j in np.argwhere(ids >= 0):
        host[:, b, head, ids[b, head, j]] = pool[:, b, head, slots[b, head, j]]
    on_device = xla(inputs | {"pool": jnp.asarray(host), "slots": jnp.asarray(ids)})
    np.testing.assert_array_equal(on_device, expected)
    for size in (ids.shape[-1], 2 * case.num_blocks + 1):
        for seed in range(3):
            moved, taken = place(host, ids, size, np.random.default_rng(seed))
            out = xla(inputs | {"pool": jnp.asarray(moved), "slots": jnp.asarray(taken)})
            np.testing.assert_array_equal(out, expected, err_msg=f"{size} slots, seed {seed}")


@pytest.mark.parametrize("name", ["k2_g4_ragged", "k2_g8_no_bias"])
def test_out_of_range_ids_and_slots_are_ignored(name):
    """Entries after the selection, and real slots beside ids that are none: nothing may be read through them."""
    case, inputs = SMALL[name], inputs_of(name)
    ids, slots = (np.asarray(inputs[x]) for x in ("block_ids", "slots"))
    pool = np.where(np.isnan(inputs["pool"]), 1e3, inputs["pool"])  # finite, so that reading it would show
    wild_ids = np.array([-(2**31), -2, 2**26, 2**31 - 1, case.num_blocks, 2**27 + 1, 0, 0, 0, 0], np.int32)
    wild_slots = np.array([0, 1, 2, 3, 4, 5, -1, -(2**31), 2**31 - 1, case.slots], np.int32)

    def widen(array, extra):
        return jnp.asarray(np.concatenate([array, np.broadcast_to(extra, (*array.shape[:2], len(extra)))], axis=-1))

    none = np.full_like(wild_ids, -1)
    clean = inputs | {"pool": jnp.asarray(pool), "block_ids": widen(ids, none), "slots": widen(slots, none)}
    wild = clean | {"block_ids": widen(ids, wild_ids), "slots": widen(slots, wild_slots)}
    np.testing.assert_array_equal(xla(wild), xla(clean))
    np.testing.assert_array_equal(definition(wild), definition(clean))


def test_a_selection_of_nothing():
    inputs = inputs_of("k2_g8_no_bias")
    ids = np.asarray(inputs["block_ids"]).copy()
    ids[0, 1] = -1  # one head of a row
    out = np.asarray(xla(inputs | {"block_ids": jnp.asarray(ids)}))
    expected = np.asarray(xla(inputs)).copy()
    group = SMALL["k2_g8_no_bias"].group
    expected[0, group : 2 * group] = 0
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", ["k2_g4_ragged", "k1_g16"])
def test_what_was_never_written_may_hold_nan(name):
    """Other layers, slots without a block, tokens after the query and their bias, bias of other blocks."""
    case, inputs = SMALL[name], inputs_of(name)
    ids, slots = (np.asarray(inputs[x]) for x in ("block_ids", "slots"))
    last = int(inputs["layer"])
    token = np.arange(case.block_size)
    pool = np.full_like(inputs["pool"], np.nan)
    bias = np.full_like(inputs["bias"], np.nan)
    for b, head, j in np.argwhere(ids >= 0):
        block, slot = ids[b, head, j], slots[b, head, j]
        real = block * case.block_size + token < case.lengths[b]
        pool[last, b, head, slot][:, real] = np.asarray(inputs["pool"])[last, b, head, slot][:, real]
        bias[last, b, head, block, real] = np.asarray(inputs["bias"])[last, b, head, block, real]
    expected = xla(inputs)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(xla(inputs | {"pool": jnp.asarray(pool), "bias": jnp.asarray(bias)}), expected)
    assert np.isfinite(definition(inputs | {"pool": jnp.asarray(pool), "bias": jnp.asarray(bias)})).all()


@pytest.mark.parametrize("offset", [-1e3, 1e3])
def test_a_large_bias_on_every_token_cancels(offset):
    inputs = inputs_of("k2_g4_ragged")
    shifted = xla(inputs | {"bias": inputs["bias"] + offset})
    np.testing.assert_allclose(shifted, xla(inputs), rtol=0, atol=2e-3)  # logits near 1000 are rounded to 2^-14


def test_scale():
    inputs = inputs_of("k1_g1")
    scaled = jax.jit(lambda inputs: decode_attention(**inputs, scale=0.3))(inputs)
    np.testing.assert_allclose(scaled, xla(inputs | {"q": inputs["q"] * (0.3 * 8)}), rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["k2_g4_ragged", "k2_g8_no_bias"])
def test_is_block_attention_of_one_query(name):
    case, inputs = SMALL[name], inputs_of(name)
    ids, slots = (np.asarray(inputs[x]) for x in ("block_ids", "slots"))
    batch, kv_heads, _ = ids.shape
    tokens = np.zeros((2, batch, kv_heads, case.num_blocks, case.block_size, case.dim), np.float32)
    for b, head, j in np.argwhere(ids >= 0):
        tokens[:, b, head, ids[b, head, j]] = np.asarray(inputs["pool"])[-1, b, head, slots[b, head, j]]
    k, v = tokens.reshape(2, batch, kv_heads, -1, case.dim)
    bias = None if inputs["bias"] is None else inputs["bias"][-1].reshape(batch, kv_heads, -1)
    out, _ = jax.jit(functools.partial(block_attention, block_size=case.block_size))(
        inputs["q"][:, None], k, v, bias, ids[:, :, None], inputs["positions"][:, None]
    )
    np.testing.assert_allclose(xla(inputs), out[:, 0], rtol=0, atol=4e-6)


def test_matches_the_published_kernel():
    """Its prefill, read as decoding: every query is a row, its block in the middle of being written."""
    with np.load(GOLDEN / "units_ops.npz") as file:
        q, k, v, ids, out = (file[f"attn_prefill.{name}"] for name in ("q", "k", "v", "topk_idx", "out"))
    positions = np.array([0, 5, 63, 64, 100, 191, 192, 255, 256, 259])
    blocks = -(-len(k) // 64)
    store = np.full((2, 64 * blocks, *k.shape[1:]), np.nan, np.float32)
    store[:, : len(k)] = k, v
    store = store.reshape(2, blocks, 64, *k.shape[1:]).transpose(3, 1, 0, 2, 4)  # [K, M, 2, P, D]
    pool = np.broadcast_to(store, (1, len(positions), *store.shape))
    # Their random ids come in any order and more than once; ours ascend, each once.
    chosen = np.full((len(positions), *ids.shape[::2]), -1, np.int32)
    for row, head in np.ndindex(chosen.shape[:2]):
        unique = np.unique(ids[head, positions[row]])
        unique = unique[unique >= 0]
        chosen[row, head, : len(unique)] = unique
    inputs = {"q": q[positions], "pool": pool, "slots": chosen, "block_ids": chosen}
    inputs |= {"positions": positions.astype(np.int32), "layer": np.int32(0), "bias": None}
    ours = xla(inputs)
    np.testing.assert_allclose(ours, out[positions], rtol=0, atol=2e-6)
