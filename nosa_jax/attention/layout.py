"""How tokens lie in rows: positions, padding, packed documents; and the checks of token arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from nosa_jax._pytree import pytree_dataclass
from pallas_kernels.checks import as_integers, bad_value, is_concrete, require_shape


@pytree_dataclass
class Layout:
    """positions [B, T]: place in the row, -1 for padding. rope_positions [B, T]: place in the document.
    first_block [B, M]: first block of each block's document, None where rows hold one document each."""

    positions: Any
    rope_positions: Any
    first_block: Any = None


def row_layout(tokens: Int32[Array, "B T"], lengths: Int32[Array, " B"] | None) -> Layout:
    """Rows of one document each; tokens from `lengths` on are padding."""
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return Layout(place if lengths is None else jnp.where(place < lengths[:, None], place, -1), place)


def packed_layout(segment_ids: Int32[Array, "B T"], lengths: Int32[Array, " B"] | None, block_size: int) -> Layout:
    """Rows of several documents: the runs of one id >= 0 that start on a block boundary. All other tokens are padding.

    So whatever interrupts a document ends it, and no key that a query may see is padding.
    """
    batch, length = segment_ids.shape
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if lengths is not None:
        segment_ids = jnp.where(place < lengths[:, None], segment_ids, -1)
    changes = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(changes, place, 0), axis=1)
    real = (segment_ids >= 0) & (start % block_size == 0)
    first_block = -(-start[:, ::block_size] // block_size)
    first = jnp.repeat(first_block, block_size, axis=1)[:, :length]
    return Layout(jnp.where(real, place, -1), place - block_size * first, first_block)


def as_tokens(tokens: Any, vocab_size: int, *, rank: int = 2, name: str = "tokens", look: bool = True) -> Array:
    """int32 tokens of the right rank; values are checked where there are any to look at.

    look: False leaves values alone, for which those of a device would have to be waited for.
    """
    given, tokens = tokens, as_integers(name, tokens, look=look)
    if tokens.ndim != rank:
        letters = {1: "[B]", 2: "[B, T]"}[rank]
        raise bad_value(name, f"must be {letters}", f"shape {tokens.shape}", "Add or drop a batch axis.")
    if tokens.size == 0:
        raise bad_value(name, "must hold at least one token per row", f"shape {tokens.shape}", "Pass a prompt.")
    if look and is_concrete(tokens):
        values = given if isinstance(given, np.ndarray) else np.asarray(jax.device_get(tokens))
        wrong = np.argwhere((values < 0) | (values >= vocab_size))
        if wrong.size:
            where = tuple(int(i) for i in wrong[0])
            raise bad_value(
                name,
                f"ids must be in [0, vocab_size = {vocab_size})",
                f"{values[where]} at index {where}",
                "Use the tokenizer of this model; pad with a valid id and pass lengths.",
            )
    return tokens


def as_lengths(
    lengths: Any, batch: int, limit: int, *, minimum: int = 1, what: str = "tokens.shape[1]"
) -> Array | None:
    """int32 lengths [B] between `minimum` and `limit`, or None as given."""
    if lengths is None:
        return None
    lengths = as_integers("lengths", lengths)
    require_shape("lengths", lengths, (batch,), "[B]")
    if is_concrete(lengths):
        values = np.asarray(jax.device_get(lengths))
        wrong = np.flatnonzero((values < minimum) | (values > limit))
        if wrong.size:
            row = int(wrong[0])
            raise bad_value(
                "lengths",
                f"must be in [{minimum}, {what} = {limit}]",
                f"{values[row]} for row {row}",
                "Count the real tokens of each row.",
            )
    return lengths


def as_segment_ids(
    segment_ids: Any, shape: tuple[int, ...], block_size: int, lengths: Int32[Array, " B"] | None = None
) -> Array:
    """int32 segment ids [B, T] whose documents start on block boundaries; from `lengths` on they may be anything."""
    segment_ids = as_integers("segment_ids", segment_ids)
    require_shape("segment_ids", segment_ids, shape, "[B, T]")
    if is_concrete(segment_ids, lengths):
        values = np.array(jax.device_get(segment_ids))
        if lengths is not None:
            values[np.arange(shape[1]) >= np.asarray(jax.device_get(lengths))[:, None]] = -1
        starts = np.diff(values, axis=1, prepend=-1) != 0
        owner = np.repeat(values[:, ::block_size], block_size, axis=1)[:, : shape[1]]
        # A run of 0 that starts inside a block after a document counted from 1 is padding.
        wrong = starts & (values >= 0) & (np.arange(shape[1]) % block_size != 0) & ~((values == 0) & (owner > 0))
        if wrong.any():
            row, place = (int(i) for i in np.argwhere(wrong)[0])
            raise bad_value(
                "segment_ids",
                f"every document must start on a multiple of block_size = {block_size}, also where it goes on after "
                "padding, which ends it",
                f"document {values[row, place]} at token {place} of row {row}",
                "Pad each document up to a whole block, with segment id -1.",
            )
    return segment_ids
