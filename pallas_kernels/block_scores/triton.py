"""Query-aware block scores in Pallas-Triton: two sweeps over the pooled keys per tile of adjacent queries.

The first kernel finds each head's log-sum-exp; the second sums the weights of a group's heads and takes the maximum
over the windows of a block. Only block scores are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels._backend import LARGE, LOG2_E, pad_to_multiple, per_head
from pallas_kernels._tuning import Launch, launch_of

# Defaults, measured on an H200 with 16 query heads per KV head of 128 in bfloat16.
_NORMALISER = Launch(rows=128, num_warps=4, num_stages=2, keys=128)
_SCORES = Launch(rows=128, num_warps=4, num_stages=2, keys=128)
# Exact float32 products are unrolled multiply-adds; larger ones take a minute to compile.
_FLOAT32 = Launch(rows=32, num_warps=8, num_stages=1, keys=32)
# A chunk's blocks are compared in pairs, for every query, to find each one's left neighbour.
_MOST_BLOCKS = _MOST_QUERIES = 32
_MOST_RATIO = 64


def _first_chunk(begin, end, width, stop):
    """The first chunk of `width` windows that any query sees, at most `stop`. begin, end [tile]: what each sees."""
    return jnp.min(jnp.where(begin < end, begin // width, stop))


def _sweep(visit, carry, begin, end, width, first, stop):
    """visit(masked)(chunk, carry) over the chunks from `first` to `stop`; those that all see whole need no mask."""
    left = jnp.clip((jnp.max(begin) + width - 1) // width, first, stop)
    right = jnp.clip(jnp.min(end) // width, left, stop)
    carry = jax.lax.fori_loop(first, left, visit(True), carry)
    carry = jax.lax.fori_loop(left, right, visit(False), carry)
    return jax.lax.fori_loop(right, stop, visit(True), carry)


def _visible(windows, begin, end):
    return (windows >= begin) & (windows < end)


def _normaliser_kernel(q, pooled, begins, ends, lse, *, tile, windows, scale):
    """Log-sum-exp in the unit of the products, `scale` of a natural one; LARGE for queries that see nothing."""
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group = q.shape[3]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    begin, end = begins[row, queries], ends[row, queries]
    begin_rows, end_rows = per_head(begin, group)[:, None], per_head(end, group)[:, None]
    # Padding may hold anything.
    query = jnp.where(begin_rows < end_rows, q[row, queries, head].reshape(rows, q.shape[-1]), 0)

    # What all products have in common is subtracted before the change of base, see `_backend.Softmax`.
    factor = scale * LOG2_E

    def visit(masked):
        def body(chunk, carry):
            top, total = carry
            keys = pooled[row, head, _backend.ds(chunk * windows, windows)]
            logits = _backend.dot(query, keys.T)
            if masked:
                at = (chunk * windows + jnp.arange(windows, dtype=jnp.int32))[None]
                logits = jnp.where(_visible(at, begin_rows, end_rows), logits, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            weights = _backend.exp2(logits - new_top[:, None], factor)
            return new_top, total * _backend.exp2(top - new_top, factor) + jnp.sum(weights, axis=1)

        return body

    carry = jnp.full((rows,), -LARGE, jnp.float32), jnp.zeros((rows,), jnp.float32)
    stop = (jnp.max(end) + windows - 1) // windows
    top, total = _sweep(visit, carry, begin, end, windows, _first_chunk(begin, end, windows, stop), stop)
    seen = total != 0  # NaN stays NaN
    found = top + jnp.log(jnp.where(seen, total, 1.0)) / scale
    lse[row, queries, head] = jnp.where(seen, found, LARGE).reshape(tile, group)


def _score_kernel(q, pooled, begins, ends, exists, lse, out, *, tile, windows, heads, ratio, scale):
    """heads: real ones among the padded group. exists [B, M]: whether any window touches the block."""
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group, width = q.shape[3], out.shape[-1]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    query = q[row, queries, head].reshape(rows, q.shape[-1])
    begin, end = begins[row, queries], ends[row, queries]
    begin_rows, end_rows = per_head(begin, group)[None], per_head(end, group)[None]
    real = jnp.broadcast_to(jnp.arange(group, dtype=jnp.int32)[None] < heads, (tile, group)).reshape(-1)
    normaliser = jnp.where(real, lse[row, queries, head].reshape(rows), LARGE)[None]

    per_chunk = windows // ratio
    chunks = (width + per_chunk - 1) // per_chunk
    block = jnp.arange(per_chunk, dtype=jnp.int32)
    is_last = jnp.arange(ratio, dtype=jnp.int32)[None, :, None] == ratio - 1
    is_next = (block[:, None] == block[None] + 1)[..., None]
    token = (tile_id * tile + jnp.arange(tile, dtype=jnp.int32))[:, None]

    def write(chunk, scores):
        at = chunk * per_chunk + block
        inside = at < width
        exist = _backend.load(exists.at[row, jnp.where(inside, at, 0)], mask=inside, other=0)
        scores = jnp.where((exist != 0)[None], scores, -jnp.inf)
        _backend.store(out.at[row, head, token, at[None]], scores, mask=jnp.broadcast_to(inside[None], scores.shape))

    def fill(chunk, carry):
        write(chunk, jnp.zeros((tile, per_chunk), jnp.float32))
        return carry

    def visit(masked):
        def body(chunk, left):
            keys = pooled[row, head, _backend.ds(chunk * windows, windows)]
            weights = _backend.exp2(_backend.dot(keys, query.T) - normaliser, scale * LOG2_E)
            if masked:
                at = (chunk * windows + jnp.arange(windows, dtype=jnp.int32))[:, None]
                weights = jnp.where(_visible(at, begin_rows, end_rows), weights, 0.0)
            summed = weights.reshape(windows, tile, group).sum(2).reshape(per_chunk, ratio, tile)
            # The last window of each block touches the next one too; `left` is that of the chunk before.
            overlap = jnp.max(jnp.where(is_last, summed, 0.0), axis=1)
            shifted = jnp.max(jnp.where(is_next, overlap[None], 0.0), axis=1)
            shifted = jnp.where((block == 0)[:, None], left[None], shifted)
            write(chunk, jnp.maximum(jnp.max(summed, axis=1), shifted).T)
            return jnp.max(jnp.where((block == per_chunk - 1)[:, None], overlap, 0.0), axis=0)

        return body

    # One chunk beyond the last full one, where its last window's overlap goes.
    stop = jnp.minimum(jnp.max(end) // windows + 1, chunks)
    first = _first_chunk(begin, end, windows, stop)
    jax.lax.fori_loop(0, first, fill, 0)
    _sweep(visit, jnp.zeros((tile,), jnp.float32), begin, end, windows, first, stop)
    jax.lax.fori_loop(stop, chunks, fill, 0)


def unsupported(
    q: Array, pooled_keys: Array, positions: Array, first_block: Array | None,
    *, num_blocks: int, block_size: int, stride: int,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take this kernel; None where they can."""
    if q.dtype != pooled_keys.dtype:
        return f"q and pooled_keys must have one dtype, got {q.dtype} and {pooled_keys.dtype}"
    if q.shape[1] == 0:
        return "there is nothing to do"
    if not _backend.is_power_of_two(block_size // stride) or block_size // stride > _MOST_RATIO:
        return f"block_size / stride must be a power of two up to {_MOST_RATIO}, got {block_size} / {stride}"
    return _backend.unsupported_operand("q", q)


def block_scores(
    q: Float[Array, "B T N D"],
    pooled_keys: Float[Array, "B K C D"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    num_blocks: int,
    block_size: int,
    stride: int,
) -> Float[Array, "B K T M"]:
    batch, length, heads, dim = q.shape
    kv_heads, windows = pooled_keys.shape[1:3]
    group, ratio = heads // kv_heads, block_size // stride
    padded_group = _backend.next_power_of_two(group)
    shape = {"dim": dim, "group": padded_group, "dtype": q.dtype.name}
    normaliser, scorer = (
        launch_of(kernel, _FLOAT32 if q.dtype == jnp.float32 else default, **shape)
        for kernel, default in (("block_scores_normaliser", _NORMALISER), ("block_scores", _SCORES))
    )
    normaliser_tile, score_tile = (max(1, launch.rows // padded_group) for launch in (normaliser, scorer))
    score_tile, score_windows = min(score_tile, _MOST_QUERIES), max(ratio, min(scorer.keys, _MOST_BLOCKS * ratio))
    longest = max(normaliser_tile, score_tile)
    q = q.reshape(batch, length, kv_heads, group, dim)
    q = pad_to_multiple(pad_to_multiple(q, 1, longest), 3, padded_group)
    positions = pad_to_multiple(positions, 1, longest, fill=-1)
    begins = ratio * blocks.query_first_blocks(positions, first_block, block_size)
    ends = blocks.num_visible_windows(positions, windows, stride)
    m = jnp.arange(num_blocks, dtype=jnp.int32)
    has_left = m > 0 if first_block is None else m > first_block
    exists = (ratio * m < windows) | (has_left & (ratio * m - 1 < windows))
    exists = jnp.broadcast_to(exists, (batch, num_blocks)).astype(jnp.int32)
    # The sweep of the scores may enter the chunk after the last window.
    widest = max(normaliser.keys, score_windows)
    padding = (windows // widest + 1) * widest - windows
    pooled_keys = jnp.pad(pooled_keys, ((0, 0), (0, 0), (0, padding), (0, 0)))

    def normaliser_kernel(*refs: Any) -> None:
        _normaliser_kernel(*refs, tile=normaliser_tile, windows=normaliser.keys, scale=dim**-0.5)

    lse = _backend.triton_call(
        normaliser_kernel,
        name="block_scores_normaliser",
        grid=(q.shape[1] // normaliser_tile, kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        num_warps=normaliser.num_warps,
        num_stages=normaliser.num_stages,
    )(q, pooled_keys, begins, ends)

    def score_kernel(*refs: Any) -> None:
        _score_kernel(*refs, tile=score_tile, windows=score_windows, heads=group, ratio=ratio, scale=dim**-0.5)

    scores = _backend.triton_call(
        score_kernel,
        name="block_scores",
        grid=(q.shape[1] // score_tile, kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, q.shape[1], num_blocks), jnp.float32),
        num_warps=scorer.num_warps,
        num_stages=scorer.num_stages,
    )(q, pooled_keys, begins, ends, exists, lse)
    return scores[:, :, :length]
