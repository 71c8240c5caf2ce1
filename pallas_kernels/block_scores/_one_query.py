"""One query per row over the stacked pooled keys of a cache, in Pallas-Triton: the decode step's scores.

The first kernel writes the products of every window and, per chunk of windows, their maximum and sum of weights; the
second turns them into block scores. With one query the logits are few: [B, N, C].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels._backend import LARGE, LOG2_E
from pallas_kernels._tuning import Launch, launch_of

_DEFAULT = Launch(rows=16, num_warps=4, num_stages=1, keys=128)
_BLOCKS = 32  # per program of the second kernel


def _logits_kernel(layer, q, pooled, positions, logits, tops, totals, *, keys, stride, factor):
    """factor: binary orders of magnitude per unit of a product."""
    chunk, head, row = (_backend.program_id(axis) for axis in range(3))
    windows = pooled.shape[3]
    visible = blocks.num_visible_windows(positions[row], windows, stride)
    at = (row, head, chunk)
    rows = q.shape[2]

    @_backend.when(chunk * keys >= visible)
    def _():
        tops[at] = jnp.full((rows,), -LARGE, jnp.float32)
        totals[at] = jnp.zeros((rows,), jnp.float32)

    @_backend.when(chunk * keys < visible)
    def _():
        window = chunk * keys + jnp.arange(keys, dtype=jnp.int32)
        key = pooled[_backend.layer_index(layer, pooled), row, head, jnp.minimum(window, windows - 1)]
        product = _backend.dot(q[row, head], key.T)
        product = jnp.where((window < visible)[None], product, -jnp.inf)
        top = jnp.maximum(jnp.max(product, axis=1), -LARGE)  # not -inf, for the difference of two is NaN
        logits[row, head, :, _backend.ds(chunk * keys, keys)] = product
        tops[at] = top
        totals[at] = jnp.sum(_backend.exp2(product - top[:, None], factor), axis=1)


def _blocks_kernel(positions, logits, tops, totals, out, *, windows, chunks, group, ratio, stride, factor):
    part, head, row = (_backend.program_id(axis) for axis in range(3))
    visible = blocks.num_visible_windows(positions[row], windows, stride)
    rows = logits.shape[2]
    chunk = jnp.arange(_backend.next_power_of_two(chunks), dtype=jnp.int32)
    at, inside = (row, head, jnp.where(chunk < chunks, chunk, 0)), (chunk < chunks)[:, None]
    top, total = jnp.where(inside, tops[at], -LARGE), jnp.where(inside, totals[at], 0.0)
    most = jnp.max(top, axis=0)
    total = jnp.sum(total * _backend.exp2(top - most[None], factor), axis=0)
    # Rows beyond the group are padding.
    share = jnp.where((total != 0) & (jnp.arange(rows) < group), 1 / jnp.where(total != 0, total, 1.0), 0.0)

    # Block m takes the windows ratio * m - 1 to ratio * m + ratio - 1.
    block = part * _BLOCKS + jnp.arange(_BLOCKS, dtype=jnp.int32)
    step = jnp.arange(_backend.next_power_of_two(ratio + 1), dtype=jnp.int32)
    window = ratio * block[:, None] - 1 + step[None]
    exists = (window >= 0) & (window < windows) & (step <= ratio)[None]
    seen = exists & (window < visible)
    head_row = jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    loaded = logits[row, head, head_row, jnp.where(seen, window, 0)[None]]
    weights = _backend.exp2(loaded - most[:, None, None], factor) * share[:, None, None]
    # Where nothing is seen, what was loaded may be anything.
    scores = jnp.where(exists, jnp.sum(jnp.where(seen[None], weights, 0.0), axis=0), -jnp.inf)
    _backend.store(out.at[row, head, 0, block], jnp.max(scores, axis=1), mask=block < out.shape[3])


def block_scores(
    q: Float[Array, "B 1 N D"],
    pooled_keys: Float[Array, "L B K C D"],
    positions: Int32[Array, "B 1"],
    layer: Int32[Array, ""],
    *,
    num_blocks: int,
    block_size: int,
    stride: int,
) -> Float[Array, "B K 1 M"]:
    batch, _, heads, dim = q.shape
    kv_heads, windows = pooled_keys.shape[2:4]
    group = heads // kv_heads
    grouped = _backend.heads_as_rows(q[:, 0], kv_heads)
    rows = grouped.shape[2]
    launch = launch_of("block_scores_one_query", _DEFAULT, dim=dim, group=rows, dtype=q.dtype.name)
    chunks = -(-windows // launch.keys)
    positions, factor = positions[:, 0], dim**-0.5 * LOG2_E

    def logits_kernel(*refs: Any) -> None:
        _logits_kernel(*refs, keys=launch.keys, stride=stride, factor=factor)

    parts = (batch, kv_heads, chunks, rows)
    logits = _backend.triton_call(
        logits_kernel,
        name="block_scores_logits",
        grid=(chunks, kv_heads, batch),
        out_shape=tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((batch, kv_heads, rows, chunks * launch.keys), parts, parts)
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(jax.lax.reshape(layer, (1,)), grouped, pooled_keys, positions)

    def blocks_kernel(*refs: Any) -> None:
        sizes = {"windows": windows, "chunks": chunks, "group": group, "ratio": block_size // stride, "stride": stride}
        _blocks_kernel(*refs, **sizes, factor=factor)

    return _backend.triton_call(
        blocks_kernel,
        name="block_scores_of_one_query",
        grid=(-(-num_blocks // _BLOCKS), kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, 1, num_blocks), jnp.float32),
        num_warps=4,
    )(positions, *logits)
