"""Who selected what, in the two orders that the kernels walk it: blocks of a tile of queries, queries of a block.

Both are read off one bit table, so that memory stays at T * M / 8 bytes per KV head plus the lists themselves. Dense
attention needs neither table nor lists: what a tile visits and who sees a block are ranges.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import _backend, blocks

_WORD = 32  # queries per word of the bit table
_CHUNK = 1024  # queries that one program of the inversion lists


class Unions(NamedTuple):
    """Per tile of adjacent queries: the blocks that any of them selected, ascending, and which of them did.

    counts: [..., 0] blocks that end at or before every query of the tile, [..., 1] all of the union.
    """

    block_ids: Int32[Array, "B K tiles U"]
    members: Int32[Array, "B K tiles U"]  # bit i: the tile's i-th query
    counts: Int32[Array, "B K tiles 2"]


class Prefixes(NamedTuple):
    """Per tile of adjacent queries of dense attention: all blocks of their documents up to their own, a range.

    counts: [..., 0] the first block, [..., 1] the end of those that every query sees whole, [..., 2] the end of all.
    first: of each query's document; None for one document per row.
    """

    counts: Int32[Array, "B tiles 3"]
    first: Int32[Array, "B T"] | None


class Segments(NamedTuple):
    """Per block the queries that see it, ascending, cut into segments of bounded length.

    Block m of a row and KV head owns the segments first[m] <= e < first[m + 1], all in order.
    """

    queries: Int32[Array, "B K entries"] | None  # None: entry t is query t
    block: Int32[Array, "B K E"]  # -1: unused segment
    start: Int32[Array, "B K E"]  # first entry
    stop: Int32[Array, "B K E"]
    inside: Int32[Array, "B K E"]  # so many entries from `start` on hold all queries that stand in the block itself
    first: Int32[Array, "B K M+1"]


def bit_table(
    block_ids: Int32[Array, "B K T J"],
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    num_blocks: int,
    block_size: int,
) -> Int32[Array, "B K M words"]:
    """Bit t % 32 of word [m, t // 32]: query t sees a token of block m. All other ids are dropped here, once.

    Ids may not repeat within a query: bits are added.
    """
    batch, kv_heads, length, _ = block_ids.shape
    words = -(-length // _WORD)
    own = blocks.query_blocks(positions, block_size)[:, None, :, None]
    first = blocks.query_first_blocks(positions, first_block, block_size)[:, None, :, None]
    seen = (block_ids >= first) & (block_ids <= own) & (block_ids < num_blocks)
    query = jnp.arange(length, dtype=jnp.int32)[:, None]
    row = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, kv_heads, 1, 1)
    size = batch * kv_heads * num_blocks * words
    index = jnp.where(seen, (row * num_blocks + block_ids) * words + query // _WORD, size)
    bit = jnp.broadcast_to(jnp.left_shift(jnp.int32(1), query % _WORD), index.shape)
    table = jnp.zeros(size, jnp.int32).at[index.reshape(-1)].add(bit.reshape(-1), mode="drop")
    return table.reshape(batch, kv_heads, num_blocks, words)


def last_seen(table: Int32[Array, "B K M words"], positions: Int32[Array, "B T"]) -> Int32[Array, "B K M"]:
    """The highest position among the queries that selected each block; -1 where none did."""
    word = jnp.arange(table.shape[-1], dtype=jnp.int32)
    highest = jnp.where(table != 0, _WORD * word + _WORD - 1 - jax.lax.clz(table), -1).max(-1)
    row = jnp.arange(positions.shape[0])[:, None, None]
    return jnp.where(highest >= 0, positions[row, jnp.maximum(highest, 0)], -1)


def _union_kernel(table, positions, block_ids, members, counts, *, tile, block_size):
    tile_id, head, row = (_backend.program_id(axis) for axis in range(3))
    num_blocks, width = table.shape[2], block_ids.shape[-1]
    lanes = _backend.next_power_of_two(num_blocks)
    block = jnp.arange(lanes, dtype=jnp.int32)
    inside = block < num_blocks
    start = tile_id * tile
    word = _backend.load(table.at[row, head, jnp.where(inside, block, 0), start // _WORD], mask=inside, other=0)
    mask = -1 if tile == _WORD else (1 << tile) - 1
    bits = jnp.where(inside, jax.lax.shift_right_logical(word, start % _WORD) & mask, 0)
    taken = bits != 0
    rank = _backend.running_count(taken)
    # Lanes that store nothing still get an address of their own.
    at = jnp.where(taken, rank - 1, width + block)
    _backend.store(block_ids.at[row, head, tile_id, at], block, mask=taken)
    _backend.store(members.at[row, head, tile_id, at], bits, mask=taken)
    position = positions[row, _backend.ds(start, tile)]
    earliest = jnp.min(jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max))
    before = taken & (block < (earliest + 1) // block_size)
    counts[row, head, tile_id, 0] = jnp.sum(before, dtype=jnp.int32)
    counts[row, head, tile_id, 1] = jnp.sum(taken, dtype=jnp.int32)


def unions(
    table: Int32[Array, "B K M words"], positions: Int32[Array, "B T"], *, tile: int, width: int, block_size: int
) -> Unions:
    """positions: padded to whole tiles with -1. width: most blocks that a union can hold. tile: divides 32."""
    batch, kv_heads = table.shape[:2]
    tiles = positions.shape[1] // tile

    def kernel(*refs):
        _union_kernel(*refs, tile=tile, block_size=block_size)

    lists = jax.ShapeDtypeStruct((batch, kv_heads, tiles, width), jnp.int32)
    counts = jax.ShapeDtypeStruct((batch, kv_heads, tiles, 2), jnp.int32)
    call = _backend.triton_call(
        kernel, name="block_unions", grid=(tiles, kv_heads, batch), out_shape=(lists, lists, counts), num_warps=4
    )
    return Unions(*call(table, positions))


def _inversion_kernel(table, offsets, queries):
    block, chunk, row_head = (_backend.program_id(axis) for axis in range(3))
    kv_heads = table.shape[1]
    row, head = row_head // kv_heads, row_head % kv_heads
    offset, stop = offsets[row, head, block, chunk], offsets[row, head, block, chunk + 1]

    @_backend.when(offset < stop)
    def _():
        lane = jnp.arange(_CHUNK, dtype=jnp.int32)
        word = table[row, head, block, chunk * (_CHUNK // _WORD) + lane // _WORD]
        taken = (jax.lax.shift_right_logical(word, lane % _WORD) & 1) != 0
        rank = _backend.running_count(taken)
        at = jnp.where(taken, offset + rank - 1, queries.shape[-1] + lane)
        _backend.store(queries.at[row, head, at], chunk * _CHUNK + lane, mask=taken)


def segments(table: Int32[Array, "B K M words"], *, entries: int, length: int, block_size: int) -> Segments:
    """entries: most pairs of a query and a block per KV head. length: most queries of one segment."""
    batch, kv_heads, num_blocks, words = table.shape
    per_chunk = _CHUNK // _WORD
    chunks = -(-words // per_chunk)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, chunks * per_chunk - words)))
    found = (
        jax.lax.population_count(table).reshape(batch, kv_heads, num_blocks, chunks, per_chunk).sum(-1, dtype=jnp.int32)
    )
    zero = jnp.zeros((batch, kv_heads, 1), jnp.int32)
    count = found.sum(-1, dtype=jnp.int32)
    block_offset = jnp.concatenate([zero, jnp.cumsum(count, axis=-1, dtype=jnp.int32)], axis=-1)
    chunk_offset = jnp.concatenate(
        [zero[..., None].repeat(num_blocks, 2), jnp.cumsum(found, axis=-1, dtype=jnp.int32)], axis=-1
    )
    offsets = block_offset[..., :-1, None] + chunk_offset

    queries = _backend.triton_call(
        _inversion_kernel,
        name="block_inversion",
        grid=(num_blocks, chunks, batch * kv_heads),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, entries), jnp.int32),
        num_warps=4,
    )(table, offsets)

    pieces = -(-count // length)
    first = jnp.concatenate([zero, jnp.cumsum(pieces, axis=-1, dtype=jnp.int32)], axis=-1)
    segment = jnp.arange(num_blocks + entries // length, dtype=jnp.int32)
    # The block of segment e: the last one whose first segment is at or before e.
    marks = jnp.zeros((batch, kv_heads, segment.size + 1), jnp.int32)
    row, head = (axis[..., None] for axis in jnp.indices((batch, kv_heads), sparse=True))
    block = jnp.cumsum(marks.at[row, head, first[..., 1:]].add(1, mode="drop"), axis=-1, dtype=jnp.int32)[..., :-1]
    used = segment < first[..., -1:]
    block = jnp.where(used, block, 0)

    def of_block(values: Array) -> Array:
        return jnp.take_along_axis(values, block, axis=-1)

    rank = segment - of_block(first)
    start = of_block(block_offset) + rank * length
    stop = jnp.minimum(start + length, of_block(block_offset[..., 1:]))
    # Queries ascend, so those inside the block come first; there are at most as many as it has tokens.
    inside = jnp.clip(block_size - rank * length, 0, stop - start)
    return Segments(queries, jnp.where(used, block, -1), start, stop, inside, first)


# ---- dense attention ----


def prefixes(
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    tile: int,
    num_blocks: int,
    block_size: int,
) -> Prefixes:
    """positions: padded to whole tiles with -1."""
    first = blocks.query_first_blocks(positions, first_block, block_size)

    def least(x: Array) -> Int32[Array, "B tiles"]:
        """The smallest of each tile's real queries, `num_blocks` without any."""
        return jnp.where(positions >= 0, x, num_blocks).reshape(x.shape[0], -1, tile).min(-1)

    end = jnp.clip(-least(-1 - positions // block_size), 0, num_blocks)
    begin, last = jnp.minimum(least(first), end), jnp.clip(-least(-first), 0, end)
    whole = jnp.clip(least((positions + 1) // block_size), begin, end)
    # A tile of several documents masks all that it visits.
    whole = jnp.where(begin == last, whole, begin)
    return Prefixes(jnp.stack([begin, whole, end], axis=-1), None if first_block is None else first)


def last_positions(
    positions: Int32[Array, "B T"], first_block: Int32[Array, "B M"] | None, *, num_blocks: int, block_size: int
) -> Int32[Array, "B M"]:
    """The highest position among the queries of each block's document; -1 where there is none."""
    if first_block is None:
        return jnp.broadcast_to(positions.max(-1, keepdims=True), (positions.shape[0], num_blocks))
    first = blocks.query_first_blocks(positions, first_block, block_size)
    row = jnp.arange(positions.shape[0])[:, None]
    last = jnp.full((positions.shape[0], num_blocks), -1, jnp.int32).at[row, first].max(positions)
    return jnp.take_along_axis(last, first_block, axis=-1)


def ranges(
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    kv_heads: int,
    num_blocks: int,
    block_size: int,
    length: int,
) -> Segments:
    """Who sees each block in dense attention: queries beside each other, padding among them. length: of a segment."""
    batch, queries = positions.shape
    row, query = jnp.arange(batch)[:, None], jnp.arange(queries, dtype=jnp.int32)
    real = positions >= 0
    # The first query at or behind each block's start, and the last one of its document.
    own = jnp.where(real, positions // block_size, num_blocks)
    begin = jnp.full((batch, num_blocks + 1), queries, jnp.int32).at[row, own].min(jnp.where(real, query, queries))
    begin = jax.lax.cummin(begin, axis=1, reverse=True)
    if first_block is None:
        end = jnp.max(jnp.where(real, query + 1, 0), axis=-1, keepdims=True)
    else:
        first = jnp.where(real, blocks.query_first_blocks(positions, first_block, block_size), num_blocks)
        end = jnp.zeros((batch, num_blocks), jnp.int32).at[row, first].max(query + 1, mode="drop")
        end = jnp.take_along_axis(end, first_block, axis=-1)
    pieces = -(-queries // length)
    start = begin[:, :-1, None] + length * jnp.arange(pieces, dtype=jnp.int32)
    stop = jnp.maximum(jnp.minimum(start + length, end[..., None]), start)
    inside = jnp.clip(begin[:, 1:, None] - start, 0, stop - start)
    block = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32)[:, None], start.shape)

    def of_heads(x: Array) -> Int32[Array, "B K E"]:
        return jnp.broadcast_to(x.reshape(batch, 1, -1), (batch, kv_heads, num_blocks * pieces))

    owned = pieces * jnp.arange(num_blocks + 1, dtype=jnp.int32)
    first_of = jnp.broadcast_to(owned, (batch, kv_heads, num_blocks + 1))
    return Segments(None, of_heads(block), of_heads(start), of_heads(stop), of_heads(inside), first_of)
