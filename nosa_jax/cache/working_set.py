"""How many rows, and how many tokens of each, are read at once, so that what is held meanwhile fits a budget."""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

import jax.numpy as jnp

from nosa_jax.config import ModelConfig
from pallas_kernels import blocks
from pallas_kernels.checks import bad_value, require_bool, require_int

DEFAULT_BYTES = 2 * 2**30
MLP_TOKENS = 8192  # that go through the MLP at once: enough to keep a large GPU busy
_LEAST_WIDTH = 16  # tokens
_LEAST_CHUNK = 256  # tokens; shorter chunks would read the cache again and again
_ROOM = 64  # of which the room for generated tokens is a multiple
_SCORES_BYTES = 2**28  # of queries that select, or attend, at the same time


class Limits(NamedTuple):
    """How prompts are read. chunk: tokens of a row at once. working_set: bytes held meanwhile. None for the default.
    dense: whether their tokens attend to all before them, whatever the variant."""

    chunk: int | None = None
    working_set: int | None = None
    dense: bool = False


def as_limits(chunk: Any, working_set: Any, dense: Any = False) -> Limits:
    """Raises ValueError or TypeError for what is neither None nor a number that can be."""
    chunk = None if chunk is None else require_int("chunk", chunk, 1, "must be an int >= 1 or None")
    rule = "must be a number of bytes >= 1 or None"
    working_set = None if working_set is None else require_int("working_set", working_set, 1, rule)
    return Limits(chunk, working_set, require_bool("dense", dense))


def rounded(count: int) -> int:
    """What prompts, and room for new tokens, are padded to outside `jax.jit`, so that near lengths share a program.

    `count` or a little more, at most an eighth from 128 on: one of eight numbers between a power of two and the next.
    """
    step = max(_LEAST_WIDTH, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def rounded_room(count: int) -> int:
    """Room for so many generated tokens of a row, as a policy keeps it."""
    return -(-max(1, count) // _ROOM) * _ROOM


class Reading(NamedTuple):
    """rows: read together. chunk: tokens of each row at once; None for all. bytes: held meanwhile, beside the state."""

    rows: int
    chunk: int | None
    bytes: int


def staged_blocks(num_blocks: int, width: int, block_size: int, *, fresh: bool) -> int:
    """How many blocks of each row are staged for `width` new tokens: all, or what they fill of rows that were empty."""
    return min(num_blocks, blocks.num_blocks(width, block_size)) if fresh else num_blocks


def plan_reading(
    config: ModelConfig,
    batch: int,
    width: int,
    num_blocks: int,
    *,
    dtype: Any,
    row_bytes: int,
    fresh: bool,
    offloaded: bool,
    limits: Limits = Limits(),
    whole_rows: bool = False,
) -> Reading:
    """The largest groups of rows that fit the working set; where not even one row does, one row in chunks of tokens.

    width: new tokens of a row, at most.
    num_blocks: blocks that a row may fill, new tokens included.
    row_bytes: what the state of a row takes on the device.
    fresh: whether the rows are empty before.
    offloaded: whether the cache lives in host memory. Where rows have blocks there, the next layer is staged meanwhile.
    limits: a chunk of None leaves it open; a working set of None is DEFAULT_BYTES, or what one row needs where that is
        more.
    whole_rows: rows are never read in chunks, and what is made of a layer's keys is held beside them, as with a policy.
    Raises ValueError where the working set is too small for one row.
    """
    chunk, budget = limits.chunk, limits.working_set
    limit = DEFAULT_BYTES if budget is None else budget
    given = chunk is not None
    chunk = None if chunk is None or chunk >= width else chunk

    def size(rows: int, chunk: int | None) -> int:
        whole = fresh and chunk is None
        staged = staged_blocks(num_blocks, width, config.attention.block_size, fresh=whole)
        of_group = 0 if rows == batch else 3 * rows * row_bytes // 2  # a group works on a copy of its rows
        read = width if chunk is None else chunk
        copies = 4 if offloaded and not whole else 2
        if whole_rows:  # keys before and after RoPE, in float32 too, units in their order, and the parts of the factors
            copies, staged = 6, blocks.num_blocks(width, config.attention.block_size)
        return of_group + _bytes(config, rows, read, staged, copies, jnp.dtype(dtype).itemsize)

    if size(1, chunk) > limit and not given and not whole_rows:
        tokens = width
        while tokens > _LEAST_CHUNK and (chunk is None or size(1, chunk) > limit):
            tokens = max(_LEAST_CHUNK, -(-tokens // 2))
            chunk = tokens
    least = size(1, chunk)
    if budget is not None and least > budget:
        rule = f"must hold {'a chunk of ' + str(chunk) + ' tokens of ' if chunk else ''}one row, {least} bytes"
        raise bad_value("working_set", rule, budget, _remedy(whole_rows, fresh))
    most = batch
    if size(batch, chunk) > limit:
        most = max(1, bisect.bisect_right(range(1, batch), limit, key=lambda rows: size(rows, chunk)))
    # Where groups do not divide the batch the last one reads rows again: the least work, and the largest groups of it.
    rows = min(range(most // 2 + 1, most + 1), key=lambda rows: (-(-batch // rows) * rows, -rows))
    return Reading(rows, chunk, size(rows, chunk))


def _remedy(whole_rows: bool, fresh: bool) -> str:
    if whole_rows:
        return "Raise it, or shorten the prompts."
    return "Raise it, or lower max_length." if fresh else "Raise it."


def _bytes(config: ModelConfig, rows: int, width: int, staged: int, copies: int, itemsize: int) -> int:
    """What reading so many tokens of so many rows holds: a sum, fitted to programs that XLA compiled for an H100.

    copies: of a staged layer, that of the next one included.
    """
    attention = config.attention
    size, hidden, heads = attention.block_size, config.hidden_size, config.num_heads * config.head_dim
    tokens, kv_heads = rows * width, config.num_kv_heads
    layer = rows * staged * kv_heads * blocks.block_bytes(size, config.head_dim, itemsize)
    inner = min(tokens, MLP_TOKENS) * 3 * config.intermediate_size * itemsize
    scores = min(_SCORES_BYTES, 8 * tokens * kv_heads * staged)
    # The residual stream three times and a half where launches run side by side, queries and outputs of attention;
    # selections and who selected what.
    by_token = itemsize * (7 * hidden // 2 + 2 * heads)
    if attention.is_sparse:
        selected = attention.num_selected_blocks
        by_token += kv_heads * (4 * selected + min(staged, 8 * selected) + staged // 8)
    return tokens * by_token + copies * layer + inner + scores
