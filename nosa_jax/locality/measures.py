"""How local block selections are: reuse from step to step, how far queries look, and what theory guarantees.

Notation of the paper (arXiv 2510.13602): S_t is the set of blocks that one KV head of one layer selects at step t, and
gamma(t) = |S_t & S_(t-1)| / |S_t|. Everywhere below, `block_ids` is int32 [..., T, J]: ascending, no id twice, -1
padding at the end; a step whose ids are all -1 is padding and does not count. `positions` is int32, broadcastable to
[..., T], or one int: the position of the first step, the others following it one by one. Wrong shapes raise ValueError,
wrong dtypes TypeError.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from nosa_jax.config import AttentionConfig
from pallas_kernels.checks import as_integers, bad_value, is_concrete, require_integers, require_type

AnyArray = Array | np.ndarray
BlockIds = Int[AnyArray, "... T J"]
Positions = Int[AnyArray, "..."] | int  # of every step, or of the first one


def checked_ids(block_ids: Any) -> Array:
    """int32 block ids [..., T, J]; outside jit none below -1."""
    ids = as_integers("block_ids", block_ids)
    if ids.ndim < 2:
        raise bad_value("block_ids", "must have shape [..., T, J]", tuple(ids.shape), "Add the missing axes.")
    if ids.size and is_concrete(ids) and int(ids.min()) < -1:
        raise bad_value("block_ids", "must hold ids and -1 for padding", int(ids.min()), "Pass them as recorded.")
    return ids


def checked_positions(positions: Any, steps: tuple[int, ...]) -> Array:
    """Positions as int32 of shape `steps` = [..., T]."""
    positions = np.asarray(positions) if isinstance(positions, int) else positions
    require_integers("positions", positions)
    positions = jnp.asarray(positions, jnp.int32)
    if positions.ndim == 0:
        positions = positions + jnp.arange(steps[-1], dtype=jnp.int32)
    try:
        return jnp.broadcast_to(positions, steps)
    except ValueError:
        remedy = (
            "Give one position per step; positions [B, T] of selections [L, B, K, T, J] go in as positions[:, None]."
        )
        raise bad_value("positions", f"must broadcast to [..., T] = {steps}", positions.shape, remedy) from None


def _require_sparse(attention: AttentionConfig) -> None:
    require_type("attention", attention, AttentionConfig, "Pass model.config.attention.")
    if not attention.is_sparse:
        raise bad_value("attention.variant", "must be sparse", "'full'", "Dense attention reads every block.")


# --- Reuse from step to step ---------------------------------------------------------------------------------------


def is_forced(block_ids: BlockIds, positions: Positions, attention: AttentionConfig) -> Bool[Array, "... T J"]:
    """Marks the sink and local blocks, which are selected whatever their scores; False on padding."""
    ids = checked_ids(block_ids)
    own = checked_positions(positions, ids.shape[:-1])[..., None] // attention.block_size
    forced = (ids < attention.num_sink_blocks) | (ids > own - attention.num_local_blocks)
    return forced & (ids >= 0) & (ids <= own)


def counted_steps(block_ids: BlockIds) -> Bool[Array, "... T"]:
    """True where a step and the one before it both have a selection: what every mean over steps runs over."""
    valid = (checked_ids(block_ids) >= 0).any(-1)
    return jnp.pad(valid[..., 1:] & valid[..., :-1], [(0, 0)] * (valid.ndim - 1) + [(1, 0)])


@jax.jit
def _shared_with_previous(ids: Array, previous_ids: Array) -> Array:
    """|A_t & B_(t-1)| int32 [..., T] for A = `ids`, B = `previous_ids`, both [..., T, J]; 0 at the first step."""
    current, previous = ids[..., 1:, :], previous_ids[..., :-1, :]
    found = ((current[..., :, None] == previous[..., None, :]) & (current >= 0)[..., None]).any(-1)
    return jnp.pad(found.sum(-1, dtype=jnp.int32), [(0, 0)] * (ids.ndim - 2) + [(1, 0)])


def _fraction(shared: Array, size: Array, counted: Array) -> Array:
    return jnp.where(counted & (size > 0), shared.astype(jnp.float32) / jnp.maximum(size, 1), jnp.nan)


def shared_blocks(block_ids: BlockIds) -> Int32[Array, "... T"]:
    """|S_t & S_(t-1)|; 0 at the first step and at padding."""
    ids = checked_ids(block_ids)
    return _shared_with_previous(ids, ids)


def new_blocks(block_ids: BlockIds) -> Int32[Array, "... T"]:
    """|S_t - S_(t-1)|, what must be loaded if exactly S_(t-1) is resident; 0 where `counted_steps` is False."""
    ids = checked_ids(block_ids)
    return jnp.where(counted_steps(ids), (ids >= 0).sum(-1, dtype=jnp.int32) - shared_blocks(ids), 0)


def gamma(block_ids: BlockIds) -> Float32[Array, "... T"]:
    """gamma(t) = |S_t & S_(t-1)| / |S_t|, NaN where `counted_steps` is False."""
    ids = checked_ids(block_ids)
    return _fraction(shared_blocks(ids), (ids >= 0).sum(-1), counted_steps(ids))


def gamma_unforced(
    block_ids: BlockIds, positions: Positions, attention: AttentionConfig, *, both_sides: bool = False
) -> Float32[Array, "... T"]:
    """gamma of the blocks that were chosen, not forced: with E_t = S_t without sink and local blocks,
    |E_t & S_(t-1)| / |E_t|, or |E_t & E_(t-1)| / |E_t| with `both_sides`. NaN also where E_t is empty."""
    ids = checked_ids(block_ids)
    chosen = jnp.where(is_forced(ids, positions, attention), -1, ids)
    shared = _shared_with_previous(chosen, chosen if both_sides else ids)
    return _fraction(shared, (chosen >= 0).sum(-1), counted_steps(ids))


def mean_over_steps(values: Float[AnyArray, "... T"]) -> Float[Array, "..."]:
    """Mean over the steps that count (those not NaN); NaN when there is none."""
    return jnp.nanmean(jnp.asarray(values), axis=-1)


# --- How far a query looks, and how much it reads --------------------------------------------------------------------


def attended_distance(block_ids: BlockIds, positions: Positions, attention: AttentionConfig) -> Int32[Array, "... T J"]:
    """How many blocks each selected one lies before the query's own, which is at 0; -1 at padding."""
    ids = checked_ids(block_ids)
    own = checked_positions(positions, ids.shape[:-1])[..., None] // attention.block_size
    return jnp.where(ids >= 0, own - ids, -1)


