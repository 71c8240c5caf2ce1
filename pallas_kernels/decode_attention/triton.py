"""Decode attention in Pallas-Triton: the blocks of a row and KV head in `_SPLITS` runs, then one kernel that adds them up.

Runs and their order depend on J alone, so any pool with the same blocks gives the same bits. A program fetches what its
own run misses from host memory and goes on: others attend meanwhile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, LOG2_E, pad_to_multiple
from pallas_kernels._tuning import Launch, launch_of

_SPLITS = 8
_LEAST_ROWS = 16  # of a matrix product
_DEFAULT = Launch(rows=16, num_warps=4, num_stages=3)


def _fetch(host, pool, loads, slots, layer, row, head, begin, width):
    """Copies the missing blocks of a run into their slots; this program's later loads see them."""

    def body(entry, carry):
        load, slot = loads[row, head, begin + entry], slots[row, head, begin + entry]

        @_backend.when((load >= 0) & (load < host.shape[3]) & (slot >= 0) & (slot < pool.shape[3]))
        def _():
            pool[layer, row, head, slot] = host[layer, row, head, load]

        return carry

    jax.lax.fori_loop(0, width, body, 0)
    _backend.barrier()


def _split_kernel(layer, q, pool, host, loads, bias, slots, block_ids, positions, sums, tops, totals, *, width, scale):
    split, head, row = (_backend.program_id(axis) for axis in range(3))
    layer = layer[0]
    num_slots, size, dim = pool.shape[3], pool.shape[5], pool.shape[6]
    rows = q.shape[2]
    begin = split * width
    if host is not None:
        _fetch(host, pool, loads, slots, layer, row, head, begin, width)
    position = positions[row]
    query = q[row, head]

    def is_valid(block, slot):
        valid = (block >= 0) & (block <= position // size) & (slot >= 0) & (slot < num_slots)
        return valid if bias is None else valid & (block < bias.shape[3])

    # The leading blocks that lie wholly before the query need no mask.
    lane = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)
    at = (row, head, begin + jnp.where(lane < width, lane, 0))
    block, slot = block_ids[at], slots[at]
    whole = is_valid(block, slot) & (block < position // size)
    leading = jnp.min(jnp.where(whole & (lane < width), width, lane))

    def visit(masked):
        def body(entry, carry):
            acc, top, total = carry
            block, slot = (x[row, head, begin + entry] for x in (block_ids, slots))
            if masked:
                valid = is_valid(block, slot)
                block, slot = jnp.where(valid, block, 0), jnp.where(valid, slot, 0)
            keys, values = pool[layer, row, head, slot, 0], pool[layer, row, head, slot, 1]
            logits = _backend.dot(query, keys.T) * (scale * LOG2_E)
            if bias is not None:
                logits += (bias[layer, row, head, block] * LOG2_E)[None]
            if masked:
                token = block * size + jnp.arange(size, dtype=jnp.int32)
                seen = valid & (token <= position)
                logits = jnp.where(seen[None], logits, -jnp.inf)
                values = jnp.where(seen[:, None], values, 0)  # unwritten memory may hold NaN
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            weights = _backend.exp2(logits - new_top[:, None])
            decay = _backend.exp2(top - new_top)
            acc = acc * decay[:, None] + _backend.dot(weights.astype(values.dtype), values)
            return acc, new_top, total * decay + jnp.sum(weights, axis=1)

        return body

    carry = (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), -LARGE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, leading, visit(masked=False), carry)
    at = (row, head, split)
    sums[at], tops[at], totals[at] = jax.lax.fori_loop(leading, width, visit(masked=True), carry)


def _sum_kernel(sums, tops, totals, out):
    head, row = (_backend.program_id(axis) for axis in range(2))
    top = tops[row, head]
    weights = _backend.exp2(top - jnp.max(top, axis=0)[None])
    total = jnp.sum(totals[row, head] * weights, axis=0)
    acc = jnp.sum(sums[row, head] * weights[..., None], axis=0)
    out[row, head] = (acc / jnp.where(total > 0, total, 1.0)[:, None]).astype(out.dtype)


def fetch_unsupported(
    q: Array, pool: Array, host: Array, bias: Array | None, loads: Array, *rest: Any, **options: Any
) -> str | None:
    """`unsupported` for `fetch_and_attend`."""
    return unsupported(q, pool, bias, *rest, **options)


def unsupported(
    q: Array, pool: Array, bias: Array | None, slots: Array, block_ids: Array, positions: Array, layer: Array,
    *, scale: float,
) -> str | None:  # fmt: skip
    """Why these arguments cannot take the kernels; None where they can."""
    if pool.dtype != q.dtype:
        return f"q and pool must have one dtype, got {q.dtype} and {pool.dtype}"
    if not _backend.is_power_of_two(pool.shape[5]) or pool.shape[5] < 16:
        return f"blocks must hold a power of two of at least 16 tokens, got {pool.shape[5]}"
    return _backend.unsupported_operand("q", q)


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
    return _attend(q, pool, None, bias, None, slots, block_ids, positions, layer, scale=scale)[0]


def fetch_and_attend(
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    loads: Int32[Array, "B K J"],
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    return _attend(q, pool, host, bias, loads, slots, block_ids, positions, layer, scale=scale)


def _attend(
    q: Array, pool: Array, host: Array | None, bias: Array | None, loads: Array | None, slots: Array, block_ids: Array,
    positions: Array, layer: Array, *, scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    batch, heads, dim = q.shape
    kv_heads = pool.shape[2]
    group = heads // kv_heads
    rows = max(_LEAST_ROWS, _backend.next_power_of_two(group))
    launch = launch_of("decode_attention", _DEFAULT, dim=dim, group=rows, dtype=q.dtype.name)
    grouped = pad_to_multiple(q.reshape(batch, kv_heads, group, dim), 2, rows)
    splits = min(_SPLITS, _backend.next_power_of_two(block_ids.shape[-1]))
    width = -(-block_ids.shape[-1] // splits)
    block_ids, slots = (pad_to_multiple(x, 2, splits, -1) for x in (block_ids, slots))
    if loads is not None:
        loads = pad_to_multiple(loads, 2, splits, -1)

    def split_kernel(*refs: Any) -> None:
        layer, q, pool, *rest = refs
        if host is not None:  # what was fetched is seen where it was written
            *rest, pool = rest
        _split_kernel(layer, q, pool, *rest, width=width, scale=scale)

    lead = (batch, kv_heads, splits, rows)
    parts = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*lead, dim), lead, lead))
    *parts, pool = (
        *_backend.triton_call(
            split_kernel,
            name="decode_attention",
            grid=(splits, kv_heads, batch),
            out_shape=parts if host is None else (*parts, jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            aliases={} if host is None else {2: 3},
        )(layer[None], grouped, pool, host, loads, bias, slots, block_ids, positions),
        *((pool,) if host is None else ()),
    )
    out = _backend.triton_call(
        _sum_kernel,
        name="decode_attention_sum",
        grid=(kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        num_warps=4,
    )(*parts)
    return out[:, :, :group].reshape(batch, heads, dim), pool
