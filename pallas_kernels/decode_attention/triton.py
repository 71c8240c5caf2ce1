"""Decode attention in Pallas-Triton: the blocks of a row and KV head in runs, then one kernel to add them up.

Runs and their order depend on J alone, so any pool with the same blocks gives the same bits. Before it attends, a
program writes the new token and fetches what is missing, both only into its own run: no program waits for another.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, Softmax, pad_to_multiple
from pallas_kernels._runs import Parts, add_up, parts_of
from pallas_kernels._tuning import Launch, launch_of
from pallas_kernels.decode_attention.arguments import Residence, Store, Token
from pallas_kernels.fetch_blocks.triton import fetch_block

_BLOCK_BYTES = 32 * 1024  # keys of one block: three stages of keys and values fit in shared memory
# Measured on an H200: without transfers two stages are 10 to 15 % faster at a batch of 64; with them three are as fast,
# and faster at a batch of 16. Warps decide the order of sums, so they must be the same.
_RESIDENT, _FETCHING = Launch(rows=16, num_warps=4, num_stages=2), Launch(rows=16, num_warps=4, num_stages=3)


def _fetch(host, pool, page_table, loads, slots, at, begin, width):
    """Copies the missing blocks of a run into their slots."""

    def body(entry, carry):
        listed = (*at[1:], begin + entry)
        fetch_block(host, pool, page_table, at, loads[listed], slots[listed])
        return carry

    jax.lax.fori_loop(0, width, body, 0)


def _update_kernel(
    layer, positions, slots, block_ids, loads, page_table, k, v, q, bias, _pool_in, host, sums, tops, totals, pool,
    *, width, softmax,
):  # fmt: skip
    """`_split_kernel` after the run's part of the pool is brought up to date."""
    split, head, row = (_backend.program_id(axis) for axis in range(3))
    at, begin, position = (_backend.layer_index(layer, pool), row, head), split * width, positions[row]
    if host is not None:
        _fetch(host, pool, page_table, loads, slots, at, begin, width)
        _backend.barrier()
    lane = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)
    listed = (row, head, begin + jnp.where(lane < width, lane, 0))
    own = jnp.max(jnp.where(block_ids[listed] == position // pool.shape[5], slots[listed], -1))

    @_backend.when((position >= 0) & (own >= 0) & (own < pool.shape[3]))
    def _():
        token = position % pool.shape[5]
        pool[(*at, own, 0, token)] = k[row, head].astype(pool.dtype)
        pool[(*at, own, 1, token)] = v[row, head].astype(pool.dtype)

    _backend.barrier()
    _split_kernel(layer, positions, slots, block_ids, q, bias, pool, sums, tops, totals, width=width, softmax=softmax)


def _split_kernel(layer, positions, slots, block_ids, q, bias, pool, sums, tops, totals, *, width, softmax):
    split, head, row = (_backend.program_id(axis) for axis in range(3))
    at, begin = (_backend.layer_index(layer, pool), row, head), split * width
    num_slots, size, dim = pool.shape[3], pool.shape[5], pool.shape[6]
    rows, position, query = q.shape[2], positions[row], q[row, head]

    def is_valid(block, slot):
        valid = (block >= 0) & (block <= position // size) & (slot >= 0) & (slot < num_slots)
        return valid if bias is None else valid & (block < bias.shape[3])

    # The leading blocks that lie wholly before the query need no mask.
    lane = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)
    listed = (row, head, begin + jnp.where(lane < width, lane, 0))
    block, slot = block_ids[listed], slots[listed]
    valid = is_valid(block, slot) & (lane < width)
    leading = jnp.min(jnp.where(valid & (block < position // size), width, lane))
    stop = jnp.max(jnp.where(valid, lane + 1, 0))

    def visit(masked):
        def body(entry, carry):
            acc, top, total = carry
            block, slot = (x[row, head, begin + entry] for x in (block_ids, slots))
            if masked:
                valid = is_valid(block, slot)
                block, slot = jnp.where(valid, block, 0), jnp.where(valid, slot, 0)
            keys, values = pool[(*at, slot, 0)], pool[(*at, slot, 1)]
            added = None if bias is None else bias[(*at, block)].astype(jnp.float32)[None]
            logits = softmax.logits(_backend.dot(query, keys.T), added)
            if masked:
                token = block * size + jnp.arange(size, dtype=jnp.int32)
                seen = valid & (token <= position)
                logits = jnp.where(seen[None], logits, -jnp.inf)
                values = jnp.where(seen[:, None], values, 0)  # unwritten memory may hold NaN
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            weights = softmax.weights(logits - new_top[:, None])
            decay = softmax.decay(top - new_top)
            acc = acc * decay[:, None] + _backend.dot(weights.astype(values.dtype), values)
            return acc, new_top, total * decay + jnp.sum(weights, axis=1)

        return body

    carry = (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), -LARGE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, leading, visit(masked=False), carry)
    part = (row, head, split)
    sums[part], tops[part], totals[part] = jax.lax.fori_loop(leading, stop, visit(masked=True), carry)


def unsupported(
    q: Array, pool: Array, bias: Array | None, slots: Array, block_ids: Array, positions: Array, layer: Array,
    *, scale: float,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernels; None where they can."""
    if pool.dtype != q.dtype:
        return f"q and pool must have one dtype, got {q.dtype} and {pool.dtype}"
    if not _backend.is_power_of_two(pool.shape[5]) or pool.shape[5] < 16:
        return f"blocks must hold a power of two of at least 16 tokens, got {pool.shape[5]}"
    if math.prod(pool.shape[5:]) * pool.dtype.itemsize > _BLOCK_BYTES:
        return f"a block's keys may take {_BLOCK_BYTES} bytes, got {list(pool.shape[5:])} of {pool.dtype}"
    return _backend.unsupported_operand("q", q)


def update_unsupported(
    token: Token, store: Store, residence: Residence, positions: Array, layer: Array, *, scale: float
) -> str | None:
    """`unsupported` for `update_and_attend`."""
    block_ids, slots, _ = residence
    return unsupported(token.q, store.pool, store.bias, slots, block_ids, positions, layer, scale=scale)


class _Call(NamedTuple):
    """What both kernels are launched with. q [B, K, rows, D], ids and slots padded to whole runs."""

    grid: tuple[int, int, int]
    width: int
    launch: Launch
    q: Array
    listed: tuple[Array | None, ...]
    softmax: Softmax
    parts: Parts


def _prepare(default: Launch, q: Array, pool: Array, bias: Array | None, scale: float, *listed: Array | None) -> _Call:
    """listed: slots, block ids and the like, [B, K, J]."""
    kv_heads, size = pool.shape[2], pool.shape[5]
    q = _backend.heads_as_rows(q, kv_heads)
    batch, _, rows, dim = q.shape
    selected = next(x for x in listed if x is not None).shape[-1]
    splits = _splits(selected)
    return _Call(
        (splits, kv_heads, batch),
        -(-selected // splits),
        launch_of("decode_attention", default, dim=dim, group=rows, dtype=q.dtype.name),
        q,
        tuple(None if x is None else pad_to_multiple(x, 2, splits, -1) for x in listed),
        Softmax.of(scale, bias is not None, selected * size, pool.dtype),
        parts_of(q, splits),
    )


def _splits(selected: int) -> int:
    """Runs of a row and KV head, a power of two: 16, so that the attention after the last fetch of a run is short; one
    per 16 to 32 blocks beyond 256, up to 128, so that few rows of all their blocks fill the device."""
    return min(_backend.next_power_of_two(selected), max(16, min(128, _backend.next_power_of_two(selected // 16))))


def decode_attention(
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> Float[Array, "B N D"]:
    call = _prepare(_RESIDENT, q, pool, bias, scale, slots, block_ids)

    def kernel(*refs: Any) -> None:
        _split_kernel(*refs, width=call.width, softmax=call.softmax)

    parts = _backend.triton_call(
        kernel,
        name="decode_attention",
        grid=call.grid,
        out_shape=call.parts,
        num_warps=call.launch.num_warps,
        num_stages=call.launch.num_stages,
    )(jax.lax.reshape(layer, (1,)), positions, *call.listed, call.q, bias, pool)
    return add_up(parts, q, call.softmax)


def update_and_attend(
    token: Token,
    store: Store,
    residence: Residence,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    (q, k, v), (pool, host, page_table, bias), (block_ids, slots, loads) = token, store, residence
    call = _prepare(_RESIDENT if host is None else _FETCHING, q, pool, bias, scale, slots, block_ids, loads)

    def kernel(*refs: Any) -> None:
        _update_kernel(*refs, width=call.width, softmax=call.softmax)

    operands = (jax.lax.reshape(layer, (1,)), positions, *call.listed, page_table, k, v, call.q, bias, pool, host)
    *parts, pool = _backend.triton_call(
        kernel,
        name="update_and_attend",
        grid=call.grid,
        out_shape=(*call.parts, jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
        num_warps=call.launch.num_warps,
        num_stages=call.launch.num_stages,
        aliases={sum(x is not None for x in operands[:-2]): 3},
    )(*operands)
    return add_up(tuple(parts), q, call.softmax), pool