def attended_tokens(block_ids: BlockIds, positions: Positions, attention: AttentionConfig) -> Int32[Array, "... T"]:
    """Tokens of the selected blocks up to the query's own: what sparse attention reads where dense attention reads
    position + 1. 0 at padding."""
    ids = checked_ids(block_ids)
    seen = checked_positions(positions, ids.shape[:-1])[..., None] + 1 - ids * attention.block_size
    return jnp.where(ids >= 0, jnp.clip(seen, 0, attention.block_size), 0).sum(-1, dtype=jnp.int32)


# --- What theory guarantees ----------------------------------------------------------------------------------------


def _quotas(own_blocks: Array, attention: AttentionConfig) -> tuple[Array, Array, Array]:
    """Sizes at queries in block `own_blocks`: the selection |S_t|, its part R_t picked by importance, and the rest of
    the unforced ones, which the query scores pick."""
    budget, visible = attention.num_selected_blocks, own_blocks + 1
    forced = jnp.minimum(visible, attention.num_sink_blocks + attention.num_local_blocks)
    by_query = {"nosa": attention.num_query_blocks, "dma": 0, "infllmv2": budget}[attention.variant]
    by_importance = jnp.minimum(visible - forced, jnp.maximum(0, budget - forced - by_query))
    selected = jnp.minimum(budget, visible)
    return selected, by_importance, selected - forced - by_importance


