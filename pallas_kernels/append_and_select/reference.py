"""The references of the ops one after the other."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import blocks
from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes
from pallas_kernels.append_token.reference import append_token_ref
from pallas_kernels.block_scores.reference import block_scores_ref
from pallas_kernels.decode_attention import Residence, Token
from pallas_kernels.resolve_slots.reference import resolve_slots_ref
from pallas_kernels.select_blocks.reference import select_blocks_ref


def append_and_select_ref(
    projected: Projected,
    selectable: Selectable,
    positions: np.ndarray,
    layer: int,
    forced_block_ids: np.ndarray | None = None,
    *,
    sizes: Sizes,
) -> tuple[Token, Selectable, Residence, np.ndarray]:
    """Positions must lie in the M blocks. Scores are of queries and pooled keys rounded to the dtype of `qkv`."""
    summaries, scale, delta, table = selectable
    append: Any = functools.partial(append_token_ref, stride=sizes.stride)  # NumPy's arrays in tuples of JAX's
    q, k, v, summaries = append(*projected, scale, delta, summaries, positions, layer)
    missing: Any
    size, queries = sizes.block_size, positions[:, None]
    scores: Any = None
    fill: Any = None
    if summaries.pooled_keys is not None:
        read = lambda x: jnp.asarray(x.astype(projected.qkv.dtype), jnp.float32)
        score = functools.partial(block_scores_ref, num_blocks=sizes.num_blocks, block_size=size, stride=sizes.stride)
        with jax.default_matmul_precision("highest"):
            scores = score(read(q[:, None]), read(summaries.pooled_keys[0][layer]), jnp.asarray(queries))
    if summaries.pooled_importance is not None:
        means = jnp.asarray(summaries.pooled_importance[0][layer, ..., 0], jnp.float32)
        fill = blocks.pool_windows_to_blocks(means, None, blocks=sizes.num_blocks, ratio=size // sizes.stride)
    picks: dict[str, Any] = {name: count for name, count in sizes._asdict().items() if name.startswith("num_")}
    del picks["num_blocks"]
    scores, fill = (None if x is None else np.asarray(x) for x in (scores, fill))
    ids: Any = select_blocks_ref(scores, fill, queries, block_size=size, **picks)[:, :, 0]
    if forced_block_ids is not None:
        forced = forced_block_ids[layer]
        ids = np.where((positions >= 0)[:, None, None] & (forced >= 0).any(-1, keepdims=True), forced, ids)
    if table is None:
        residence, count = Residence(ids, ids, None), np.zeros(ids.shape[:2], np.int32)
    else:
        held, last_used = table
        slots: Any
        held, last_used, slots, missing, _ = resolve_slots_ref(held, last_used, ids, positions, layer)
        table = held, last_used
        # Nothing of a block that starts with this very token is in the host's memory.
        loads: Any = np.where(missing * size == positions[:, None, None], -1, missing)
        residence, count = Residence(ids, slots, loads), (loads >= 0).sum(-1, dtype=np.int32)
    kept = Selectable(summaries, scale, delta, table)
    return Token(q, k, v), kept, residence, count
