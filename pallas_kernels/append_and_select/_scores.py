"""In kernels: the token, the weights of windows by chunks of them, and of those the scores of blocks.

A chunk's weights are under its own maximum. The scores bring the chunks to one measure and add up the heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _backend, blocks
from pallas_kernels._backend import LARGE
from pallas_kernels.append_token.triton import (
    Opened,
    append_importance,
    group_members,
    load_sums,
    rotated,
    store_token,
)
from pallas_kernels.select_blocks.triton import ordered


class Geometry(NamedTuple):
    """What the kernels are compiled for.

    keys: windows of a chunk. rows: query heads of a group, padded. factor: binary orders of magnitude per unit of a
    product. in_a_row: chunks that one program weighs. together: chunks whose blocks one program scores.
    """

    keys: int
    chunks: int
    windows: int
    block_size: int
    stride: int
    group: int
    rows: int
    factor: float
    in_a_row: int
    together: int

    @property
    def ratio(self):
        return self.block_size // self.stride

    @property
    def programs(self):
        return -(-self.chunks // self.in_a_row)

    @property
    def blocks_together(self):
        return self.together * self.keys // self.ratio


def append_kernel(
    layer, positions, qkv, cos, sin, scale, delta, _old, q, k, v, new, weights, tops, totals, *, geometry
):
    """A program weighs some chunks of windows, and adds the key where that completes a window of theirs.

    One more program of each row and KV head writes the token and its importance.
    """
    program, head, row = (_backend.program_id(axis) for axis in range(3))
    position, stride = positions[row], geometry.stride
    at = (_backend.layer_index(layer, jax.tree.leaves(new)[0]), row, head)

    @_backend.when(program == geometry.programs)
    def _():
        if new.importance is not None:
            _backend.when(position >= 0)(lambda: append_importance(at, position, qkv, scale, delta, new, stride=stride))
        store_token(row, head, qkv, cos, sin, q, k, v)

    if new.pooled_keys is None:
        return

    @_backend.when(program < geometry.programs)
    def _():
        begin = program * geometry.in_a_row
        end = jnp.minimum(begin + geometry.in_a_row, geometry.chunks)
        sums = load_sums(new.pooled_keys, at, slice(None))
        queries = rotated(qkv, cos, sin, row, head, group_members(geometry.group, geometry.rows)).T
        key = rotated(qkv, cos, sin, row, head, geometry.group).astype(jnp.float32)
        opened = Opened.of(new.pooled_keys, sums, key, position, stride)
        visible = blocks.num_visible_windows(position, geometry.windows, stride)

        def weigh(chunk, carry):
            first = chunk * geometry.keys
            index = first + jnp.arange(geometry.keys, dtype=jnp.int32)
            keys = new.pooled_keys[0][(*at, jnp.minimum(index, geometry.windows - 1))]
            # Another program may have changed the sums already, but then the window is not of this chunk.
            keys = jnp.where((index == opened.window)[:, None], opened.mean[None], keys)
            product = jnp.where((index < visible)[:, None], _backend.dot(keys, queries), -jnp.inf)
            top = jnp.maximum(jnp.max(product, axis=0), -LARGE)  # not -inf, for the difference of two is NaN
            weight = _backend.exp2(product - top[None], geometry.factor)
            weights[row, head, _backend.ds(first, geometry.keys)] = weight
            tops[row, head, chunk], totals[row, head, chunk] = top, jnp.sum(weight, axis=0)
            return carry

        jax.lax.fori_loop(begin, end, weigh, 0)
        owner = jnp.maximum(opened.window, 0) // geometry.keys

        @_backend.when((owner >= begin) & (owner < end) & (position >= 0))
        def _():
            _backend.barrier()
            opened.store(new.pooled_keys, at, slice(None))


def keys_kernel(layer, positions, weights, tops, totals, means, query_keys, fill, *, geometry):
    """The order of some blocks by query score and by importance, as integers."""
    part, head, row = (_backend.program_id(axis) for axis in range(3))
    width = geometry.blocks_together
    place = (row, head, _backend.ds(part * width, width))
    block = part * width + jnp.arange(width, dtype=jnp.int32)
    if means is not None:
        at = (_backend.layer_index(layer, means), row, head)
        own_means, left_mean = _read_means(means, at, block, geometry)
    if weights is not None:
        query_keys[place] = ordered(_block_scores(positions[row], weights, tops, totals, (row, head), part, geometry))
    if means is not None:
        fill[place] = ordered(jnp.maximum(jnp.max(own_means, axis=1), left_mean))


def _read_means(means, at, block, geometry):
    """The importance of the blocks' windows [blocks, ratio], and of the window before the first of each."""
    ratio = geometry.ratio

    def load(window):
        exists = (window >= 0) & (window < geometry.windows)
        index = (*at, jnp.where(exists, window, 0), jnp.zeros_like(window))
        return _backend.load(means.at[index], mask=exists, other=-jnp.inf)

    return load(ratio * block[:, None] + jnp.arange(ratio, dtype=jnp.int32)[None]), load(ratio * block - 1)


