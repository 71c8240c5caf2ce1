"""Pooled keys: the mean as defined, and the same bits however the tokens arrive."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import append_pooled_keys, blocks, pool_keys
from pallas_kernels.pooled_keys import reference
from pallas_kernels.pooled_keys.cases import SMALL, make_inputs

GOLDEN = Path(__file__).parent / "golden" / "cases"
EPS = float(jnp.finfo(jnp.float32).eps)

whole = jax.jit(functools.partial(pool_keys, implementation="xla"), static_argnames="stride")
append = jax.jit(functools.partial(append_pooled_keys, implementation="xla"), static_argnames="stride")


def test_by_hand():
    # stride 2: windows 0-3, 2-5; token 6 completes nothing.
    keys = jnp.array([1.0, 2, 3, 6, 7, 8, 100])[None, None, :, None]
    np.testing.assert_array_equal(whole(keys, stride=2)[0, 0, :, 0], [3, 6])


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_reference(name):
    case = SMALL[name]
    keys = make_inputs(case, jax.random.key(0))
    pooled = whole(keys, stride=case.stride)
    expected = reference.pool_keys_ref(keys.astype(jnp.float32), stride=case.stride)
    assert pooled.shape == expected.shape and pooled.dtype == keys.dtype
    rounding = float(jnp.finfo(keys.dtype).eps) / 2 if keys.dtype == jnp.bfloat16 else 0
    # Sums of up to 32 numbers of size 1, then one rounding to the dtype of the keys.
    error = np.abs(np.asarray(pooled, np.float32) - expected)
    assert (error <= 4 * EPS + rounding * np.abs(expected) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_matches_the_published_pooling(name):
    """Importance of several sequences, pooled one by one: 0 windows for 31 tokens, 1 for 32."""
    with np.load(GOLDEN / "units_ops.npz") as file:
        cis, cu, out = (file[f"meanpool_{name}.{array}"] for array in ("cis", "cu", "out_per_seq"))
    for b, (start, end) in enumerate(itertools.pairwise(cu)):
        ours = np.asarray(whole(jnp.asarray(cis[start:end].T[None, :, :, None]), stride=16))[0, :, :, 0]
        assert ours.shape[1] == blocks.num_windows(int(end - start), 16)
        np.testing.assert_allclose(ours, out[b, :, : ours.shape[1]], rtol=0, atol=2 * EPS)


LAYERS, ROWS, HEADS, TOKENS, DIM, STRIDE = 2, 3, 2, 57, 4, 4
WIDTHS = (1, 6, 19)  # of one call


@functools.cache
def example(dtype: str):
    """(keys, their pooled windows)"""
    rng = np.random.default_rng(0)
    # Of very different sizes, so that another order of addition gives other bits.
    keys = rng.standard_normal((ROWS, HEADS, TOKENS, DIM)) * 10.0 ** rng.integers(-3, 4, (TOKENS, 1))
    keys = jnp.asarray(keys, dtype)
    return np.asarray(keys), np.asarray(whole(keys, stride=STRIDE))


def empty(dtype: str, capacity: int):
    """Pooled keys and sums before the first token; the windows are memory never written."""
    pooled = jnp.full((LAYERS, ROWS, HEADS, capacity, DIM), jnp.nan, dtype)
    return pooled, jnp.zeros((LAYERS, ROWS, HEADS, 2, DIM), jnp.float32)


@st.composite
def arrivals(draw):
    """A list of (width, tokens that arrive in each row); rows go ahead at their own pace."""
    calls, arrived = [], np.zeros(ROWS, int)
    for _ in range(draw(st.integers(1, 12))):
        width = draw(st.sampled_from(WIDTHS))
        count = np.array([draw(st.integers(0, min(width, TOKENS - n))) for n in arrived])
        calls.append((width, count))
        arrived = arrived + count
    return calls


@settings(max_examples=60)
@given(arrivals(), st.sampled_from([("float32", 13), ("bfloat16", 5)]))
def test_any_split_gives_the_same_bits(calls, kind):
    """Rows of different starts and counts, layer 1 of 2; beyond `capacity` windows nothing is written."""
    dtype, capacity = kind
    keys, expected = example(dtype)
    pooled, sums = empty(dtype, capacity)
    start = np.zeros(ROWS, np.int32)
    for width, count in calls:
        new = np.full((ROWS, HEADS, width, DIM), np.nan, keys.dtype)  # what comes after `count` is no token
        for b in range(ROWS):
            new[b, :, : count[b]] = keys[b, :, start[b] : start[b] + count[b]]
        pooled, sums = append(
            pooled, sums, jnp.asarray(new), jnp.asarray(start), jnp.asarray(count, jnp.int32),
            jnp.asarray(1, jnp.int32), stride=STRIDE,
        )  # fmt: skip
        start = start + count.astype(np.int32)
    pooled, sums = np.asarray(pooled), np.asarray(sums)
    assert np.isnan(pooled[0]).all() and (sums[0] == 0).all()
    for b, arrived in enumerate(start):
        ready = min(capacity, blocks.num_windows(int(arrived), STRIDE))
        np.testing.assert_array_equal(pooled[1, b, :, :ready], expected[b, :, :ready])
        assert np.isnan(pooled[1, b, :, ready:]).all()  # nothing is written early
        np.testing.assert_array_equal(sums[1, b], expected_sums(keys[b], int(arrived)))


def expected_sums(keys, arrived):
    """[K, 2, D]: of the last complete stride and of the open one, added one by one in float32."""
    open_from = arrived - arrived % STRIDE
    sums = np.zeros((HEADS, 2, DIM), np.float32)
    for token in range(max(0, open_from - STRIDE), arrived):
        sums[:, int(token >= open_from)] += keys[:, token].astype(np.float32)
    return sums


@pytest.mark.parametrize("name", ["bfloat16", "importance"])
def test_chunks_of_the_cases(name):
    case = SMALL[name]
    keys = make_inputs(case, jax.random.key(0))
    windows = blocks.num_windows(case.tokens, case.stride)
    pooled = jnp.zeros((1, case.batch, case.kv_heads, windows, case.dim), case.dtype)
    sums = jnp.zeros((1, case.batch, case.kv_heads, 2, case.dim), jnp.float32)
    layer = jnp.asarray(0, jnp.int32)
    for start in range(0, case.tokens, case.chunk):
        count = min(case.chunk, case.tokens - start)
        new = jnp.pad(keys[:, :, start : start + count], ((0, 0), (0, 0), (0, case.chunk - count), (0, 0)))
        here, arrived = (jnp.full((case.batch,), n, jnp.int32) for n in (start, count))
        given = (pooled, sums, new, here, arrived, layer)
        pooled, sums = append(*given, stride=case.stride)
        expected = reference.append_pooled_keys_ref(*map(np.asarray, given[:-1]), 0, stride=case.stride)
        for ours, theirs in zip((pooled, sums), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pooled[0], whole(keys, stride=case.stride))
