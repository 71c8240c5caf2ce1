"""The forward kernel: one tile of adjacent queries over the union of their blocks, online softmax in base 2."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, LN_2, LOG2_E, per_head


def load_rows(ref, row, queries, head):
    """All heads of one KV head at some queries, [queries * G, ...], from [B, T, K, G, ...]."""
    values = ref[row, queries, head]
    return values.reshape(-1, *values.shape[2:])


def load_bias(bias, row, head, tokens, axis):
    """Loads the bias of one block in base 2, with a new `axis` for the queries; 0 without bias."""
    return 0.0 if bias is None else jnp.expand_dims(bias[row, head, tokens] * LOG2_E, axis)


def is_member(selected, tile, group):
    """[tile * group]: the rows of the queries whose bit is set in `selected`."""
    bit = per_head(jnp.arange(tile, dtype=jnp.int32), group)
    return (jax.lax.shift_right_logical(jnp.broadcast_to(selected, bit.shape), bit) & 1) != 0


def seen_tokens(block, block_size, member, position):
    """(row x token: who sees which, token: seen by any) in a block that is not wholly before all queries.

    A token that no query sees may be unwritten memory, and NaN times weight 0 is NaN.
    """
    token = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
    last = jnp.where(member, position, -1)
    return token[None] <= last[:, None], (token <= jnp.max(last))[:, None]


def forward_kernel(q, k, v, bias, positions, block_ids, members, counts, out, lse, *, tile, block_size, scale):
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    position = per_head(positions[row, queries], group)
    # Padding may hold anything.
    query = jnp.where((position >= 0)[:, None], load_rows(q, row, queries, head), 0)

    def visit(causal):
        def body(trip, carry):
            acc, top, total = carry
            block, selected = block_ids[row, head, tile_id, trip], members[row, head, tile_id, trip]
            tokens = _backend.ds(block * block_size, block_size)
            keys, values = k[row, head, tokens], v[row, head, tokens]
            member = is_member(selected, tile, group)
            logits = _backend.dot(query, keys.T) * (scale * LOG2_E) + load_bias(bias, row, head, tokens, 0)
            if causal:
                seen, seen_by_any = seen_tokens(block, block_size, member, position)
                logits = jnp.where(seen, logits, -jnp.inf)
                values = jnp.where(seen_by_any, values, 0)
            new_top = jnp.maximum(top, jnp.where(member, jnp.max(logits, axis=1), -LARGE))
            # Subtracting LARGE gives the rows that did not select this block weight 0.
            weights = _backend.exp2(logits - jnp.where(member, new_top, LARGE)[:, None])
            decay = _backend.exp2(top - new_top)
            total = total * decay + jnp.sum(weights, axis=1)
            acc = acc * decay[:, None] + _backend.dot(weights.astype(values.dtype), values)
            return acc, new_top, total

        return body

    full, every = counts[row, head, tile_id, 0], counts[row, head, tile_id, 1]
    carry = (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), -LARGE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, full, visit(causal=False), carry)
    acc, top, total = jax.lax.fori_loop(full, every, visit(causal=True), carry)
    blind = top <= -LARGE  # not `total == 0`: NaN must come out as NaN
    total = jnp.where(blind, 1.0, total)
    acc = jnp.where(blind[:, None], 0.0, acc / total[:, None])
    out[row, queries, head] = acc.reshape(tile, group, dim).astype(out.dtype)
    lse[row, queries, head] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) * LN_2).reshape(tile, group)
