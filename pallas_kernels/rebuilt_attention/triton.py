"""Attention with rebuilt keys in Pallas-Triton: the tiles of a row and KV head dealt out to runs, which another kernel
adds up.

A tile is a number of tokens of listed chunks, in their order, or of exact tokens. Which run has which depends on the
numbers of listed chunks and exact tokens alone. A run takes every so-manieth tile, of both kinds, so that all have as
much to do where rows are short; it stops after its last tile that holds anything.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, Softmax
from pallas_kernels._runs import add_up, parts_of
from pallas_kernels._tuning import Launch, launch_of
from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors

_MAX_BYTES = 160 * 1024  # of shared memory, for the factors of a head and of a tile
# A tile of 64 keys takes 233 registers; float32 products, which tensor cores do not make, need many more.
_HALF, _FULL = (Launch(rows=16, num_warps=4, num_stages=2, keys=keys) for keys in (64, 16))


def _kernel(
    layer, q, tokens, heads, cos, sin, pool, ids, slots, exact, lengths, sums, tops, totals,
    *, tile, runs, softmax,
):  # fmt: skip
    run, head, row = (_backend.program_id(axis) for axis in range(3))
    at, query = (_backend.layer_index(layer, pool), row, head), q[row, head]
    (_, _, units, size, rank), (rows, dim), half = tokens.shape, query.shape, query.shape[1] // 2
    num_slots, num_listed, num_exact = pool.shape[3], ids.shape[2], jnp.minimum(lengths[row], exact.shape[4])
    lane = jnp.arange(tile, dtype=jnp.int32)

    def listed(tiles):
        """Of the tokens in tiles of chunks: (chunk, slot, place in the chunk, is it there)."""
        token = tiles * tile + lane
        of_chunk = jnp.full_like(token, size)  # a floor division would ask for signs
        entry, place = jax.lax.div(token, of_chunk), jax.lax.rem(token, of_chunk)
        inside = entry < num_listed
        entry = jnp.where(inside, entry, 0)
        chunk, slot = ids[row, head, entry], slots[row, head, entry]
        valid = inside & (chunk >= 0) & (chunk < units) & (slot >= 0) & (slot < num_slots)
        return jnp.where(valid, chunk, 0), jnp.where(valid, slot, 0), place, valid

    def last_listed():
        """How many of a run's tiles of chunks there are up to the last one that holds a token."""
        tiles = -(-num_listed * size // (tile * runs))
        number = jnp.arange(_backend.next_power_of_two(tiles), dtype=jnp.int32)[:, None]
        return jnp.max(jnp.where(listed(run + number * runs)[-1], number + 1, 0))

    def attend(carry, products, valid, values):
        acc, top, total = carry
        logits = jnp.where(valid[None], softmax.logits(products, None), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = softmax.weights(logits - new_top[:, None])
        decay = softmax.decay(top - new_top)
        acc = acc * decay[:, None] + _backend.dot(weights.astype(values.dtype), values)
        return acc, new_top, total * decay + jnp.sum(weights, axis=1)

    def load(ref, index, valid):
        """Zeros for the tokens that are not there, whose memory may hold anything."""
        return _backend.load(ref.at[index], mask=valid, other=0)

    # Halves apart from the start, for RoPE turns each with the other; both as wide as products take.
    column = jnp.arange(max(_backend.LEAST_ROWS, half), dtype=jnp.int32)[None]
    is_half = None if column.shape[1] == half else column < half
    first = column if is_half is None else jnp.where(is_half, column, 0)
    second, whole = first + half, jnp.arange(dim, dtype=jnp.int32)[None]
    of_rank = jnp.arange(max(_backend.LEAST_ROWS, _backend.next_power_of_two(rank)), dtype=jnp.int32)
    is_rank = of_rank < rank  # masks alone, for without a choice of addresses loads stay wide

    def halves(ref, index, there):
        """Both halves of vectors, zeros for those that are not there."""
        shape = (there.shape[0], column.shape[1])
        mask = jnp.broadcast_to(there, shape) if is_half is None else there & is_half
        return tuple(load(ref, (*index, columns), mask) for columns in (first, second))

    left, right = halves(heads, (*at, of_rank[:, None]), is_rank[:, None])
    of_rows = jnp.arange(rows, dtype=jnp.int32)[:, None]
    q_left, q_right = halves(q, (row, head, of_rows), of_rows >= 0)

    def visit_chunks(number, carry):
        chunk, slot, place, valid = (x[:, None] for x in listed(run + number * runs))
        values = load(pool, (*at, slot, 0, place, whole), jnp.broadcast_to(valid, (tile, dim)))
        factors = load(tokens, (*at[:2], chunk, place, of_rank[None]), valid & is_rank[None])
        position = jnp.minimum(chunk * size + place, cos.shape[0] - 1)
        turn, back = cos[position, first], sin[position, first]
        x, y = _backend.dot(factors, left), _backend.dot(factors, right)
        of_left, of_right = ((x * turn - y * back).astype(query.dtype), (y * turn + x * back).astype(query.dtype))
        products = _backend.dot(q_left, of_left.T) + _backend.dot(q_right, of_right.T)
        return attend(carry, products, valid[:, 0], values)

    def visit_exact(number, carry):
        token = (run + number * runs) * tile + lane[:, None]
        valid = token < num_exact
        across = jnp.broadcast_to(valid, (tile, dim))
        keys, values = (load(exact, (*at, i, token, whole), across) for i in range(2))
        return attend(carry, _backend.dot(query, keys.T), valid[:, 0], values)

    carry = (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), -LARGE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, last_listed(), visit_chunks, carry)
    # The run's tiles among those that exact tokens fill, the last one in part.
    tiles = jax.lax.div(num_exact + (tile - 1), jnp.full_like(num_exact, tile))
    left = jnp.maximum(tiles - run + (runs - 1), 0)
    visits = jax.lax.div(left, jnp.full_like(left, runs))
    part = (row, head, run)
    sums[part], tops[part], totals[part] = jax.lax.fori_loop(0, visits, visit_exact, carry)


def unsupported(q: Array, factors: Factors, chunks: Chunks, exact: Exact, layer: Array, *, scale: float) -> str | None:
    """Why these arguments cannot take the kernels; None where they can."""
    given = {
        "q": q, "factors.tokens": factors.tokens, "factors.heads": factors.heads, "chunks.pool": chunks.pool,
        "exact.tokens": exact.tokens,
    }  # fmt: skip
    if any(x.dtype != q.dtype for x in given.values()):
        dtypes = ", ".join(str(x.dtype) for x in given.values())
        return f"{', '.join(given)} must have one dtype, got {dtypes}"
    rank, keys = factors.tokens.shape[-1], (_FULL if q.dtype == jnp.float32 else _HALF).keys
    needed = (q.shape[-1] + keys) * _backend.next_power_of_two(max(rank, 1)) * q.dtype.itemsize
    if needed > _MAX_BYTES:
        return f"factors of rank {rank} need {needed} bytes of shared memory, more than {_MAX_BYTES}"
    empty = [name for name, x in {**given, "chunks.ids": chunks.ids, "factors.cos": factors.cos}.items() if not x.size]
    if empty:
        return f"{empty[0]} holds nothing"
    return _backend.unsupported_operand("q", q)


def rebuilt_attention(
    q: Float[Array, "B N D"],
    factors: Factors,
    chunks: Chunks,
    exact: Exact,
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> Float[Array, "B N D"]:
    kv_heads, size, dim = chunks.pool.shape[2], *chunks.pool.shape[5:]
    by_head = _backend.heads_as_rows(q, kv_heads)
    default = _FULL if q.dtype == jnp.float32 else _HALF
    launch = launch_of("rebuilt_attention", default, dim=dim, group=by_head.shape[2], dtype=q.dtype.name)
    total = chunks.ids.shape[2] * size + exact.tokens.shape[4]
    # Of the selection alone: the room for exact tokens is that of the row that may grow most, and bits of a row must
    # not depend on others.
    runs = _runs(-(-chunks.ids.shape[2] * size // launch.keys))
    softmax = Softmax.of(scale, False, total, q.dtype)

    def kernel(*refs: Any) -> None:
        _kernel(*refs, tile=launch.keys, runs=runs, softmax=softmax)

    parts = _backend.triton_call(
        kernel,
        name="rebuilt_attention",
        grid=(runs, kv_heads, q.shape[0]),
        out_shape=parts_of(by_head, runs),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )(jax.lax.reshape(layer, (1,)), by_head, *factors, *chunks, *exact)
    return add_up(parts, q, softmax)


def _runs(tiles: int) -> int:
    """Runs of a row and KV head, a power of two: one per four to eight tiles, at least 16 to fill the device."""
    return min(_backend.next_power_of_two(tiles), max(16, min(128, _backend.next_power_of_two(tiles // 8))))
