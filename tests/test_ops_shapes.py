"""Arguments of ops that do not go together, and how the error names them."""

from __future__ import annotations

import jax.numpy as jnp
import jaxtyping
import pytest
from op_calls import (
    CALLS,
    CHUNKS,
    EXACT,
    FACTORS,
    RESIDENCE,
    STORE,
    TOKEN,
    B,
    C,
    D,
    J,
    K,
    L,
    M,
    N,
    P,
    S,
    T,
    X,
    call,
    floats,
    ints,
)

import pallas_kernels as ops

# op, argument at fault, its wrong value, the shape it should have
WRONG_SHAPES = [
    ("block_attention", "k", floats(B, K, S, D + 1), "[B, K, S, D]"),
    ("block_attention", "k", floats(B + 1, K, S, D), "[B, K, S, D]"),
    ("block_attention", "v", floats(B, K, S + 1, D), "[B, K, S, D]"),
    ("block_attention", "bias", floats(B, N, S), "[B, K, S]"),
    ("block_attention", "block_ids", ints(B, K, J, T), "[B, K, T, J]"),
    ("block_attention", "block_ids", ints(B, T, J), "[B, K, T, J]"),
    ("block_attention", "positions", ints(T), "[B, T]"),
    ("block_scores", "pooled_keys", floats(B, K, C, D + 1), "[B, K, C, D]"),
    ("block_scores", "positions", ints(B, T + 1), "[B, T]"),
    ("select_blocks", "query_scores", floats(B, K, T + 1, M), "[B, K, T, M]"),
    ("select_blocks", "importance_scores", floats(B, K, M + 1), "[B, K, M]"),
    ("append_pooled_keys", "sums", floats(L, B, K, 1, D), "[L, B, K, 2, D]"),
    ("append_pooled_keys", "new", floats(B, K, D), "[B, K, n, D]"),
    ("append_token", "qkv", floats(B, K, N // K + 2, D, 1), "[B, K, G + 2, D]"),
    ("append_token", "sin", floats(B, D), "[B, D / 2]"),
    ("append_token", "scale", floats(1, K), "[L, K]"),
    ("append_token", "delta", floats(L, K * D, K), "[L, K, D, K]"),
    ("append_token", "positions", ints(B, 1), "[B]"),
    ("decode_attention", "pool", floats(L, B + 1, K, J, 2, P, D), "[L, B, K, slots, 2, P, D]"),
    ("decode_attention", "pool", floats(L, B, K, J, 3, P, D), "[L, B, K, slots, 2, P, D]"),
    ("decode_attention", "bias", floats(L, B, K, M * P), "[L, B, K, M, P]"),
    ("decode_attention", "slots", ints(B, K, J + 1), "[B, K, J]"),
    ("decode_attention", "block_ids", ints(B, J), "[B, K, J]"),
    ("decode_attention", "positions", ints(B, 1), "[B]"),
    ("fetch_blocks", "host", floats(L, B * M, K, 2, P, D + 1), "[L, pages, K, parts, P, D]"),
    ("fetch_blocks", "page_table", ints(B + 1, M), "[B, M]"),
    ("fetch_blocks", "block_ids", ints(B, K), "[B, K, X]"),
    ("write_back_blocks", "slots", ints(L, B, K, X + 1), "[L, B, K, X]"),
    ("write_back_blocks", "block_ids", ints(B, K, X), "[L, B, K, X]"),
]


@pytest.mark.parametrize("name, argument, wrong, letters", WRONG_SHAPES)
def test_wrong_shapes_name_the_argument(without_type_checker, name, argument, wrong, letters):
    with pytest.raises(ValueError) as error:
        call(name, **{argument: wrong})
    message = str(error.value)
    assert message.startswith(f"{argument}: must have shape ")
    rule, got = message.split(", got ")
    assert letters.strip("[]") in rule
    assert ", ".join(map(str, wrong.shape)) in got  # the shape that came


@pytest.mark.parametrize("name", ["block_attention", "block_scores", "decode_attention", "rebuilt_attention"])
def test_heads_must_divide(without_type_checker, name):
    q = CALLS[name][0]["q"]
    odd = jnp.zeros((*q.shape[:-2], 3, q.shape[-1]), q.dtype)
    with pytest.raises(ValueError, match=r"^q: must have a multiple of K heads, got N=3, K=2"):
        call(name, q=odd)


def test_ids_must_be_integers(without_type_checker):
    with pytest.raises(TypeError, match=r"^block_ids: must hold integers, got float32"):
        call("block_attention", block_ids=floats(B, K, T, J))


def test_windows_must_fit_the_blocks():
    with pytest.raises(ValueError, match=r"^num_blocks: must cover every window, got 3 for C=7"):
        call("block_scores", pooled_keys=floats(B, K, 7, D))


def test_annotations_are_checked_here():
    """The suite runs with the type checker on: an op that takes what its annotation forbids would show."""
    with pytest.raises(jaxtyping.TypeCheckError):
        call("block_attention", positions=jnp.zeros((B, T), jnp.float32))
    call("block_attention")


@pytest.mark.parametrize(
    "positions, names",
    [([[0, 2, 1, 3, 4, 5, 6, 7]], "2 before 1 in row 0"), ([[0, 1, 2, 3, 0, 1, 2, 3]], "3 before 0 in row 0")],
)
def test_positions_must_ascend(positions, names):
    arrays, static = CALLS["block_attention"]
    changed = arrays | {"positions": jnp.asarray(positions * B, jnp.int32)}
    with pytest.raises(ValueError, match=rf"^positions: must ascend strictly along each row.*{names}"):
        ops.block_attention(**changed, **static)


@pytest.mark.parametrize(
    "name, argument",
    [("block_attention", "q"), ("block_attention", "bias"), ("block_scores", "q"), ("pool_keys", "keys")],
)
def test_integers_are_no_floats(without_type_checker, name, argument):
    arrays, _ = CALLS[name]
    with pytest.raises(TypeError, match=f"^{argument}: must hold floats, got int32"):
        call(name, **{argument: arrays[argument].astype(jnp.int32)})


WRONG_PARTS = [
    ("factors", FACTORS._replace(tokens=floats(L, B, M, C + 1, 3)), "factors.tokens"),
    ("factors", FACTORS._replace(heads=floats(L, B, K, 4, D)), "factors.heads"),
    ("factors", FACTORS._replace(cos=floats(M * C, D)), "factors.cos"),
    ("factors", FACTORS._replace(sin=floats(M, D // 2)), "factors.sin"),
    ("chunks", CHUNKS._replace(pool=floats(L, B, K, J, 2, C, D)), "chunks.pool"),
    ("chunks", CHUNKS._replace(ids=ints(B, J)), "chunks.ids"),
    ("chunks", CHUNKS._replace(slots=ints(B, K, J + 1)), "chunks.slots"),
    ("exact", EXACT._replace(tokens=floats(L, B, K, 2, S, D + 1)), "exact.tokens"),
    ("exact", EXACT._replace(lengths=ints(B, K)), "exact.lengths"),
    ("token", TOKEN._replace(q=floats(B, N, D + 1)), "store.pool"),
    ("token", TOKEN._replace(k=floats(B, N, D)), "token.k"),
    ("store", STORE._replace(bias=floats(L, B, K, M)), "store.bias"),
    ("store", STORE._replace(host=floats(L, B * M, K, 2, P, D + 1)), "store.host"),
    ("store", STORE._replace(page_table=ints(B + 1, M)), "store.page_table"),
    ("residence", RESIDENCE._replace(slots=ints(B, K, J + 1)), "residence.slots"),
    ("residence", RESIDENCE._replace(loads=ints(B, J)), "residence.loads"),
]


@pytest.mark.parametrize("argument, wrong, part", WRONG_PARTS)
def test_wrong_shapes_name_the_part(without_type_checker, argument, wrong, part):
    with pytest.raises(ValueError, match=rf"^{part}: must have shape "):
        call(
            "rebuilt_attention" if argument in ("factors", "chunks", "exact") else "update_and_attend",
            **{argument: wrong},
        )


def test_a_host_store_needs_loads_and_a_page_table():
    with pytest.raises(ValueError, match=r"^store\.page_table: must be given with store\.host, got None"):
        call("update_and_attend", store=STORE._replace(page_table=None))
    with pytest.raises(ValueError, match=r"^residence\.loads: must be given with store\.host, got None"):
        call("update_and_attend", residence=RESIDENCE._replace(loads=None))
    call("update_and_attend", residence=RESIDENCE._replace(loads=None), store=STORE._replace(host=None))
    assert (STORE.num_slots, STORE.block_size) == (J, P)
