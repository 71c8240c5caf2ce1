"""Attention with rebuilt keys, in XLA and in Pallas' interpreter: values, and what must not be read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import but_slow

from pallas_kernels import _backend, rebuilt_attention
from pallas_kernels.bench.work import on_numpy
from pallas_kernels.rebuilt_attention import Chunks, Exact
from pallas_kernels.rebuilt_attention.cases import SMALL, make_inputs
from pallas_kernels.rebuilt_attention.reference import rebuilt_attention_ref

WILD = np.array([-(2**31), -2, 2**26, 2**31 - 1], np.int32)
IMPLEMENTATIONS = ("triton", "xla")


@functools.cache
def made(name):
    """With a hole amid the first selection, and tables that end before the last chunk: its positions are their end."""
    inputs = make_inputs(SMALL[name], jax.random.key(3))
    chunks, factors = inputs["chunks"], inputs["factors"]
    cos, sin = (table[: len(table) - 5] for table in (factors.cos, factors.sin))
    chunks, factors = chunks._replace(ids=chunks.ids.at[0, 0, 1].set(-1)), factors._replace(cos=cos, sin=sin)
    return inputs | {"chunks": chunks, "factors": factors}


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(rebuilt_attention, implementation=implementation, scale=0.4))


def run(inputs, implementation):
    with _backend.interpreted():
        return np.asarray(compiled(implementation)(**inputs), np.float32)


@pytest.mark.parametrize("name", but_slow(SMALL, "k4_g3_single_tokens"))
def test_values(name):
    """Also of a row without any token, and with NaN wherever nothing lies."""
    expected = rebuilt_attention_ref(**on_numpy(made(name)), scale=0.4).astype(np.float32)
    # Weights and, once they are turned, keys are rounded.
    bound = (2**-7 if SMALL[name].dtype == "bfloat16" else 3e-6) * np.abs(expected).max()
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_allclose(run(made(name), implementation), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_changes_no_bit(implementation):
    """Where a chunk lies, in a pool of all chunks, slot i holding chunk i, or of a few; ids and slots out of range."""
    inputs = made("ragged")
    chunks, units = inputs["chunks"], inputs["factors"].tokens.shape[2]
    lead, few, of_slot = chunks.pool.shape[:3], chunks.pool.shape[3], chunks.pool.shape[4:]
    whole = np.full((*lead, units, *of_slot), np.nan, np.float32)
    for b, head, j in zip(*np.nonzero(np.asarray(chunks.ids) >= 0), strict=True):
        whole[:, b, head, chunks.ids[b, head, j]] = chunks.pool[:, b, head, chunks.slots[b, head, j]]

    def answer(pool, ids, slots):
        listed = Chunks(*(jnp.asarray(x) for x in (pool, ids, slots)))
        return run(inputs | {"chunks": listed}, implementation)

    ids, slots = (np.array(x) for x in chunks[1:])
    expected = run(inputs, implementation)
    np.testing.assert_array_equal(answer(whole, ids, ids), expected)
    # Where nothing is listed; the pool is finite, so that reading it would show.
    ids[1:, :, 4:], slots[1:, :, 4:] = WILD[:2], [0, 1]
    ids[2, :, :4], slots[2, :, :4] = [*WILD[2:], units, 0], [2, 3, 0, few]
    np.testing.assert_array_equal(answer(jnp.nan_to_num(chunks.pool, nan=1e3), ids, slots), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_64_bit_numbers(implementation):
    inputs = made("ragged")
    call = jax.jit(functools.partial(rebuilt_attention, implementation=implementation, scale=0.4))
    with jax.enable_x64(True), _backend.interpreted():
        ours = call(**inputs)
    np.testing.assert_array_equal(ours, run(inputs, implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wild, means", [(-(2**31), 0), (-1, 0), (2**31 - 1, 70)])
def test_lengths_out_of_range(implementation, wild, means):
    """None of the exact tokens, or all that there is room for."""
    inputs = made("ragged")
    tokens = jnp.nan_to_num(inputs["exact"].tokens, nan=0.5)
    answer = lambda length: run(
        inputs | {"exact": Exact(tokens, jnp.array([50, length, 0], jnp.int32))}, implementation
    )
    np.testing.assert_array_equal(answer(wild), answer(means))
