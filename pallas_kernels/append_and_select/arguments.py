"""What belongs together among the arguments of `append_and_select`."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.append_token import Summaries


class Projected(NamedTuple):
    """The new token of each row before rotation, and where it stands.

    qkv: of each KV head its G query heads, its key and its value. cos, sin: float32, of the rows' positions.
    """

    qkv: Float[Array, "B K G_plus_2 D"]
    cos: Float[Array, "B half"]
    sin: Float[Array, "B half"]


class Selectable(NamedTuple):
    """What all layers keep to select from.

    summaries: of the tokens so far. scale, delta: float32 weights A [L, K] and delta [L, K, D, K] of the importance
    A * softplus(v delta); None where the summaries have none. table: (blocks, last_used), int32 [L, B, K, slots] each,
    see `resolve_slots`; None where the pool holds all blocks.
    """

    summaries: Summaries
    scale: Float[Array, "L K"] | None
    delta: Float[Array, "L K D heads"] | None
    table: Any


class Sizes(NamedTuple):
    """num_blocks: M, that a row may have. stride: of the pooling windows, in tokens. The rest as in `select_blocks`."""

    num_blocks: int
    block_size: int
    stride: int
    num_selected_blocks: int
    num_sink_blocks: int
    num_local_blocks: int
    num_query_blocks: int
