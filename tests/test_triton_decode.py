"""The Triton kernels of a decode step in Pallas' interpreter: values, bits, and what must not be read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import OFFSETS, assert_twice_as_far_at_most, with_exact_products
from support import but_slow, lively_model, random_tokens, small_config

import nosa_jax
from nosa_jax import CacheConfig
from pallas_kernels import (
    _backend,
    decode_attention,
    fetch_blocks,
    update_and_attend,
    write_back_blocks,
)
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.decode_attention import cases as attention_cases
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.fetch_blocks import cases as fetch_cases
from pallas_kernels.fetch_blocks import reference as fetch_reference
from pallas_kernels.fetch_blocks import triton as fetch_triton

EPS = float(jnp.finfo(jnp.float32).eps)
WILD = np.array([-(2**31), -2, 2**26, 2**31 - 1], np.int32)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    with _backend.interpreted():
        yield


def run(op, inputs, implementation="triton", **static):
    return jax.jit(functools.partial(op, implementation=implementation, **static))(**inputs)


def step(implementation, transport="auto", **given):
    """`update_and_attend` of arrays by name."""
    call = attention_cases.arguments(given)
    return update_and_attend(**call, transport=transport, implementation=implementation)


# ---- transport ----


@pytest.mark.parametrize(
    ("rows", "width", "tokens", "programs"),
    [(1, 64, 64, 16), (1, 5, 64, 8), (3, 64, 64, 8), (16, 64, 64, 1), (64, 64, 64, 1), (0, 64, 64, 32), (16, 64, 8, 8)],
)
def test_few_programs_move_blocks(rows, width, tokens, programs):
    """32 in all, or one per row and KV head (of two here); no more than there are blocks, and rows need not be. Blocks
    of less than 16 KB, as chunks of 8 tokens are, take as many more."""
    floats, ints = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.int32))
    host, pool = (floats((*lead, 2, tokens, 32)) for lead in ((2, 9, 2), (1, rows, 2, 8)))
    pages = ints((rows, 70))
    lists = ints((rows, 1, width))
    trace = jax.make_jaxpr(fetch_triton.fetch_blocks)(pool, host, pages, lists, lists, ints(()))
    (call,) = (equation for equation in trace.eqns if equation.primitive.name == "pallas_call")
    assert call.params["grid_mapping"].grid == (programs, 2, rows)


@pytest.mark.parametrize("name", fetch_cases.SMALL)
def test_moves_like_numpy(name):
    inputs = fetch_cases.make_inputs(fetch_cases.SMALL[name], jax.random.key(0))
    ids = np.asarray(inputs["block_ids"]).copy()
    ids[0, 0, 0], ids[-1, -1, -1] = WILD[0], WILD[3]
    inputs["block_ids"] = jnp.asarray(ids)
    plain = on_numpy(inputs)
    np.testing.assert_array_equal(run(fetch_blocks, inputs), fetch_reference.fetch_blocks_ref(**plain))
    layer = fetch_cases.staged(inputs)
    np.testing.assert_array_equal(run(fetch_blocks, layer), fetch_reference.fetch_blocks_ref(**on_numpy(layer)))
    for back in (fetch_cases.of_all_layers(inputs), layer):
        host = run(write_back_blocks, back)
        assert host.sharding.memory_kind == "pinned_host"
        np.testing.assert_array_equal(host, fetch_reference.write_back_blocks_ref(**on_numpy(back)))


# ---- attention ----


@functools.cache
def made(name):
    return attention_cases.make_inputs(attention_cases.SMALL[name], jax.random.key(4))


def attention_of(name):
    """A copy, with a hole amid the first selection."""
    ids = np.asarray(made(name)["block_ids"]).copy()
    ids[0, 0, 1] = -1
    return made(name) | {"block_ids": jnp.asarray(ids)}


@pytest.mark.parametrize(
    "name", but_slow(attention_cases.SMALL, "k1_g1", "k1_g16", "k4_g1", "k4_g16_blocks_of_64", "k2_g8_no_bias")
)
def test_attention(name):
    inputs = attention_of(name)
    expected = np.asarray(attention_reference.decode_attention_ref(**inputs | {"layer": int(inputs["layer"])}))
    out = run(decode_attention, inputs)
    np.testing.assert_allclose(out, expected, rtol=0, atol=16 * EPS * np.abs(expected).max())


def test_a_low_bias_is_widened_first():
    inputs = attention_of("k2_g4_ragged")
    low = inputs | {"bias": inputs["bias"].astype(jnp.bfloat16)}
    wide = inputs | {"bias": low["bias"].astype(jnp.float32)}
    np.testing.assert_array_equal(run(decode_attention, low), run(decode_attention, wide))


@pytest.mark.parametrize("name", but_slow(("k2_g4_ragged", "k2_g8_no_bias"), "k2_g8_no_bias"))
def test_large_logits_are_as_good_as_by_natural_exponentials(name):
    """Their common part, in the products or in the bias, is subtracted before the change of base."""
    plain, layer = attention_of(name), int(made(name)["layer"])
    kernel = jax.jit(functools.partial(decode_attention, implementation="triton"))
    natural = jax.jit(lambda inputs: attention_reference.decode_attention_ref(**inputs, layer=layer))

    def shifted(of_products, of_bias):
        """Exact sums, so that the outputs are those without the offset."""
        pool = np.array(plain["pool"])
        exact = with_exact_products({"q": plain["q"], "k": pool[..., 0, :, :]}, of_products)
        pool[..., 0, :, :] = exact["k"]
        bias = None if plain["bias"] is None else jnp.round(plain["bias"] * 512) / 512 + of_bias
        return plain | {"q": jnp.asarray(exact["q"]), "pool": jnp.asarray(pool), "bias": bias}

    without_layer = lambda inputs: {name: x for name, x in inputs.items() if name != "layer"}
    true = np.asarray(natural(without_layer(shifted(0, 0))), np.float64)
    for offset in OFFSETS:
        for inputs in [shifted(offset, 0), *([shifted(0, offset)] if plain["bias"] is not None else [])]:
            assert_twice_as_far_at_most(kernel(**inputs), natural(without_layer(inputs)), true)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_values_near_the_largest_bfloat16_have_a_finite_average(implementation):
    inputs = attention_of("k2_g4_ragged")
    largest = float(jnp.finfo(jnp.bfloat16).max)
    pool = inputs["pool"].at[..., 1, :, :].set(jnp.where(jnp.isnan(inputs["pool"][..., 1, :, :]), jnp.nan, largest))
    low = inputs | {"pool": pool.astype(jnp.bfloat16), "q": (0.1 * inputs["q"]).astype(jnp.bfloat16)}
    out = np.asarray(run(decode_attention, low, implementation), np.float64)[np.asarray(inputs["positions"]) >= 0]
    np.testing.assert_allclose(out / largest, 1, rtol=0, atol=2**-7)


def test_more_runs_for_more_blocks():
    """Of 300 blocks, beyond 16 runs."""
    case = attention_cases.Case((300 * 16 - 3,), 300, 1, 2, 16, 1, num_selected_blocks=300)
    inputs = attention_cases.make_inputs(case, jax.random.key(0))
    expected = np.asarray(attention_reference.decode_attention_ref(**inputs | {"layer": 0}))
    np.testing.assert_allclose(run(decode_attention, inputs), expected, rtol=0, atol=32 * EPS)


def test_attention_ignores_ids_and_slots_out_of_range():
    inputs = attention_of("k2_g4_ragged")
    ids, slots = (np.asarray(inputs[name]) for name in ("block_ids", "slots"))
    pool = jnp.where(jnp.isnan(inputs["pool"]), 1e3, inputs["pool"])  # finite, so that reading it would show

    def widen(array, extra):
        return jnp.asarray(np.concatenate([array, np.broadcast_to(extra, (*array.shape[:2], 8))], axis=-1))

    clean = inputs | {"pool": pool, "block_ids": widen(ids, -1), "slots": widen(slots, -1)}
    wild = clean | {
        "block_ids": widen(ids, [*WILD, 0, 0, 0, 0]),
        "slots": widen(slots, [0, 1, 2, 3, *(-1, -(2**31), 2**31 - 1, pool.shape[3])]),
    }
    np.testing.assert_array_equal(run(decode_attention, wild), run(decode_attention, clean))


def offloaded(name):
    """(inputs with a pool in which blocks are stale, the same with all of them in it)."""
    given = attention_cases.offloaded(attention_of(name), jax.random.key(0), 0.3)
    given["loads"] = given["loads"].at[0, 0, 0].set(WILD[3])
    moves = {name: given[name] for name in ("pool", "host", "page_table", "slots", "layer")}
    fetched = run(fetch_blocks, moves | {"block_ids": given["loads"]})
    assert (np.asarray(given["loads"]) >= 0).sum() > 1
    return given, given | {"pool": fetched, "host": None, "page_table": None, "loads": None}


@pytest.mark.parametrize(
    "name",
    but_slow(
        ("k1_g16", "k2_g4_ragged", "k2_g8_no_bias", "runs_of_two_and_three"),
        "k1_g16", "k2_g8_no_bias", "runs_of_two_and_three",
    ),
)  # fmt: skip
def test_one_step_of_the_cache_gives_the_bits_of_its_parts(name):
    given, resident = offloaded(name)
    out, pool = run(step, given)
    np.testing.assert_array_equal(pool, run(step, given, "xla")[1])  # as XLA composes it
    # Without a host store, and by attention alone over the resulting pool: the output to the bit.
    np.testing.assert_array_equal(run(step, resident)[0], out)
    alone = {name: given[name] for name in ("q", "bias", "slots", "block_ids", "positions", "layer")}
    np.testing.assert_array_equal(run(decode_attention, alone | {"pool": pool}), out)
    portable = run(step, given, transport="device_put")
    for ours, other in zip((out, pool), portable, strict=True):
        np.testing.assert_array_equal(ours, other)


# ---- the whole step ----


@pytest.mark.slow
def test_offloaded_decoding_is_bit_identical():
    """Every kernel of a step at once, against the same step with the whole cache on the device."""
    jax.clear_caches()  # of programs that were traced outside the interpreter
    model = lively_model(small_config())
    tokens, lengths = random_tokens(2, 150, seed=2), np.array([150, 79])

    def logits(cache):
        step = jax.jit(lambda *arguments: nosa_jax.decode_step(*arguments))
        state, logits = nosa_jax.prefill(model, tokens, lengths, max_length=200, cache=cache)
        assert "pallas_call" in str(jax.make_jaxpr(nosa_jax.decode_step)(model, state, tokens[:, 0]))
        for _ in range(20):
            state, logits = step(model, state, jnp.argmax(logits, -1).astype(jnp.int32))
            yield np.asarray(logits)

    expected = list(logits(CacheConfig(offload=False)))
    np.testing.assert_array_equal(list(logits(CacheConfig(slots=9))), expected)
