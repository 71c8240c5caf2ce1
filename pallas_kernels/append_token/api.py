"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._dispatch import register
from pallas_kernels.append_token import triton, xla
from pallas_kernels.append_token.summaries import Summaries
from pallas_kernels.checks import bad_value, require_positive, require_shape

APPEND_TOKEN = register(
    "append_token", {"xla": xla.append_token, "triton": triton.append_token}, {"triton": triton.unsupported}
)


def append_token(
    qkv: Float[Array, "B K G_plus_2 D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    scale: Float[Array, "L K"] | None,
    delta: Float[Array, "L K D heads"] | None,
    summaries: Summaries,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
    implementation: str = "auto",
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    """Returns the token's queries and key, rotated, its value, and the summaries with it.

    qkv: of each KV head its G query heads, its key and its value, before rotation; what comes back has its dtype.
    cos, sin: float32, of the rows' positions.
    scale, delta: float32 weights A [L, K] and delta [L, K, D, K] of the importance A * softplus(v delta); None where
        the summaries have none.
    summaries: of all layers.
    positions: of the token, which is how many came before it; -1 for rows without one.
    layer: which of the L layers.
    stride: of the pooling windows, in tokens.

    Raises ValueError for shapes that do not go together.
    """
    require_positive("stride", stride)
    require_shape("qkv", qkv, (None,) * 4, "[B, K, G + 2, D]")
    batch, kv_heads, members, dim = qkv.shape
    if members < 3:
        rule = "must hold at least one query head, the key and the value of each KV head"
        raise bad_value("qkv", rule, f"{members} of each", "Check its third axis.")
    require_shape("cos", cos, (batch, dim // 2), "[B, D / 2]")
    require_shape("sin", sin, cos.shape, "[B, D / 2]")
    require_shape("positions", positions, (batch,), "[B]")
    _check_summaries(scale, delta, summaries, batch, kv_heads, dim)
    with jax.named_scope("append_token"):
        return APPEND_TOKEN(implementation, qkv, cos, sin, scale, delta, summaries, positions, layer, stride=stride)


def _check_summaries(
    scale: Array | None, delta: Array | None, summaries: Summaries, batch: int, kv_heads: int, dim: int
) -> None:
    """Of one number of layers, batch and heads, and all parts of the importance or none."""
    keys, importance, pooled = summaries
    parts = {"scale": scale, "delta": delta, "summaries.importance": importance, "summaries.pooled_importance": pooled}
    missing = [name for name, x in parts.items() if x is None]
    if 0 < len(missing) < len(parts):
        raise bad_value(missing[0], f"must be given with {', '.join(parts)}, or none of them", None, "Pass all four.")
    leaves = jax.tree.leaves(summaries)
    lead = (leaves[0].shape[0] if leaves else None, batch, kv_heads)
    for name, cache, width in (("pooled_keys", keys, dim), ("pooled_importance", pooled, 1)):
        if cache is not None:
            means, sums = cache
            require_shape(f"summaries.{name}[0]", means, (*lead, None, width), "[L, B, K, C, D]")
            require_shape(f"summaries.{name}[1]", sums, (*lead, 2, width), "[L, B, K, 2, D]")
    if importance is not None:
        require_shape("summaries.importance", importance, (*lead, None, None), "[L, B, K, M, P]")
        require_shape("scale", scale, (lead[0], kv_heads), "[L, K]")
        require_shape("delta", delta, (lead[0], kv_heads, dim, kv_heads), "[L, K, D, K]")
