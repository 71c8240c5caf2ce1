"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, Integer

from pallas_kernels._arguments import as_integers
from pallas_kernels._dispatch import register
from pallas_kernels.append_and_select import triton, xla
from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes
from pallas_kernels.append_token.api import checked_token
from pallas_kernels.blocks import MAX_SIZE, MAX_STRIDE
from pallas_kernels.checks import bad_value, require_shape, require_size, require_type
from pallas_kernels.decode_attention import Residence, Token

APPEND_AND_SELECT = register(
    "append_and_select",
    {"xla": xla.append_and_select, "triton": triton.append_and_select},
    {"triton": triton.unsupported},
)


def append_and_select(
    projected: Projected,
    selectable: Selectable,
    positions: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    forced_block_ids: Integer[ArrayLike, "L B K J"] | None = None,
    *,
    sizes: Sizes,
    implementation: str = "auto",
) -> tuple[Token, Selectable, Residence, Int32[Array, "B K"]]:
    """What a decode step does to one layer before it attends. Returns the token rotated, what is kept with it, the
    selected blocks with their slots, for `update_and_attend`, and how many of them must be loaded.

    projected: the token of each row. selectable: what all layers keep; that of `layer` changes.
    positions: of the token, which is how many came before it, below num_blocks * block_size; -1 for rows without one,
        which stay as they are and select nothing.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.
    forced_block_ids: of all layers, taken instead of selecting where a row and KV head has any, not -1 alone: distinct
        and ascending, below num_blocks, with -1 at the end.
    sizes: of the selection.

    Needs pooled keys, importance, or both: picks are by query score, by importance, or by both as in `select_blocks`.
    The table must be one that this op and `resolve_slots` made: distinct blocks, last used at positions so far.
    Raises ValueError or TypeError for arguments that do not go together.
    """
    kinds = (("projected", projected, Projected), ("selectable", selectable, Selectable), ("sizes", sizes, Sizes))
    for name, value, kind in kinds:
        require_type(name, value, kind, f"Pass pallas_kernels.{kind.__name__}(...).")
    sizes = _checked_sizes(sizes)
    summaries, scale, delta, table = selectable
    qkv, cos, sin, scale, delta, summaries, positions, layer = checked_token(
        *projected, scale, delta, summaries, positions, layer, ("projected.", "selectable.")
    )
    batch, kv_heads = qkv.shape[:2]
    pooled = [cache for cache in (summaries.pooled_keys, summaries.pooled_importance) if cache is not None]
    if not pooled:
        rule = "must hold pooled keys, importance, or both"
        raise bad_value("selectable.summaries", rule, "neither", "Without a selection use append_token.")
    windows = sizes.num_blocks * (sizes.block_size // sizes.stride) - 1
    for means, _ in pooled:
        if means.shape[3] != windows:
            rule = f"must have the {windows} windows of sizes.num_blocks = {sizes.num_blocks} blocks"
            raise bad_value("selectable.summaries", rule, means.shape[3], "Correct one of them.")
    if summaries.importance is not None:
        of_blocks = (None, None, None, sizes.num_blocks, sizes.block_size)
        require_shape("selectable.summaries.importance", summaries.importance, of_blocks, "[L, B, K, M, P]")
    if len(pooled) == 2 and sizes.num_query_blocks + _forced(sizes) > sizes.num_selected_blocks:
        rule = "must hold sink, local and query blocks"
        raise bad_value("sizes.num_selected_blocks", rule, sizes.num_selected_blocks, "Raise it.")
    table = _checked_table(table, (pooled[0][0].shape[0], batch, kv_heads), sizes)
    (forced_block_ids,) = as_integers(forced_block_ids=forced_block_ids)
    if forced_block_ids is not None:
        expected = (pooled[0][0].shape[0], batch, kv_heads, sizes.num_selected_blocks)
        require_shape("forced_block_ids", forced_block_ids, expected, "[L, B, K, J]")
    projected, selectable = Projected(qkv, cos, sin), Selectable(summaries, scale, delta, table)
    with jax.named_scope("append_and_select"):
        token, kept, residence, count = APPEND_AND_SELECT(
            implementation, projected, selectable, forced_block_ids, positions, layer, sizes=sizes
        )
    return token, selectable._replace(summaries=kept.summaries, table=kept.table), residence, count


def _forced(sizes: Sizes) -> int:
    return sizes.num_sink_blocks + sizes.num_local_blocks


def _checked_sizes(sizes: Sizes) -> Sizes:
    least = {"num_sink_blocks": 0, "num_local_blocks": 0, "num_query_blocks": 0}
    most = {"num_selected_blocks": MAX_SIZE, "stride": MAX_STRIDE}
    sizes = Sizes(
        *(
            require_size(f"sizes.{name}", value, least.get(name, 1), most.get(name, 2**31 - 1))
            for name, value in sizes._asdict().items()
        )
    )
    if sizes.block_size % sizes.stride:
        rule = f"must be a multiple of stride = {sizes.stride}"
        raise bad_value("sizes.block_size", rule, sizes.block_size, "Change one of them.")
    if sizes.num_blocks * sizes.block_size >= 2**31:
        rule = f"must be below 2**31 / block_size = {2**31 // sizes.block_size}, as positions are int32"
        raise bad_value("sizes.num_blocks", rule, sizes.num_blocks, "Pass the blocks of the longest row.")
    if _forced(sizes) > sizes.num_selected_blocks:
        rule = f"must hold the {_forced(sizes)} blocks of sink and window"
        raise bad_value("sizes.num_selected_blocks", rule, sizes.num_selected_blocks, "Raise it.")
    return sizes


def _checked_table(table: Any, lead: tuple[int, ...], sizes: Sizes) -> Any:
    if table is None:
        return None
    if len(table) != 2:
        raise bad_value("selectable.table", "must be (blocks, last_used)", f"{len(table)} arrays", "Pass the pair.")
    held, last_used = table
    held, last_used = as_integers(**{"selectable.table[0]": held, "selectable.table[1]": last_used})
    require_shape("selectable.table[0]", held, (*lead, None), "[L, B, K, slots]")
    require_shape("selectable.table[1]", last_used, held.shape, "[L, B, K, slots]")
    if held.shape[3] < min(sizes.num_selected_blocks, sizes.num_blocks):
        rule = f"must have slots for a selection of {sizes.num_selected_blocks} blocks"
        raise bad_value("selectable.table", rule, held.shape[3], "Pass more slots.")
    return jax.tree.unflatten(jax.tree.structure(table), (held, last_used))