def guaranteed_overlap(positions: Positions, attention: AttentionConfig) -> Int32[Array, "..."]:
    """The least |S_t & S_(t-1)| possible for a query at `positions` >= 1 that follows the one right before it.

    Theorem 2 of the paper (gamma >= k_e / k) in blocks: only what the query scores pick can change, and one block more
    where a new block begins, since the window moves. At the released settings 49 of 64, and 48 where a block begins.
    For `infllmv2` only the forced blocks are guaranteed. Raises ValueError for `full`.
    """
    _require_sparse(attention)
    positions = jnp.asarray(positions, jnp.int32)
    selected, _, by_query = _quotas(positions // attention.block_size, attention)
    return selected - by_query - (positions % attention.block_size == 0)


def meets_guaranteed_overlap(
    block_ids: BlockIds, positions: Positions, attention: AttentionConfig
) -> Bool[Array, "... T"]:
    """|S_t & S_(t-1)| >= `guaranteed_overlap`; True where `counted_steps` is False."""
    ids = checked_ids(block_ids)
    bound = guaranteed_overlap(checked_positions(positions, ids.shape[:-1]), attention)
    return (shared_blocks(ids) >= bound) | ~counted_steps(ids)


def holds_required_blocks(
    block_ids: BlockIds, positions: Positions, importance: Float[AnyArray, "... M"], attention: AttentionConfig
) -> Bool[Array, "... T"]:
    """S_t has min(num_selected_blocks, visible blocks) members, all visible, among them the forced blocks and the R_t
    best unforced visible ones by importance (none for `infllmv2`). True at padding.

    importance: float [..., M], block scores of whole sequences (M blocks, those of every position included), the same
        leading axes as `block_ids`; ties go to the lowest block id.
    """
    _require_sparse(attention)
    ids = checked_ids(block_ids)
    importance = jnp.asarray(importance)
    own = checked_positions(positions, ids.shape[:-1]) // attention.block_size
    size, by_importance, _ = _quotas(own, attention)
    num_blocks = importance.shape[-1]
    selected = jnp.zeros((*ids.shape[:-1], num_blocks + 1), bool)  # the last column takes the padding
    selected = jnp.put_along_axis(selected, jnp.where(ids < 0, num_blocks, ids), True, axis=-1, inplace=False)[..., :-1]

    blocks = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32), selected.shape)
    visible = blocks <= own[..., None]
    forced = is_forced(blocks, own * attention.block_size, attention)
    # Unforced visible blocks, best first, so that R_t are the first ones of each row.
    order = jnp.argsort(-importance, axis=-1, stable=True)[..., None, :]
    ranked = jnp.take_along_axis(visible & ~forced, order, axis=-1)
    picked = ranked & (jnp.cumsum(ranked, axis=-1) <= by_importance[..., None])
    missed = (forced & ~selected).any(-1) | (picked & ~jnp.take_along_axis(selected, order, axis=-1)).any(-1)

    right_size = ((ids >= 0).sum(-1) == size) & ((selected & visible).sum(-1) == size)
    return (right_size & ~missed) | ~(ids >= 0).any(-1)


def unchanged_inside_block(
    block_ids: BlockIds, positions: Positions, attention: AttentionConfig
) -> Bool[Array, "... T"]:
    """S_t = S_(t-1) unless a block begins at t, as `dma` guarantees; True where `counted_steps` is False."""
    ids = checked_ids(block_ids)
    begins = checked_positions(positions, ids.shape[:-1]) % attention.block_size == 0
    same = jnp.pad((ids[..., 1:, :] == ids[..., :-1, :]).all(-1), [(0, 0)] * (ids.ndim - 2) + [(1, 0)])
    return same | begins | ~counted_steps(ids)
