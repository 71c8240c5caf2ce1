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


def base_2_logits(logits, bias, scale):
    """(q . k * scale + bias) / ln 2, the bias along the keys (last axis)."""
    logits = logits * (scale * LOG2_E)
    return logits if bias is None else logits + (bias * LOG2_E)


def load_bias(bias, row, head, tokens):
    return None if bias is None else bias[row, head, tokens]


def forward_kernel(q, k, v, bias, positions, block_ids, members, counts, out, lse, *, tile, block_size, scale):
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    position = per_head(positions[row, queries], group)
    # Padding may hold anything.
    query = jnp.where((position >= 0)[:, None], load_rows(q, row, queries, head), 0)
    bit = per_head(jnp.arange(tile, dtype=jnp.int32), group)

    def visit(causal):
        def body(trip, carry):
            acc, top, total = carry
            block, selected = block_ids[row, head, tile_id, trip], members[row, head, tile_id, trip]
            tokens = _backend.ds(block * block_size, block_size)
            keys, values = k[row, head, tokens], v[row, head, tokens]
            logits = base_2_logits(_backend.dot(query, keys.T), _expand(load_bias(bias, row, head, tokens)), scale)
            if causal:
                token = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
                logits = jnp.where(token[None] <= position[:, None], logits, -jnp.inf)
                # What no query of the tile sees may be unwritten memory: 0 * NaN is NaN.
                values = jnp.where((token <= jnp.max(position))[:, None], values, 0)
            member = (jax.lax.shift_right_logical(jnp.broadcast_to(selected, (rows,)), bit) & 1) != 0
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
        jnp.zeros((rows, dim), jnp.float32), jnp.full((rows,), -LARGE, jnp.float32), jnp.zeros((rows,), jnp.float32)
    )  # fmt: skip
    carry = jax.lax.fori_loop(0, full, visit(causal=False), carry)
    acc, top, total = jax.lax.fori_loop(full, every, visit(causal=True), carry)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    acc = jnp.where(seen[:, None], acc / total[:, None], 0.0)
    out[row, queries, head] = acc.reshape(tile, group, dim).astype(out.dtype)
    lse[row, queries, head] = jnp.where(seen, (top + jnp.log2(total)) * LN_2, -jnp.inf).reshape(tile, group)


def _expand(bias):
    return None if bias is None else bias[None]
