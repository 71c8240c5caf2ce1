"""The backward kernels, without atomics: dq over a tile's blocks, then dk, dv and dbias over a block's queries.

Both recompute the weights p from lse. With delta = sum(out * dout) - dlse: ds = p * (dout . v - delta).
The second pass gathers exactly the queries that selected a block, in segments of bounded length so that the sink block
does not hold up the rest. Each segment has its own sums; a third kernel adds them in order: the same bits every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, LOG2_E, per_head
from pallas_kernels.block_attention._forward import is_member, load_bias, load_rows, seen_tokens


def query_kernel(
    q, k, v, bias, positions, block_ids, members, counts, dout, lse, delta, dq, *, tile, block_size, scale
):
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    rows = tile * group
    queries = _backend.ds(tile_id * tile, tile)
    lse_row = load_rows(lse, row, queries, head)
    blind = lse_row == -jnp.inf
    # A query that sees nothing takes no part, whatever it holds: 0 * NaN is NaN.
    query, grad = (jnp.where(blind[:, None], 0, load_rows(x, row, queries, head)) for x in (q, dout))
    delta_row = jnp.where(blind, 0, load_rows(delta, row, queries, head))
    top = jnp.where(blind, LARGE, lse_row * LOG2_E)
    position = per_head(positions[row, queries], group)

    def visit(causal):
        def body(trip, acc):
            block, selected = block_ids[row, head, tile_id, trip], members[row, head, tile_id, trip]
            tokens = _backend.ds(block * block_size, block_size)
            keys, values = k[row, head, tokens], v[row, head, tokens]
            member = is_member(selected, tile, group)
            if causal:
                seen, seen_by_any = seen_tokens(block, block_size, member, position)
                keys, values = jnp.where(seen_by_any, keys, 0), jnp.where(seen_by_any, values, 0)
            logits = _backend.dot(query, keys.T) * (scale * LOG2_E) + load_bias(bias, row, head, tokens, 0)
            if causal:
                logits = jnp.where(seen, logits, -jnp.inf)
            weights = _backend.exp2(logits - jnp.where(member, top, LARGE)[:, None])
            dlogits = weights * (_backend.dot(grad, values.T) - delta_row[:, None])
            return acc + _backend.dot(dlogits.astype(keys.dtype), keys)

        return body

    full, every = counts[row, head, tile_id, 0], counts[row, head, tile_id, 1]
    acc = jax.lax.fori_loop(0, full, visit(causal=False), jnp.zeros((rows, dim), jnp.float32))
    acc = jax.lax.fori_loop(full, every, visit(causal=True), acc)
    dq[row, queries, head] = (acc * scale).reshape(-1, group, dim).astype(dq.dtype)


def key_kernel(
    q, k, v, bias, positions, listed, block, start, stop, rank, dout, lse, delta, dk, dv, dbias,
    *, gathered, block_size, scale,
):  # fmt: skip
    """gathered: queries of one trip. dk, dv: [B, K, E, P, D], dbias: [B, K, E, P], float32, of one segment each."""
    segment, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    at = (row, head, segment)
    own, begin, end = block[at], start[at], stop[at]

    @_backend.when(own >= 0)
    def _():
        tokens = _backend.ds(own * block_size, block_size)
        keys, values = k[row, head, tokens], v[row, head, tokens]
        block_bias = load_bias(bias, row, head, tokens, 1)
        token = own * block_size + jnp.arange(block_size, dtype=jnp.int32)

        def entries(trip):
            return begin + trip * gathered + jnp.arange(gathered, dtype=jnp.int32)

        def indices(trip):
            return listed[row, head, jnp.minimum(entries(trip), end - 1)]

        def visit(causal):
            def body(trip, carry):
                dk_acc, dv_acc, dbias_acc, index = carry
                ahead = indices(trip + 1)  # before this trip's gathers, which would otherwise wait for it
                query, grad = (load_rows(x, row, index, head) for x in (q, dout))
                top = load_rows(lse, row, index, head) * LOG2_E
                # The last trip repeats its last query, with weight 0.
                top = jnp.where(per_head(entries(trip), group) < end, top, LARGE)
                delta_row = load_rows(delta, row, index, head)
                block_keys, block_values = keys, values
                if causal:
                    position = per_head(positions[row, index], group)
                    # Tokens that none of these queries sees may be unwritten memory.
                    seen = (token <= jnp.max(position))[:, None]
                    block_keys, block_values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
                logits = _backend.dot(block_keys, query.T) * (scale * LOG2_E) + block_bias
                if causal:
                    logits = jnp.where(token[:, None] <= position[None], logits, -jnp.inf)
                weights = _backend.exp2(logits - top[None])
                dv_acc += _backend.dot(weights.astype(grad.dtype), grad)
                dlogits = weights * (_backend.dot(block_values, grad.T) - delta_row[None])
                dk_acc += _backend.dot(dlogits.astype(query.dtype), query)
                return dk_acc, dv_acc, dbias_acc + jnp.sum(dlogits, axis=1), ahead

            return body

        zeros = jnp.zeros((block_size, dim), jnp.float32)
        carry = (zeros, zeros, jnp.zeros((block_size,), jnp.float32), indices(0))
        trips = (end - begin + gathered - 1) // gathered
        # Queries ascend, so those inside the block come first; there are at most block_size of them.
        inside = jnp.where(rank[at] == 0, jnp.minimum(trips, -(-block_size // gathered)), 0)
        carry = jax.lax.fori_loop(0, inside, visit(causal=True), carry)
        dk_acc, dv_acc, dbias_acc, _ = jax.lax.fori_loop(inside, trips, visit(causal=False), carry)
        dk[at], dv[at] = dk_acc * scale, dv_acc
        if dbias is not None:
            dbias[at] = dbias_acc


def sum_kernel(first, dk_parts, dv_parts, dbias_parts, dk, dv, dbias):
    """Adds the segments of one block, in order."""
    own, head, row = (_backend.program_id(axis) for axis in range(3))
    block_size, dim = dk_parts.shape[-2:]
    tokens = _backend.ds(own * block_size, block_size)

    def total(parts, shape):
        def body(segment, acc):
            return acc + parts[row, head, segment]

        return jax.lax.fori_loop(first[row, head, own], first[row, head, own + 1], body, jnp.zeros(shape, jnp.float32))

    dk[row, head, tokens] = total(dk_parts, (block_size, dim)).astype(dk.dtype)
    dv[row, head, tokens] = total(dv_parts, (block_size, dim)).astype(dv.dtype)
    if dbias is not None:
        dbias[row, head, tokens] = total(dbias_parts, (block_size,))
