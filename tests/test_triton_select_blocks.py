"""The Triton kernel of block selection in Pallas' interpreter, against the rule in plain Python."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_checks import STATIC, counts, drawn_inputs, unneeded_scores_as_nan

from pallas_kernels import _backend, select_blocks
from pallas_kernels.select_blocks import reference
from pallas_kernels.select_blocks.cases import SMALL, make_inputs, options


@functools.partial(jax.jit, static_argnames=STATIC)
def run(inputs, **options):
    with _backend.interpreted():
        return select_blocks(**inputs, **options, implementation="triton")


def assert_same_as_python(inputs, **options):
    inputs = {name: x if x is None else np.asarray(x) for name, x in inputs.items()}
    ours = run(inputs, **options)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, reference.select_blocks_ref(**inputs, **options))


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_rule(name):
    assert_same_as_python(make_inputs(SMALL[name], jax.random.key(2)), **options(SMALL[name]))


@settings(max_examples=12)  # `test_ops_select_blocks` draws more, for the rule itself
@given(drawn_inputs(), st.sampled_from([(5, 1, 2, 2), (4, 0, 2, 1), (10, 2, 1, 0)]))
def test_matches_the_rule_when_scores_tie(inputs, budget):
    """Few values, -inf, inf and NaN among them; budgets beyond the 9 blocks; by query scores or importance alone."""
    assert_same_as_python(inputs, **counts(*budget))


def numbers(rng, spread, *shape):
    """Of both signs and any size, with ties; spread: how far exponents go."""
    drawn = rng.standard_normal(shape) * 10.0 ** rng.integers(-spread, spread + 1, shape)
    drawn = np.where(rng.random(shape) < 0.1, np.float32(0.5), drawn)
    return np.where(rng.random(shape) < 0.1, -np.inf, drawn).astype(np.float32)


@pytest.mark.parametrize("kind", ["both", "query_scores", "importance_scores"])
@pytest.mark.parametrize("queries, spread", [(20, 0), (20, 38), (5, 38)])
def test_scores_of_any_size(kind, queries, spread):
    """Found bit by bit for many queries, digit by digit for few.

    37 blocks, no power of two; from the smallest to the largest float32 (-inf counts as the lowest finite one).
    """
    rng = np.random.default_rng(spread)
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    extremes = np.array(
        [tiny, -tiny, huge, -huge / 2, np.inf, np.nextafter(np.float32(1), np.float32(2)), 1], np.float32
    )
    scores = {
        "query_scores": numbers(rng, spread, 2, 1, queries, 37),
        "importance_scores": numbers(rng, spread, 2, 1, 37),
    }
    for x in scores.values():
        x[..., 3 : 3 + len(extremes)] = extremes
    scores = {name: x if kind in ("both", name) else None for name, x in scores.items()}
    defaults = {"query_scores": None, "importance_scores": None, "first_block": None}
    positions = rng.integers(-1, 4 * 37, (2, queries)).astype(np.int32)
    assert_same_as_python(defaults | scores | {"positions": positions}, **counts(9, 1, 2, 3))


def test_forced_and_later_blocks_need_no_score():
    case = SMALL["k2_g8_chunk"]
    inputs = jax.tree.map(np.asarray, make_inputs(case, jax.random.key(2)))
    dirty = unneeded_scores_as_nan(case, inputs)
    np.testing.assert_array_equal(run(dirty, **options(case)), run(inputs, **options(case)))
