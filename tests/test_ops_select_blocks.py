"""Block selection in XLA against the rule in plain Python, and against selections of the published code."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_checks import STATIC, counts, drawn_inputs, unneeded_scores_as_nan

from pallas_kernels import blocks, pool_keys, select_blocks
from pallas_kernels.select_blocks import reference
from pallas_kernels.select_blocks.cases import SMALL, make_inputs, options

GOLDEN = Path(__file__).parent / "golden" / "cases"


@functools.partial(jax.jit, static_argnames=STATIC)
def run(inputs, **options):
    return select_blocks(**inputs, **options, implementation="xla")


def assert_same_as_python(inputs, **options):
    inputs = {name: x if x is None else np.asarray(x) for name, x in inputs.items()}
    ours = run(inputs, **options)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, reference.select_blocks_ref(**inputs, **options))


def test_by_hand():
    """Eight blocks of 4 tokens, five selected: sink 0, local 5 and 6, one by query score, the rest by importance."""
    query = jnp.array([[[[0.0, 0.1, 0.9, 0.9, 0.2, 0.0, 0.0, 5.0]]]])
    importance = jnp.array([[[9.0, 0.3, 0.1, 0.3, 0.3, 0.2, 0.1, 9.0]]])
    inputs = {"positions": jnp.array([[26]], jnp.int32), "first_block": None}
    five = counts(5, 1, 2, 1)

    def ids(query, importance):
        return run(inputs | {"query_scores": query, "importance_scores": importance}, **five)[0, 0, 0].tolist()

    # By query: 2 ties with 3 and is lower. By importance: 1 ties with 3 and 4. Block 7 lies in the future.
    assert ids(query, importance) == [0, 1, 2, 5, 6]
    assert ids(query, None) == [0, 2, 3, 5, 6]
    assert ids(None, importance) == [0, 1, 3, 5, 6]
    # A visible block may be picked even at -inf: by query all tie and 1 is lowest, then 4 by importance.
    rising = jnp.arange(8.0)[None, None]
    assert ids(jnp.full_like(query, -jnp.inf), rising) == [0, 1, 4, 5, 6]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_score_drops_a_forced_block(value, dtype):
    """NaN and -inf count as the lowest number, inf as the largest: the query's own block stays whatever the scores."""
    query = jnp.full((1, 1, 1, 8), value, dtype)
    importance = jnp.full((1, 1, 8), value, dtype)
    inputs = {"positions": jnp.array([[26]], jnp.int32), "first_block": None}
    for scores in ((query, importance), (query, None), (None, importance)):
        named = dict(zip(("query_scores", "importance_scores"), scores, strict=True))
        assert run(inputs | named, **counts(5, 1, 2, 1))[0, 0, 0].tolist() == [0, 1, 2, 5, 6]
    mixed = jnp.asarray([[[9.0, np.nan, 1.0, np.inf, -np.inf, 0.0, 0.0, 5.0]]], dtype)
    assert run(inputs | {"query_scores": None, "importance_scores": mixed}, **counts(5, 1, 2, 1))[0, 0, 0].tolist() == [
        0, 2, 3, 5, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_rule(name):
    assert_same_as_python(make_inputs(SMALL[name], jax.random.key(2)), **options(SMALL[name]))


@settings(max_examples=60)
@given(drawn_inputs(), st.sampled_from([(5, 1, 2, 2), (4, 0, 2, 1), (10, 2, 1, 0)]))
def test_matches_the_rule_when_scores_tie(inputs, budget):
    assert_same_as_python(inputs, **counts(*budget))


def test_forced_and_later_blocks_need_no_score():
    case = SMALL["k2_g8_chunk"]
    inputs = jax.tree.map(np.asarray, make_inputs(case, jax.random.key(2)))
    dirty = unneeded_scores_as_nan(case, inputs)
    assert np.isnan(dirty["importance_scores"]).sum(-1).min() >= 2
    np.testing.assert_array_equal(run(dirty, **options(case)), run(inputs, **options(case)))


@pytest.mark.parametrize("budget", [(4, 1, 2, 2), (2, 1, 2, 0)])
def test_budget_too_small(budget):
    inputs = make_inputs(SMALL["k2_g8_chunk"], jax.random.key(2))
    with pytest.raises(ValueError, match=r"^num_selected_blocks: must hold sink, local and query blocks, got \d < "):
        select_blocks(**inputs, **counts(*budget, block_size=16))


def test_query_blocks_count_only_beside_importance():
    # By query scores alone there is one kind of pick: num_query_blocks is no part of the budget.
    inputs = make_inputs(SMALL["k2_g8_chunk"], jax.random.key(2)) | {"importance_scores": None}
    assert_same_as_python(inputs, **counts(4, 1, 2, 9, block_size=16))


def test_no_scores_at_all():
    positions = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"^query_scores, importance_scores: one of them must be given"):
        select_blocks(None, None, positions, **counts(3, 1, 1, 1))


# ---- against the published code ----

SETTINGS = {  # (budget, sink, window without the own block, query count with the forced one): their numbers
    "p1500": (8, 1, 2, 2),
    "p1500b": (12, 2, 4, 3),
    "d1500": (8, 1, 2, 2),
    "d1000": (64, 1, 16, 16),
    "d4097": (64, 1, 16, 16),
    "d5000": (64, 1, 16, 16),
    "d8192": (64, 1, 16, 16),
}


@functools.cache
def published(method: str):
    with np.load(GOLDEN / f"select_{method}.npz") as file:
        return dict(file)


@functools.partial(jax.jit, static_argnames=("num_blocks", *STATIC))
def from_window_scores(windows, importance, positions, *, num_blocks, **options):
    """Selection from window scores [B, K, T, C] and importance of tokens [B, K, S] (or None)."""

    def to_blocks(scores):
        return blocks.pool_windows_to_blocks(scores, None, blocks=num_blocks, ratio=4)

    fill = None if importance is None else to_blocks(pool_keys(importance[..., None], stride=16)[..., 0])
    return select_blocks(to_blocks(windows), fill, positions, **options)


@pytest.mark.parametrize("method", ["nosa", "infllmv2"])
@pytest.mark.parametrize("config", SETTINGS)
def test_published_selections(method, config):
    """All stored repeats of a configuration as one batch; their ids are as wide as there are blocks at most."""
    arrays = published(method)
    repeats = sorted({name.split(".")[0] for name in arrays if name.startswith(f"{config}_")})
    assert repeats

    def stack(array):
        return np.stack([arrays[f"{repeat}.{array}"] for repeat in repeats])

    tokens = int(config[1:5])
    rows = stack("rows") if config.startswith("p") else np.full((len(repeats), 1), tokens - 1)
    importance = stack("cis").swapaxes(1, 2) if method == "nosa" else None
    selected, sink, window, query = SETTINGS[config]
    num_blocks = blocks.num_blocks(tokens, 64)
    ours = from_window_scores(
        stack("stage1"), importance, rows.astype(np.int32),
        num_blocks=num_blocks, **counts(selected, sink, window + 1, query - 1, block_size=64),
    )  # fmt: skip
    assert ours.shape[-1] == selected

    def as_sets(ids):
        return (np.asarray(ids)[..., None] == np.arange(num_blocks)).any(-2)

    np.testing.assert_array_equal(as_sets(ours), as_sets(stack("topk_idx")))
    np.testing.assert_array_equal((np.asarray(ours) >= 0).sum(-1), (stack("topk_idx") >= 0).sum(-1))
