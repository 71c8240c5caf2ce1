"""The forward kernel: one tile of adjacent queries over the blocks that any of them sees, by online softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _backend
from pallas_kernels._backend import LARGE, per_head
from pallas_kernels.block_attention._lists import Prefixes, Unions


def load_rows(ref, row, queries, head):
    """All heads of one KV head at some queries, [queries * G, ...], from [B, T, K, G, ...]."""
    values = ref[row, queries, head]
    return values.reshape(-1, *values.shape[2:])


def load_bias(bias, row, head, tokens, axis):
    """Loads the bias of one block, with a new `axis` for the queries; None without bias."""
    return None if bias is None else jnp.expand_dims(bias[row, head, tokens], axis)


def is_member(selected, tile, group):
    """[tile * group]: the rows of the queries whose bit is set in `selected`."""
    bit = per_head(jnp.arange(tile, dtype=jnp.int32), group)
    return (jax.lax.shift_right_logical(jnp.broadcast_to(selected, bit.shape), bit) & 1) != 0


class Visits(NamedTuple):
    """What a tile visits: trips from `begin` on, those before `whole` to blocks that lie wholly before every query.

    at(trip, causal): (block, rows of the queries that see anything of it, None where only the mask tells).
    """

    begin: Any
    whole: Any
    end: Any
    at: Callable[[Any, bool], tuple[Any, Any]]


def visits_of(lists: Unions | Prefixes, tile: int, group: int) -> tuple[Any, Any, Any, Visits]:
    """(tile, KV head and row of this program, what it visits)."""
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    if isinstance(lists, Unions):
        whole, end = (lists.counts[row, head, tile_id, i] for i in range(2))

        def listed(trip, causal):
            member = is_member(lists.members[row, head, tile_id, trip], tile, group)
            return lists.block_ids[row, head, tile_id, trip], member

        return tile_id, head, row, Visits(0, whole, end, listed)

    tile_id = lists.counts.shape[1] - 1 - tile_id  # the longest first: what starts last is done soon
    firsts = lists.first

    def every(trip, causal):
        if firsts is None or not causal:
            return trip, None
        return trip, per_head(firsts[row, _backend.ds(tile_id * tile, tile)], group) <= trip

    begin, whole, end = (lists.counts[row, tile_id, i] for i in range(3))
    return tile_id, head, row, Visits(begin, whole, end, every)


def seen_tokens(block, block_size, member, position):
    """(row x token: who sees which, token: seen by any) in a block that is not wholly before all queries.

    A token that no query sees may be unwritten memory, and NaN times weight 0 is NaN.
    """
    token = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
    last = position if member is None else jnp.where(member, position, -1)
    return token[None] <= last[:, None], (token <= jnp.max(last))[:, None]


def forward_kernel(q, k, v, bias, positions, lists, out, tops, log_totals, *, tile, block_size, scale):
    """tops: the highest logit of each row, LARGE where it sees nothing; log_totals: of its sum of weights."""
    group, dim = q.shape[-2:]
    rows = tile * group
    tile_id, head, row, visits = visits_of(lists, tile, group)
    queries = _backend.ds(tile_id * tile, tile)
    position = per_head(positions[row, queries], group)
    # Padding may hold anything.
    query = jnp.where((position >= 0)[:, None], load_rows(q, row, queries, head), 0)
    softmax = _backend.Softmax.of(scale, bias is not None, k.shape[2], v.dtype)

    def visit(causal):
        def body(trip, carry):
            acc, top, total = carry
            block, member = visits.at(trip, causal)
            tokens = _backend.ds(block * block_size, block_size)
            keys, values = k[row, head, tokens], v[row, head, tokens]
            logits = softmax.logits(_backend.dot(query, keys.T), load_bias(bias, row, head, tokens, 0))
            if causal:
                seen, seen_by_any = seen_tokens(block, block_size, member, position)
                logits = jnp.where(seen, logits, -jnp.inf)
                values = jnp.where(seen_by_any, values, 0)
            highest = jnp.max(logits, axis=1)
            new_top = jnp.maximum(top, highest if member is None else jnp.where(member, highest, -LARGE))
            # Subtracting LARGE gives the rows that did not select this block weight 0.
            subtracted = new_top if member is None else jnp.where(member, new_top, LARGE)
            weights = softmax.weights(logits - subtracted[:, None])
            decay = softmax.decay(top - new_top)
            total = total * decay + jnp.sum(weights, axis=1)
            acc = acc * decay[:, None] + _backend.dot(weights.astype(values.dtype), values)
            return acc, new_top, total

        return body

    carry = (
        jnp.zeros((rows, dim), jnp.float32),
        jnp.full((rows,), -LARGE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = jax.lax.fori_loop(visits.begin, visits.whole, visit(causal=False), carry)
    acc, top, total = jax.lax.fori_loop(visits.whole, visits.end, visit(causal=True), carry)
    # Not `total == 0`: NaN must come out as NaN. Blocks that a tile sees whole are not masked for its padding.
    blind = (top <= -LARGE) | (position < 0)
    total = jnp.where(blind, 1.0, total)
    acc = jnp.where(blind[:, None], 0.0, acc / total[:, None])
    out[row, queries, head] = acc.reshape(tile, group, dim).astype(out.dtype)
    tops[row, queries, head] = jnp.where(blind, LARGE, top).reshape(tile, group)
    log_totals[row, queries, head] = softmax.log_total(total).reshape(tile, group)
