"""What the three policies do alike: lists of ids, tokens of units, and what is kept of all layers.

Shapes: B rows, K KV heads, N = K * G query heads (head n reads KV head n // G), D head dim, S tokens of a store, A of a
list. Ids and positions are int32, -1 for nothing. All sums are float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


def rows_of(x: Array) -> Int32[Array, " B"]:
    """0 .. B-1, to index one place of each row."""
    return jnp.arange(x.shape[0], dtype=jnp.int32)


def unit_tokens(ids: Int32[Array, "*rows n"], size: int, first: int = 0) -> Int32[Array, "*rows tokens"]:
    """Positions of the tokens of units of `size` tokens, unit 0 beginning at `first`; -1 for those of id -1."""
    tokens = first + ids[..., None] * size + jnp.arange(size, dtype=jnp.int32)
    return jnp.where(ids[..., None] >= 0, tokens, -1).reshape(*ids.shape[:-1], ids.shape[-1] * size)


def compact(ids: Int32[Array, "*rows n"], keep: Bool[Array, "*rows n"]) -> Int32[Array, "*rows n"]:
    """The ids to keep, in their order, then -1."""
    order = jnp.argsort(~keep, axis=-1, stable=True)
    return jnp.take_along_axis(jnp.where(keep, ids, -1), order, axis=-1)


def ascending(ids: Int32[Array, "*rows n"]) -> Int32[Array, "*rows n"]:
    """The ids sorted, -1 at the end."""
    last = jnp.iinfo(jnp.int32).max
    ids = jnp.sort(jnp.where(ids < 0, last, ids), axis=-1)
    return jnp.where(ids == last, -1, ids)


def among(ids: Int32[Array, "*rows n"], others: Int32[Array, "*rows m"]) -> Bool[Array, "*rows n"]:
    """Which ids, -1 apart, are in the other list of the same row."""
    return (ids >= 0) & (ids[..., :, None] == others[..., None, :]).any(-1)


def best(scores: Float[Array, "*rows n"], allowed: Bool[Array, "*rows n"], count: int) -> Int32[Array, "*rows count"]:
    """Places of the `count` best allowed scores, descending, ties to the lower place; -1 where there are no more."""
    values, places = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), count)
    return jnp.where(values > -jnp.inf, places, -1).astype(jnp.int32)


def take_tokens(store: Float[Array, "B K S D"], positions: Int32[Array, "B #K A"]) -> Float[Array, "B K A D"]:
    """The vectors at the positions; that of token 0 for -1."""
    return jnp.take_along_axis(store, jnp.clip(positions, 0, store.shape[2] - 1)[..., None], axis=2)


def at_layer(tree: Any, layer: Int32[Array, ""]) -> Any:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), tree)


def put_layer(whole: Array, part: Array, layer: Int32[Array, ""]) -> Array:
    """The stack with one layer replaced, in place where it may be."""
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)


def put_token(
    store: Float[Array, "L B K *n S D"],
    token: Float[Array, "B K *n D"],
    places: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K *n S D"]:
    """The stack with a token of each row written at its place; one outside of it is dropped. Writes these alone."""
    places = jnp.where(places < 0, store.shape[-2], places)
    # Every axis but the last by index: of a slice in between XLA would turn the whole stack around.
    cells = jnp.indices(token.shape[:-1], dtype=jnp.int32, sparse=True)
    put = store.at[layer, *cells, places.reshape(-1, *(1,) * (token.ndim - 2))]
    return put.set(token.astype(store.dtype), mode="drop", unique_indices=True)


def softmax(logits: Float[Array, "*rows A"], mask: Bool[Array, "*#rows A"]) -> Float[Array, "*rows A"]:
    """Over what `mask` allows, 0 elsewhere; all 0 where it allows nothing."""
    # Finite, so that a row with nothing allowed gives no NaN.
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - top), 0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def num_units(tokens: Int[Array, " B"], size: int) -> Int[Array, " B"]:
    """Units of `size` tokens that hold so many tokens, the last one perhaps in part."""
    return -(-tokens // size)
