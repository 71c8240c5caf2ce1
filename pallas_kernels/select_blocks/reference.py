"""Block selection, one query at a time in plain Python."""

from __future__ import annotations

import numpy as np


def select_blocks_ref(
    query_scores: np.ndarray | None,
    importance_scores: np.ndarray | None,
    positions: np.ndarray,
    first_block: np.ndarray | None = None,
    *,
    block_size: int,
    num_selected_blocks: int,
    num_sink_blocks: int,
    num_local_blocks: int,
    num_query_blocks: int,
) -> np.ndarray:
    """[B, K, T, J] int32; arguments as in `pallas_kernels.select_blocks`."""
    scores = query_scores if query_scores is not None else importance_scores
    assert scores is not None
    batch, kv_heads = scores.shape[:2]
    ids = np.full((batch, kv_heads, positions.shape[1], num_selected_blocks), -1, np.int32)
    for b, h, t in np.ndindex(*ids.shape[:3]):
        position = int(positions[b, t])
        if position < 0:
            continue
        own = position // block_size
        first = 0 if first_block is None else int(first_block[b, own])
        visible = range(first, own + 1)
        chosen = {m for m in visible if m - first < num_sink_blocks or m > own - num_local_blocks}

        def take(count: int, score: np.ndarray, visible=visible, chosen=chosen) -> None:
            # NaN and -inf count as the lowest float32, inf as the largest.
            score = np.nan_to_num(score.astype(np.float32), nan=-np.inf)
            score = np.clip(score, np.finfo(np.float32).min, np.finfo(np.float32).max)
            rest = sorted((m for m in visible if m not in chosen), key=lambda m: (-score[m], m))
            chosen.update(rest[: max(0, count)])

        if query_scores is not None and importance_scores is not None:
            take(num_query_blocks, query_scores[b, h, t])
        fill = importance_scores[b, h] if importance_scores is not None else query_scores[b, h, t]  # type: ignore[index]
        take(num_selected_blocks - len(chosen), fill)
        ids[b, h, t, : len(chosen)] = sorted(chosen)
    return ids
