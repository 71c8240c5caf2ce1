"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._checks import bad_value, require_shape
from pallas_kernels._dispatch import Op
from pallas_kernels.append_token import triton, xla
from pallas_kernels.append_token.summaries import Summaries

APPEND_TOKEN = Op(
    "append_token", {"xla": xla.append_token, "triton": triton.append_token}, {"triton": triton.unsupported}
)


def append_token(
    qkv: Float[Array, "B heads D"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    scale: Float[Array, "L K"] | None,
    delta: Float[Array, "L KD K"] | None,
    summaries: Summaries,
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    kv_heads: int,
    stride: int,
    implementation: str = "auto",
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"], Float[Array, "B K D"], Summaries]:
    """Returns the token's queries and key, rotated, its value, and the summaries with it.

    qkv: N query heads, then K key and K value heads, before rotation. cos, sin: float32 of the rows' positions. scale,
    delta: float32 weights of the importance A * softplus(v delta), None for none. positions: of the token, which is how
    many came before it; -1 for rows without one.
    """
    require_shape("qkv", qkv, (None,) * 3, "[B, N + 2 K, D]")
    batch, heads, dim = qkv.shape
    if heads <= 2 * kv_heads or heads % kv_heads:
        raise bad_value(
            "qkv", f"must have N + 2 K heads, N a multiple of K = {kv_heads}", heads, "Check the head axis."
        )
    require_shape("cos", cos, (batch, dim // 2), "[B, D / 2]")
    require_shape("sin", sin, cos.shape, "[B, D / 2]")
    require_shape("positions", positions, (batch,), "[B]")
    with jax.named_scope("append_token"):
        return APPEND_TOKEN(
            implementation, qkv, cos, sin, scale, delta, summaries, positions, layer, kv_heads=kv_heads, stride=stride
        )
