"""The backward kernels, without atomics: dq over a tile's blocks, then dk, dv and dbias over a block's queries.

Both recompute the weights p from the highest logit and the logarithm of the sum. With delta = sum(out * dout) - dlse:
ds = p * (dout . v - delta).
The second pass gathers exactly the queries that selected a block, in segments of bounded length so that the sink block
does not hold up the rest. Each segment has its own sums; a third kernel adds them in order: the same bits every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, Softmax, per_head
from pallas_kernels.block_attention._forward import load_bias, load_rows, seen_tokens, visits_of


def query_kernel(q, k, v, bias, positions, lists, dout, tops, log_totals, delta, dq, *, tile, block_size, scale):
    group, dim = q.shape[-2:]
    rows = tile * group
    tile_id, head, row, visits = visits_of(lists, tile, group)
    queries = _backend.ds(tile_id * tile, tile)
    softmax = Softmax.of(scale, bias is not None, k.shape[2], v.dtype)
    top, log_total = (load_rows(x, row, queries, head) for x in (tops, log_totals))
    blind = top >= LARGE
    # A query that sees nothing takes no part, whatever it holds: 0 * NaN is NaN.
    query, grad = (jnp.where(blind[:, None], 0, load_rows(x, row, queries, head)) for x in (q, dout))
    delta_row = jnp.where(blind, 0, load_rows(delta, row, queries, head))
    position = per_head(positions[row, queries], group)

    def visit(causal):
        def body(trip, acc):
            block, member = visits.at(trip, causal)
            tokens = _backend.ds(block * block_size, block_size)
            keys, values = k[row, head, tokens], v[row, head, tokens]
            if causal:
                seen, seen_by_any = seen_tokens(block, block_size, member, position)
                keys, values = jnp.where(seen_by_any, keys, 0), jnp.where(seen_by_any, values, 0)
            subtracted = (top if member is None else jnp.where(member, top, LARGE))[:, None]
            logits = softmax.logits(_backend.dot(query, keys.T), load_bias(bias, row, head, tokens, 0))
            if causal:
                logits = jnp.where(seen, logits, -jnp.inf)
            weights = softmax.probabilities(logits - subtracted, log_total[:, None])
            dlogits = weights * (_backend.dot(grad, values.T) - delta_row[:, None])
            return acc + _backend.dot(dlogits.astype(keys.dtype), keys)

        return body

    acc = jnp.zeros((rows, dim), jnp.float32)
    acc = jax.lax.fori_loop(visits.begin, visits.whole, visit(causal=False), acc)
    acc = jax.lax.fori_loop(visits.whole, visits.end, visit(causal=True), acc)
    dq[row, queries, head] = (acc * scale).reshape(-1, group, dim).astype(dq.dtype)


def key_kernel(
    q, k, v, bias, positions, listed, block, start, stop, inside, dout, tops, log_totals, delta,
    dk, dv, dbias,
    *, gathered, block_size, scale,
):  # fmt: skip
    """gathered: queries of one trip. dk, dv: [B, K, E, P, D], dbias: [B, K, E, P], float32, of one segment each.

    What sees nothing is not among the listed queries. Without a list it has q and dout 0 and top LARGE.
    """
    segment, head, row = (_backend.program_id(axis) for axis in range(3))
    group, dim = q.shape[-2:]
    softmax = Softmax.of(scale, bias is not None, k.shape[2], v.dtype)
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
            index = jnp.minimum(entries(trip), end - 1)
            return jnp.clip(index, 0, q.shape[1] - 1) if listed is None else listed[row, head, index]

        def visit(causal):
            def body(trip, carry):
                dk_acc, dv_acc, dbias_acc, index = carry
                ahead = indices(trip + 1)  # before this trip's gathers, which would otherwise wait for it
                query, grad = (load_rows(x, row, index, head) for x in (q, dout))
                top, log_total = (load_rows(x, row, index, head) for x in (tops, log_totals))
                # The last trip has queries beyond the end, with weight 0.
                top = jnp.where(per_head(entries(trip), group) < end, top, LARGE)
                delta_row = load_rows(delta, row, index, head)
                block_keys, block_values = keys, values
                if causal:
                    position = per_head(positions[row, index], group)
                    # Tokens that none of these queries sees may be unwritten memory.
                    seen = (token <= jnp.max(position))[:, None]
                    block_keys, block_values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
                logits = softmax.logits(_backend.dot(block_keys, query.T), block_bias)
                if causal:
                    logits = jnp.where(token[:, None] <= position[None], logits, -jnp.inf)
                weights = softmax.probabilities(logits - top[None], log_total[None])
                dv_acc += _backend.dot(weights.astype(grad.dtype), grad)
                dlogits = weights * (_backend.dot(block_values, grad.T) - delta_row[None])
                dk_acc += _backend.dot(dlogits.astype(query.dtype), query)
                return dk_acc, dv_acc, dbias_acc + jnp.sum(dlogits, axis=1), ahead

            return body

        zeros = jnp.zeros((block_size, dim), jnp.float32)
        carry = (zeros, zeros, jnp.zeros((block_size,), jnp.float32), indices(0))
        trips = (end - begin + gathered - 1) // gathered
        masked = (inside[at] + gathered - 1) // gathered
        carry = jax.lax.fori_loop(0, masked, visit(causal=True), carry)
        dk_acc, dv_acc, dbias_acc, _ = jax.lax.fori_loop(masked, trips, visit(causal=False), carry)
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
