"""The integer geometry of blocks and pooling windows, once for everybody.

Tokens 0..S-1 are cut into blocks of `block_size`; block m holds tokens P*m .. P*m+P-1. Keys are mean-pooled over
windows of `2 * stride` tokens that start every `stride` tokens; window c covers tokens stride*c .. stride*c+2*stride-1.

Packed rows: a row may hold several documents, each starting on a block boundary. They are described by `first_block`
[B, M] int32: for every block, the first block of its document (all zero, or None, when rows are single documents).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def num_blocks(num_tokens: int, block_size: int) -> int:
    """M = ceil(S / P)."""
    return -(-num_tokens // block_size)


def block_bytes(block_size: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block of one layer and KV head, K and V, of numbers of `itemsize` bytes."""
    return 2 * block_size * head_dim * itemsize


MAX_SIZE = 2**16  # tokens of a block, blocks of a selection: arrays are padded to as many
MAX_STRIDE = 1024  # the tokens of a stride are added one by one in an unrolled loop


def num_windows(num_tokens: int, stride: int) -> int:
    """C: complete windows of 2 * stride tokens among `num_tokens`; 0 when there are too few."""
    return max(0, num_tokens // stride - 1)


def query_blocks(positions: Int32[Array, "*queries"], block_size: int) -> Int32[Array, "*queries"]:
    """The block of each query; -1 for padding (position -1)."""
    return jnp.where(positions >= 0, positions // block_size, -1)


def query_first_blocks(
    positions: Int32[Array, "B T"], first_block: Int32[Array, "B M"] | None, block_size: int
) -> Int32[Array, "B T"]:
    """The first block of each query's document; 0 without packing."""
    if first_block is None:
        return jnp.zeros_like(positions)
    blocks = jnp.clip(positions // block_size, 0, first_block.shape[-1] - 1)
    return jnp.take_along_axis(first_block, blocks, axis=-1)


def visible_windows(
    positions: Int32[Array, "B T"], query_first: Int32[Array, "B T"], windows: int, *, block_size: int, stride: int
) -> Bool[Array, "B T C"]:
    """Window c is visible to the query at position i iff it ends at or before i, inside i's document."""
    start = stride * jnp.arange(windows, dtype=jnp.int32)
    end = start + 2 * stride - 1
    inside = start >= block_size * query_first[..., None]
    return (end <= positions[..., None]) & inside


def num_visible_windows(positions: Int32[Array, "*queries"], windows: int, stride: int) -> Int32[Array, "*queries"]:
    """How many of a row's windows end at or before each query: window c ends with token stride * c + 2 * stride - 1."""
    tokens = jnp.minimum(positions, jnp.iinfo(jnp.int32).max - 1) + 1
    return jnp.clip(tokens // stride - 1, 0, windows)


def pool_windows_to_blocks(
    window_scores: Float[Array, "B *rest C"], first_block: Int32[Array, "B M"] | None, *, blocks: int, ratio: int
) -> Float[Array, "B *rest M"]:
    """Block m takes the maximum over the windows ratio*m-1 .. ratio*m+ratio-1 that exist; -inf where none does.

    ratio: block_size // stride. The leftmost window overlaps block m-1; it does not exist where m starts a document.
    """
    lead = window_scores.shape[:-1]
    width = blocks * ratio
    pad = [(0, 0)] * len(lead) + [(0, max(0, width - window_scores.shape[-1]))]
    padded = jnp.pad(window_scores, pad, constant_values=-jnp.inf)[..., :width].reshape(*lead, blocks, ratio)
    own = padded.max(-1)
    left = jnp.roll(padded[..., -1], 1, axis=-1)
    block_ids = jnp.arange(blocks, dtype=jnp.int32)
    if first_block is None:
        has_left = block_ids > 0
    else:
        has_left = (block_ids > first_block).reshape(first_block.shape[0], *(1,) * (len(lead) - 1), blocks)
    return jnp.where(has_left, jnp.maximum(own, left), own)


def forced_and_visible(
    query_block: Int32[Array, "*queries"], query_first: Int32[Array, "*queries"], blocks: int, *, sink: int, local: int
) -> tuple[Bool[Array, "*queries M"], Bool[Array, "*queries M"]]:
    """(forced, visible) blocks of each query: sink and local window are forced; later blocks are invisible."""
    m = jnp.arange(blocks, dtype=jnp.int32)
    q, first = query_block[..., None], query_first[..., None]
    visible = (m <= q) & (m >= first)
    return visible & ((m - first < sink) | (m > q - local)), visible


def to_load(missing: Int32[Array, "B K J"], positions: Int32[Array, " B"], block_size: int) -> Int32[Array, "B K J"]:
    """The missing blocks but for one that starts with the very token at its row's position; -1 for none."""
    own = jnp.where(positions % block_size == 0, positions // block_size, -1)[:, None, None]
    return jnp.where(missing == own, -1, missing)


def replace_selection(
    block_ids: Int32[Array, "*queries J"],
    forced_block_ids: Int32[Array, "*forced J"],
    where: Bool[Array, "*where"],
) -> Int32[Array, "*queries J"]:
    """The forced ids where `where` (broadcast over J) says so and there are any, not -1 alone, else the selected."""
    return jnp.where(where & (forced_block_ids >= 0).any(-1, keepdims=True), forced_block_ids, block_ids)


def new_places(
    start: Int32[Array, " B"], count: Int32[Array, " B"], width: int, capacity: int
) -> Int32[Array, "B 1 width"]:
    """Row positions of new tokens, of which the first `count[b]` follow `start[b]` others; `capacity` for the rest."""
    new = jnp.arange(width, dtype=jnp.int32)
    return jnp.where(new < count[:, None], start[:, None] + new, capacity)[:, None]


def slice_start(*indices: Any) -> tuple[Int32[Array, ""], ...]:
    """Where a dynamic slice starts: it takes indices of one dtype, and Python's ints would be int64 under x64."""
    return tuple(jnp.asarray(index, jnp.int32) for index in indices)


def whole_rows(batch: int, length: int) -> Int32[Array, "B T"]:
    """Positions of queries that are all tokens of their rows: query t is token t."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
