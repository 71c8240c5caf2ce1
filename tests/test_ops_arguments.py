"""What every op takes for its arrays, layers, scales and counts, and how it refuses anything else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_calls import CALLS, STORE, B, C, D, J, K, L, M, P, floats

import pallas_kernels as ops


def as_numpy(x):
    return jax.tree.map(np.asarray, x)


def run_op(name, **changes):
    """The shapes of what the op gives for its arguments with some changed."""
    arrays, static = CALLS[name]
    return jax.eval_shape(lambda: getattr(ops, name)(**(arrays | static | changes), implementation="xla"))


@pytest.mark.parametrize("name", CALLS)
def test_numpy_arrays_lists_and_ints_are_taken(without_type_checker, name):
    """Integers of any width, nested lists of them, and a Python int for the layer."""
    arrays, static = CALLS[name]
    plain = as_numpy(arrays)
    wide = {n: x.astype(np.int64) if isinstance(x, np.ndarray) and x.dtype == np.int32 else x for n, x in plain.items()}
    lists = {n: x.tolist() for n, x in plain.items() if isinstance(x, np.ndarray) and x.ndim < 3}
    counts = {n: np.int64(x) for n, x in static.items() if type(x) is int}
    expected = run_op(name)
    for changes in (plain, wide | counts, lists):
        assert run_op(name, **changes) == expected


def wrong_dtypes():
    """(op, argument, part, dtype) of every array that an op takes."""
    for name, (arrays, _) in CALLS.items():
        for argument, value in arrays.items():
            leaves, structure = jax.tree.flatten(value)
            for i, leaf in enumerate(leaves):
                is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
                for dtype in ("int32", "bool", "complex64") if is_float else ("float32", "bool", "complex64"):
                    wrong = [x.astype(dtype) if j == i else x for j, x in enumerate(as_numpy(leaves))]
                    yield pytest.param(
                        name, argument, jax.tree.unflatten(structure, wrong), dtype,
                        "floats" if is_float else "integers", id=f"{name}-{argument}{i}-{dtype}",
                    )  # fmt: skip


@pytest.mark.parametrize("name, argument, wrong, dtype, kind", list(wrong_dtypes()))
def test_every_array_has_its_kind_of_numbers(without_type_checker, name, argument, wrong, dtype, kind):
    with pytest.raises(TypeError, match=rf"^{argument}[^:]*: must hold {kind}, got {dtype}"):
        run_op(name, **{argument: wrong})


WITH_LAYER = [name for name in CALLS if "layer" in CALLS[name][0]]


@pytest.mark.parametrize("name", WITH_LAYER)
@pytest.mark.parametrize("layer", [L, -1, np.int64(L), jnp.int32(-1)])
def test_layers_that_are_not_there(without_type_checker, name, layer):
    with pytest.raises(ValueError, match=rf"^layer: must be in \[0, L = {L}\), got {layer}"):
        run_op(name, layer=layer)


@pytest.mark.parametrize("layer", [True, 0.0, "0", None])
def test_layers_that_are_no_integers(without_type_checker, layer):
    for name in WITH_LAYER:
        with pytest.raises(TypeError, match=r"^layer: must "):
            run_op(name, layer=layer)
    with pytest.raises(ValueError, match=r"^layer: must have shape "):
        run_op("resolve_slots", layer=jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("name", ["block_attention", "decode_attention", "rebuilt_attention", "update_and_attend"])
def test_scales(without_type_checker, name):
    for scale, error in ((np.nan, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^scale: must be "):
            run_op(name, scale=scale)
    for scale in (np.float32(0.5), jnp.float32(0.5), 1):
        run_op(name, scale=scale)


def counts_of(static):
    """The arguments that are one number each; `append_and_select` has a tuple of them."""
    return [argument for argument, value in static.items() if type(value) is int]


@pytest.mark.parametrize(
    "name, argument",
    [(name, argument) for name, (_, static) in CALLS.items() for argument in counts_of(static)],
)
def test_counts_are_integers(without_type_checker, name, argument):
    for wrong, error in ((2.0, TypeError), (True, TypeError), ("2", TypeError), (-1, ValueError)):
        with pytest.raises(error, match=rf"^{argument}: must be "):
            run_op(name, **{argument: wrong})


@pytest.mark.parametrize("number", [10**30, 2**62, 2**31])
def test_counts_beyond_int32(without_type_checker, number):
    """Refused before anything is traced or held."""
    for name, (_, static) in CALLS.items():
        for argument in counts_of(static):
            with pytest.raises(ValueError, match=rf"^{argument}: must be <= "):
                run_op(name, **{argument: number})


@pytest.mark.parametrize("field", ops.Sizes._fields)
def test_sizes_are_counts(without_type_checker, field):
    sizes = CALLS["append_and_select"][1]["sizes"]
    for wrong, error in ((2.0, TypeError), (True, TypeError), ("2", TypeError), (-1, ValueError), (2**62, ValueError)):
        with pytest.raises(error, match=rf"^sizes\.{field}: must be "):
            run_op("append_and_select", sizes=sizes._replace(**{field: wrong}))


def test_blocks_that_hold_more_tokens_than_positions_count(without_type_checker):
    with pytest.raises(ValueError, match=r"^num_blocks: must be below 2\*\*31 / block_size = 134217728, "):
        run_op("block_scores", num_blocks=2**31 // P)


def test_no_more_tokens_are_counted_than_are_given(without_type_checker):
    for count in (2, -1):
        with pytest.raises(ValueError, match=r"^count: must be in \[0, n = 1\]"):
            run_op("append_pooled_keys", count=jnp.full(B, count, jnp.int32))
    pooled, sums = run_op("append_pooled_keys", new=floats(B, K, 0, D))
    assert pooled.shape == (L, B, K, C, D) and sums.shape == (L, B, K, 2, D)


def test_summaries_say_which_part_is_wrong(without_type_checker):
    summaries = CALLS["append_token"][0]["summaries"]
    with pytest.raises(TypeError, match=r"^summaries\.pooled_keys\[0\]: must hold floats"):
        run_op("append_token", summaries=summaries._replace(pooled_keys=(jnp.zeros((L, B, K, C, D), int), None)))
    tokens = {"start": jnp.zeros(B, int), "count": jnp.ones(B, int), "layer": 0, "stride": 2}
    with pytest.raises(TypeError, match=r"^keys: must be given"):
        ops.append_summaries(summaries, None, None, **tokens)
    half = summaries._replace(pooled_importance=None)
    with pytest.raises(ValueError, match=r"^summaries: must hold importance and pooled_importance, or neither"):
        ops.append_summaries(half, floats(B, K, 1, D), floats(B, K, 1), **tokens)


def test_dtypes_that_go_together(without_type_checker):
    half = floats(L, B, K, J, 2, P, D).astype(jnp.bfloat16)
    for name in ("fetch_blocks", "write_back_blocks"):
        with pytest.raises(TypeError, match=r"^host: must be bfloat16, as the pool is, got float32"):
            run_op(name, pool=half)
    with pytest.raises(TypeError, match=r"^store\.host: must be bfloat16, as the pool is, got float32"):
        run_op("update_and_attend", store=STORE._replace(pool=half))
    with pytest.raises(TypeError, match=r"^sums: must be float32, as running sums are, got float16"):
        run_op("append_pooled_keys", sums=floats(L, B, K, 2, D).astype(jnp.float16))


def test_a_host_store_in_device_memory(without_type_checker):
    with pytest.raises(ValueError, match=r"^host: must be in pinned_host memory, .*device_put\(host, "):
        run_op("write_back_blocks", host=floats(L, B * M, K, 2, P, D))


def test_numpy_gives_the_bits_of_jax(without_type_checker):
    """Outside jit, with lists where integers go."""
    arrays, static = CALLS["select_blocks"]
    scores = np.random.default_rng(0).standard_normal(arrays["query_scores"].shape).astype(np.float32)
    places = np.full(arrays["positions"].shape, 40)
    ours = ops.select_blocks(scores, None, places.tolist(), **static)
    theirs = ops.select_blocks(jnp.asarray(scores), None, jnp.asarray(places, jnp.int32), **static)
    np.testing.assert_array_equal(ours, theirs)