def _block_scores(position, weights, tops, totals, at, part, geometry):
    """Scores of the blocks of so many chunks. at: row and head."""
    keys, ratio, together = geometry.keys, geometry.ratio, geometry.together
    visible = blocks.num_visible_windows(position, geometry.windows, geometry.stride)
    head_row = jnp.arange(geometry.rows, dtype=jnp.int32)
    chunk = part * together + jnp.arange(together, dtype=jnp.int32)

    def of_chunks(ref, chunk, other):
        inside = ((chunk >= 0) & (chunk < geometry.chunks))[:, None] & (head_row >= 0)[None]
        index = (*at, jnp.where(inside, chunk[:, None], 0), head_row[None])
        return _backend.load(ref.at[index], mask=inside, other=other)

    # All is asked for before anything is waited for. Block m takes the windows ratio * m - 1 to ratio * m + ratio - 1.
    # So neighbours share one; that both add it up alike makes ties of them. [chunks, blocks, steps, rows].
    of_chunk = jnp.arange(keys // ratio, dtype=jnp.int32)[None, :, None, None]
    step = jnp.arange(_backend.next_power_of_two(ratio + 1), dtype=jnp.int32)[None, None, :, None]
    window = (chunk * keys)[:, None, None, None] + ratio * of_chunk - 1 + step
    seen = (window >= 0) & (window < visible) & (step <= ratio) & (head_row >= 0)[None, None, None]
    index = (*at, jnp.where(seen, window, 0), head_row[None, None, None])
    weight = _backend.load(weights.at[index], mask=seen, other=0.0)
    every = jnp.arange(_backend.next_power_of_two(geometry.chunks), dtype=jnp.int32)
    top, total = of_chunks(tops, every, -LARGE), of_chunks(totals, every, 0.0)
    own_top, left_top = of_chunks(tops, chunk, -LARGE), of_chunks(tops, chunk - 1, -LARGE)

    most = jnp.max(top, axis=0)
    total = jnp.sum(total * _backend.exp2(top - most[None], geometry.factor), axis=0)
    # Rows beyond the group are padding.
    has_share = (total != 0) & (head_row < geometry.group)
    share = jnp.where(has_share, 1 / jnp.where(total != 0, total, 1.0), 0.0)
    # What a weight counts: the first window of a chunk's first block is of the chunk before.
    of_own, of_left = (
        (_backend.exp2(x - most[None], geometry.factor) * share[None])[:, None, None] for x in (own_top, left_top)
    )
    weight *= jnp.where((of_chunk == 0) & (step == 0), of_left, of_own)
    return jnp.max(jnp.sum(weight, axis=3), axis=2).reshape(geometry.blocks_together)
