"""Block-sparse attention in XLA: tiles of adjacent queries over the union of their blocks, online softmax.

Adjacent queries select nearly the same blocks, so a tile of them loads each block of the union once and masks who
sees it. Blocks are visited in aligned runs ("spans") of neighbours, in ascending order. A span that a query does not
see adds exactly zero to it, so its output does not depend, to the bit, on what the rest of its tile selected. Memory is
bounded by one tile and one span, forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import blocks
from pallas_kernels.formulas import weight_shift
from pallas_kernels.varying import axes_of, varying

_TILE_ROWS = 256  # query rows (tokens x group) of one tile
_SPAN_TOKENS = 128  # keys visited at once


class Settings(NamedTuple):
    """Static arguments of the op."""

    block_size: int
    scale: float


class Tiles(NamedTuple):
    """Queries cut into tiles: [tiles, B, ...], padded with position -1."""

    q: Float[Array, "tiles B K t G D"]
    block_ids: Int32[Array, "tiles B K t J"] | None
    positions: Int32[Array, "tiles B t"]
    first: Int32[Array, "tiles B t"]


class Spans(NamedTuple):
    """Keys, values and bias cut into spans of whole blocks, padded with zeros."""

    k: Float[Array, "B K spans s D"]
    v: Float[Array, "B K spans s D"]
    bias: Float[Array, "B K spans s"] | None


class Plan(NamedTuple):
    """What one tile visits: `spans` [B, K, spans] ascending, the count of trips, and who selected which block."""

    spans: Int32[Array, "B K spans"]
    trips: Int32[Array, ""]
    member: Array | None  # [B, K, t, spans, blocks per span] bool; None when every block is selected


def _tile_length(length: int, group: int) -> int:
    return min(length, max(1, _TILE_ROWS // group))


def _span_blocks(num_blocks: int, block_size: int) -> int:
    return max(1, min(num_blocks, _SPAN_TOKENS // block_size))


def _split_queries(x: Array, tile: int, fill: int = 0) -> Array:
    """[B, T, ...] -> [tiles, B, tile, ...]."""
    tiles = -(-x.shape[1] // tile)
    x = jnp.pad(x, [(0, 0), (0, tiles * tile - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], tiles, tile, *x.shape[2:]), 1, 0)


def _join_queries(x: Array, length: int) -> Array:
    """[tiles, B, tile, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _group_heads(x: Float[Array, "B T N *rest"], kv_heads: int) -> Array:
    """[B, T, N, ...] -> [B, T, K, G, ...]."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])


def _split_rows(x: Float[Array, "B T N *rest"], kv_heads: int, tile: int) -> Array:
    """[B, T, N, ...] -> [tiles, B, K, tile, G, ...]."""
    return jnp.moveaxis(_split_queries(_group_heads(x, kv_heads), tile), 3, 2)


def _join_rows(x: Array, length: int) -> Array:
    """[tiles, B, K, tile, G, ...] -> [B, T, N, ...]."""
    x = _join_queries(jnp.moveaxis(x, 2, 3), length)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _prepare(
    settings: Settings,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    block_ids: Array | None,
    positions: Array,
    first_block: Array | None,
) -> tuple[Tiles, Spans]:
    batch, length, heads, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    size = settings.block_size
    tile = _tile_length(length, heads // kv_heads)
    first = blocks.query_first_blocks(positions, first_block, size)
    ids = None
    if block_ids is not None:
        ids = jnp.moveaxis(_split_queries(jnp.moveaxis(block_ids, 2, 1), tile, -1), 3, 2)
    tiles = Tiles(_split_rows(q, kv_heads, tile), ids, _split_queries(positions, tile, -1), _split_queries(first, tile))

    span = size * _span_blocks(blocks.num_blocks(tokens, size), size)
    count = -(-tokens // span)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, count * span - tokens)] + [(0, 0)] * (x.ndim - 3))
        return x.reshape(batch, kv_heads, count, span, *x.shape[3:])

    return tiles, Spans(cut(k), cut(v), None if bias is None else cut(bias))


def _plan(settings: Settings, tile: Tiles, spans: Spans) -> Plan:
    batch, kv_heads, count, span = spans.k.shape[:4]
    per_span = span // settings.block_size
    if tile.block_ids is None:
        trips = jnp.minimum(jnp.max(tile.positions) // span + 1, count)
        ids = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, kv_heads, count))
        return Plan(ids, trips, None)
    width = count * per_span
    # A tile of n queries marks its blocks in a table; ids outside [0, width) are dropped.
    marks = jnp.where((tile.block_ids >= 0) & (tile.block_ids < width), tile.block_ids, width)
    table = jnp.zeros((*marks.shape[:-1], width + 1), bool)
    member = jnp.put_along_axis(table, marks, True, -1, inplace=False)[..., :width]
    member = member.reshape(*marks.shape[:-1], count, per_span)
    wanted = member.any((2, 4))
    order = jnp.argsort(~wanted, axis=-1, stable=True).astype(jnp.int32)
    return Plan(order, jnp.max(wanted.sum(-1)), member)


def _gather_span(x: Array, span_ids: Int32[Array, "B K"]) -> Array:
    """[B, K, spans, ...] -> [B, K, ...] at one span per row and head."""
    index = span_ids.reshape(*span_ids.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=2).squeeze(2)


def _visit(settings: Settings, tile: Tiles, spans: Spans, plan: Plan, trip: Array) -> tuple[Array, ...]:
    """Returns what one trip sees: span ids [B, K], keys and values [B, K, s, D], logits [B, K, t, G, s] (-inf where
    masked), mask."""
    dtype = jnp.promote_types(tile.q.dtype, jnp.float32)
    size = settings.block_size
    span_ids = jax.lax.dynamic_index_in_dim(plan.spans, trip, axis=2, keepdims=False)
    k, v = _gather_span(spans.k, span_ids), _gather_span(spans.v, span_ids)
    span = k.shape[2]
    token = span_ids[..., None] * span + jnp.arange(span, dtype=jnp.int32)  # [B, K, s]
    position = tile.positions[:, None, :, None]
    mask = (token[:, :, None] <= position) & (token[:, :, None] >= size * tile.first[:, None, :, None])
    if plan.member is not None:
        member = _gather_span(jnp.moveaxis(plan.member, 3, 2), span_ids)  # [B, K, t, blocks per span]
        mask &= jnp.repeat(member, size, axis=-1)
    # What no query of the tile sees may be unwritten memory: 0 * NaN is NaN.
    seen = mask.any(2)[..., None]
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    logits = jnp.einsum("bktgd,bksd->bktgs", tile.q, k, preferred_element_type=dtype) * settings.scale
    if spans.bias is not None:
        logits += jnp.where(seen[..., 0], _gather_span(spans.bias, span_ids), 0)[:, :, None, None].astype(dtype)
    mask = mask[:, :, :, None]
    return span_ids, k, v, jnp.where(mask, logits, -jnp.inf), mask


def forward(
    settings: Settings,
    q: Float[Array, "B T N D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bias: Float[Array, "B K S"] | None,
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"], tuple[Array, Array]]:
    """(out, lse, its two parts for `backward`: the highest logit and the logarithm of the sum of weights)."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    tiles, spans = _prepare(settings, q, k, v, bias, block_ids, positions, first_block)
    axes = axes_of((tiles, spans))
    less = 0.5 ** weight_shift(k.shape[2], v.dtype)  # a power of two: it changes no bit of what comes out

    def run_tile(tile: Tiles) -> tuple[Array, Array, Array]:
        plan = _plan(settings, tile, spans)

        def body(trip: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = carry
            _, _, v, logits, mask = _visit(settings, tile, spans, plan, trip)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights = jnp.where(mask, jnp.exp(logits - _finite(new_top)[..., None]) * less, 0)
            decay = jnp.exp(top - _finite(new_top))  # 0 while nothing was seen
            seen = jnp.einsum("bktgs,bksd->bktgd", weights.astype(v.dtype), v, preferred_element_type=dtype)
            return out * decay[..., None] + seen, new_top, total * decay + weights.sum(-1)

        rows = tile.q.shape[:-1]
        init = (jnp.zeros(tile.q.shape, dtype), jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))
        out, top, total = jax.lax.fori_loop(0, plan.trips, body, varying(init, axes))
        safe = jnp.where(total == 0, 1, total)  # what sees nothing has the sum 0, and what is NaN stays so
        top = jnp.where(total == 0, -jnp.inf, top)
        return (out / safe[..., None]).astype(q.dtype), top, jnp.log(safe / less)

    out, top, log_total = (_join_rows(x, q.shape[1]) for x in jax.lax.map(run_tile, tiles))
    return out, top + log_total, (top, log_total)


def backward(
    settings: Settings,
    residuals: tuple[Any, ...],
    grads: tuple[Float[Array, "B T N D"], Float[Array, "B T N"]],
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dbias) from (q, k, v, bias, block_ids, positions, first_block, out, parts of lse)."""
    q, k, v, bias, block_ids, positions, first_block, out, (top, log_total) = residuals
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    # A query that sees nothing takes no part, whatever it holds and whatever a loss makes of its -inf: 0 * NaN is NaN.
    blind = jnp.isneginf(top)
    q, dout = (jnp.where(blind[..., None], 0, x) for x in (q, grads[0]))
    dlse = jnp.where(blind, 0, grads[1])
    tiles, spans = _prepare(settings, q, k, v, bias, block_ids, positions, first_block)
    tile_length, kv_heads = tiles.q.shape[3], k.shape[1]
    # softmax backward: dlogit = p * (dp - delta), delta = sum(out * dout) - dlse.
    delta = (out.astype(dtype) * dout.astype(dtype)).sum(-1) - dlse.astype(dtype)
    rows = tuple(_split_rows(x, kv_heads, tile_length) for x in (dout, top, log_total, delta))
    axes = axes_of((tiles, spans, rows))

    def run_tile(totals: tuple[Array, ...], args: tuple[Tiles, tuple[Array, ...]]) -> tuple[Any, Array]:
        tile, (dout, top, log_total, delta) = args
        plan = _plan(settings, tile, spans)

        def body(trip: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk, dv, dbias = carry
            span_ids, k, v, logits, mask = _visit(settings, tile, spans, plan, trip)
            # Not less lse: where the highest logit is large, that has no digits left for the sum.
            weights = jnp.where(mask, jnp.exp(logits - _finite(top)[..., None] - log_total[..., None]), 0)
            dweights = jnp.einsum("bktgd,bksd->bktgs", dout, v, preferred_element_type=dtype)
            dlogits = weights * (dweights - delta[..., None])
            scaled = (dlogits * settings.scale).astype(q.dtype)
            dq += jnp.einsum("bktgs,bksd->bktgd", scaled, k, preferred_element_type=dtype)
            dk_span = jnp.einsum("bktgs,bktgd->bksd", scaled, tile.q, preferred_element_type=dtype)
            dv_span = jnp.einsum("bktgs,bktgd->bksd", weights.astype(dout.dtype), dout, preferred_element_type=dtype)
            row, head = jnp.indices(span_ids.shape, sparse=True)
            at = (row, head, span_ids)
            return dq, dk.at[at].add(dk_span), dv.at[at].add(dv_span), dbias.at[at].add(dlogits.sum((2, 3)))

        init = varying(jnp.zeros(tile.q.shape, dtype), axes)
        dq, *totals_ = jax.lax.fori_loop(0, plan.trips, body, (init, *totals))
        return tuple(totals_), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(shape, dtype) for shape in (spans.k.shape, spans.v.shape, spans.k.shape[:-1]))
    (dk, dv, dbias), dq = jax.lax.scan(run_tile, varying(zeros, axes), (tiles, rows))

    def join(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : k.shape[2]]

    bias_grad = None if bias is None else join(dbias).astype(bias.dtype)
    return _join_rows(dq, q.shape[1]), join(dk).astype(k.dtype), join(dv).astype(v.dtype), bias_grad


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)
