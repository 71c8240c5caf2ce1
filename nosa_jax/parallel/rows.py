"""Rows, KV heads and queries: what each device does of attention, and in which order it has the tokens of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from nosa_jax.parallel.mesh import ROWS, current, fitting, size_of

PIECES = 2  # of a row that a device of `context` holds


def context_size(length: int) -> int:
    """Among how many devices the queries of rows of `length` tokens are shared; 1 where the mesh does not divide it."""
    mesh = current()
    size = 1 if mesh is None else size_of(mesh, "context")
    return size if length % (PIECES * size) == 0 else 1


def query_order(length: int) -> Int[np.ndarray, " T"] | None:
    """Which token of a row stands where, so that a cut among the devices of `context` gives each the same work.

    Device c of n gets piece c and piece 2n - 1 - c of 2n, ascending. None where rows are not cut.
    """
    size = context_size(length)
    if size == 1:
        return None
    pieces = np.arange(length).reshape(PIECES * size, -1)
    return pieces[_piece_order(size)].reshape(-1)


def in_query_order(x: Array, axis: int) -> Array:
    """`x`, whose `axis` counts the tokens of rows, as `query_order` has them."""
    order = query_order(x.shape[axis])
    return x if order is None else jax.numpy.take(x, order, axis=axis)


def in_row_order(x: Array, axis: int) -> Array:
    """The inverse of `in_query_order`."""
    order = query_order(x.shape[axis])
    return x if order is None else jax.numpy.take(x, np.argsort(order), axis=axis)


def _piece_order(size: int) -> np.ndarray:
    return np.array([piece for c in range(size) for piece in (c, PIECES * size - 1 - c)])


def all_tokens(x: Any) -> Any:
    """Inside `per_row_and_head`: [B, K, t, ...] of this device to that of all tokens of the rows, in their order."""
    if x is None or "context" not in jax.typeof(x).manual_axis_type.varying:
        return x
    size = jax.lax.axis_size("context")
    x = jax.lax.all_gather(x, "context", axis=2, tiled=True)
    pieces = x.reshape(*x.shape[:2], PIECES * size, -1, *x.shape[3:])
    return pieces[:, :, np.argsort(_piece_order(size))].reshape(x.shape)


def per_row_and_head[R](body: Callable[..., R], args: tuple[Any, ...], axes: tuple[Any, ...], out: Any) -> R:
    """`body(*args)` with every device doing its own rows, KV heads, queries and part of the vocabulary.

    None among the arguments stays.

    axes: per argument, and `out` per result, the letter of each dimension: "b" rows, "k" KV heads or query heads by KV
        head, "t" queries, "v" the vocabulary, "." for what is whole.
    """
    mesh = current()
    if mesh is None:
        return body(*args)
    shapes: dict[str, int] = {}
    for x, letters in zip(args, axes, strict=True):
        if x is not None:
            for letter, size in zip(letters, x.shape, strict=True):
                shapes[letter] = math.gcd(shapes.get(letter, size), size)
    cut = {
        "b": fitting(mesh, (shapes.get("b", 1),), P(ROWS))[0],
        "k": fitting(mesh, (shapes.get("k", 1),), P("tensor"))[0],
        "t": "context" if context_size(shapes.get("t", 1)) > 1 else None,
        "v": fitting(mesh, (shapes.get("v", 1),), P("tensor"))[0],
        ".": None,
    }
    to_spec = lambda letters: P(*(cut[letter] for letter in letters))
    in_specs = tuple(map(to_spec, axes))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=jax.tree.map(to_spec, out))(*args)
