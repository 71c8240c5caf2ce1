"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32, Integer

from pallas_kernels._arguments import as_floats, as_integers
from pallas_kernels._dispatch import register
from pallas_kernels.blocks import MAX_SIZE
from pallas_kernels.checks import bad_value, require_given, require_shape, require_size
from pallas_kernels.select_blocks import triton, xla

SELECT_BLOCKS = register("select_blocks", {"xla": xla.select_blocks, "triton": triton.select_blocks})


def select_blocks(
    query_scores: Float[ArrayLike, "B K T M"] | None,
    importance_scores: Float[ArrayLike, "B K M"] | None,
    positions: Integer[ArrayLike, "B T"],
    first_block: Integer[ArrayLike, "B M"] | None = None,
    *,
    block_size: int,
    num_selected_blocks: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    num_query_blocks: int,
    implementation: str = "auto",
) -> Int32[Array, "B K T J"]:
    """The blocks that each query attends to: sink and local window, then picks (paper section 3.3).

    With both scores `num_query_blocks` are picked by query score and the rest by importance (NOSA); with one of them
    all are picked by it: query scores (InfLLMv2) or importance (DMA).

    query_scores: of each query and block, from `block_scores`; None to pick by importance alone. NaN and -inf count as
        the lowest number, inf as the largest, here and below: forced blocks are selected whatever the scores.
    importance_scores: of each block, the same for every query; None to pick by query score alone.
    positions: in the whole row, also when it packs documents; -1 for padding, whose ids are all -1.
    first_block: for each block the first block of its document; None for one document per row.
    block_size: P, tokens per block.
    num_selected_blocks: J, forced blocks and picks together.
    num_sink_blocks: the first blocks of a document, always selected.
    num_local_blocks: the query's own block and those before it, always selected.
    num_query_blocks: picks by query score where there are both scores.

    Returns ascending ids with -1 padding. Raises ValueError when neither score is given or counts exceed the budget.
    """
    require_given(positions=positions)
    query_scores, importance_scores = as_floats(query_scores=query_scores, importance_scores=importance_scores)
    positions, first_block = as_integers(positions=positions, first_block=first_block)
    block_size = require_size("block_size", block_size, 1)
    num_selected_blocks = require_size("num_selected_blocks", num_selected_blocks, 1, maximum=MAX_SIZE)
    num_sink_blocks = require_size("num_sink_blocks", num_sink_blocks, 0)
    num_local_blocks = require_size("num_local_blocks", num_local_blocks, 0)
    num_query_blocks = require_size("num_query_blocks", num_query_blocks, 0)
    scores = query_scores if query_scores is not None else importance_scores
    if scores is None:
        raise bad_value("query_scores, importance_scores", "one of them must be given", None, "Pass at least one.")
    require_shape("positions", positions, (None, None), "[B, T]")
    batch, length = positions.shape
    if query_scores is not None:
        require_shape("query_scores", query_scores, (batch, None, length, None), "[B, K, T, M]")
    if importance_scores is not None:
        require_shape("importance_scores", importance_scores, (batch, scores.shape[1], scores.shape[-1]), "[B, K, M]")
    if first_block is not None:
        require_shape("first_block", first_block, (batch, scores.shape[-1]), "[B, M]")
    picks = num_query_blocks if query_scores is not None and importance_scores is not None else 0
    if num_sink_blocks + num_local_blocks + picks > num_selected_blocks:
        raise bad_value(
            "num_selected_blocks",
            "must hold sink, local and query blocks",
            f"{num_selected_blocks} < {num_sink_blocks} + {num_local_blocks} + {picks}",
            "Raise it.",
        )
    with jax.named_scope("select_blocks"):
        return SELECT_BLOCKS(implementation,
            query_scores, importance_scores, positions, first_block, block_size=block_size,
            num_selected_blocks=num_selected_blocks, num_sink_blocks=num_sink_blocks,
            num_local_blocks=num_local_blocks, num_query_blocks=num_query_blocks,
        )  # fmt: skip
