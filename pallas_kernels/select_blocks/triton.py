"""Block selection in Pallas-Triton: one query per program, its best blocks found by bisection on ordered float bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend, blocks
from pallas_kernels.select_blocks.xla import comparable

_BLOCKS_PER_WARP = 512


def ordered(scores):
    """Integers in the order of the floats, none of them the lowest."""
    bits = jax.lax.bitcast_convert_type(comparable(scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _count(mask):
    return jnp.sum(mask, dtype=jnp.int32)


def with_ties(keys, threshold, count, found, lowest):
    """Mask of the keys from the threshold up, which `found` are; where those are too many, of the first equal ones."""

    def first_equal(threshold):
        above, equal = keys > threshold, (keys == threshold) & (threshold > lowest)
        return above | (equal & (_backend.running_count(equal) <= count - _count(above)))

    return jax.lax.cond(found == count, lambda t: keys >= t, first_equal, threshold)


def _best(keys, count, bits):
    """Mask of the `count` largest keys, ties to the lowest index; the lowest possible key is never taken.

    bits: how many low bits of the keys vary. The threshold is found from the highest bit down, by counting.
    """
    lowest = jnp.int32(0 if bits < 32 else jnp.iinfo(jnp.int32).min)

    def unsettled(state):
        bit, _, found = state
        return (bit >= 0) & (found != count)

    def settle(state):
        bit, threshold, found = state
        candidate = threshold + jnp.left_shift(jnp.int32(1), bit)  # wraps from the lowest integer up
        above = _count(keys >= candidate)
        taken = above >= count
        return bit - 1, jnp.where(taken, candidate, threshold), jnp.where(taken, above, found)

    _, threshold, found = jax.lax.while_loop(unsettled, settle, (jnp.int32(bits - 1), lowest, jnp.int32(-1)))
    return with_ties(keys, threshold, count, found, lowest)


def _kernel(query_scores, importance, positions, first_blocks, ids, *, width, block_size, sink, local, query_picks):
    query, head, row = (_backend.program_id(axis) for axis in range(3))
    num_selected = ids.shape[-1]
    block = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)
    inside = block < width
    position = positions[row, query]
    first = jnp.int32(0) if first_blocks is None else first_blocks[row, query]
    own = blocks.query_blocks(position, block_size)
    forced, visible = blocks.forced_and_visible(own, first, block.size, sink=sink, local=local)
    chosen, visible = forced & inside, visible & inside

    def load(scores, *index):
        return _backend.load(scores.at[(*index, jnp.where(inside, block, 0))], mask=inside, other=0)

    def best_by_query(count):
        keys = ordered(load(query_scores, row, head, query))
        return _best(jnp.where(visible & ~chosen, keys, jnp.iinfo(jnp.int32).min), count, 32)

    if query_scores is not None and importance is not None and query_picks > 0:
        chosen |= best_by_query(query_picks)
    count = num_selected - _count(chosen)
    if importance is None:
        chosen |= best_by_query(count)
    else:
        ranks = load(importance, row, head)
        chosen |= _best(jnp.where(visible & ~chosen, ranks, 0), count, width.bit_length())

    rank = _backend.running_count(chosen)
    # Lanes that store nothing still get an address of their own.
    at = jnp.where(chosen, rank - 1, num_selected + block)
    _backend.store(ids.at[row, head, query, at], block, mask=chosen)
    slot = jnp.arange(_backend.next_power_of_two(num_selected), dtype=jnp.int32)
    _backend.store(
        ids.at[row, head, query, slot], jnp.full_like(slot, -1), mask=(slot >= _count(chosen)) & (slot < num_selected)
    )


@jax.jit
def _ranks(scores: Float[Array, "B K M"]) -> Int32[Array, "B K M"]:
    """1 for the worst block of a row and KV head to M for the best, ties better for the lower id.

    All queries share them, and they need a third of the counting that floats do.
    """
    keys = ordered(scores)
    mine, other = keys[..., :, None], keys[..., None, :]
    index = jnp.arange(scores.shape[-1])
    better = (mine > other) | ((mine == other) & (index[:, None] <= index))
    return better.sum(-1, dtype=jnp.int32)


def select_blocks(
    query_scores: Float[Array, "B K T M"] | None,
    importance_scores: Float[Array, "B K M"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    block_size: int,
    num_selected_blocks: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    num_query_blocks: int,
) -> Int32[Array, "B K T J"]:
    scores = importance_scores if query_scores is None else query_scores
    assert scores is not None
    batch, length = positions.shape
    kv_heads, width = scores.shape[1], scores.shape[-1]

    importance = None if importance_scores is None else _ranks(importance_scores)
    first = None if first_block is None else blocks.query_first_blocks(positions, first_block, block_size)

    def kernel(*refs: Any) -> None:
        _kernel(
            *refs, width=width, block_size=block_size, sink=num_sink_blocks, local=num_local_blocks,
            query_picks=num_query_blocks,
        )  # fmt: skip

    return _backend.triton_call(
        kernel,
        name="select_blocks",
        grid=(length, kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, length, num_selected_blocks), jnp.int32),
        num_warps=min(16, max(1, _backend.next_power_of_two(width // _BLOCKS_PER_WARP))),
    )(query_scores, importance, positions, first)
