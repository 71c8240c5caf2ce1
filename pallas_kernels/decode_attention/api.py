"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._dispatch import Op
from pallas_kernels.checks import bad_value, require_shape
from pallas_kernels.decode_attention import triton, xla

DECODE_ATTENTION = Op(
    "decode_attention",
    {"xla": xla.decode_attention, "triton": triton.decode_attention},
    {"triton": triton.unsupported},
)

UPDATE_AND_ATTEND = Op(
    "update_and_attend",
    {"xla": xla.update_and_attend, "triton": triton.update_and_attend},
    {"triton": triton.update_unsupported},
)


def decode_attention(
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B N D"]:
    """Attention of one query token per row over the blocks that lie in `slots` of the device pool.

    pool: K (index 0) and V (index 1) of each block. bias: per token of each block, float32, None for none.
    block_ids: ascending, -1 padding; block_ids[b, k, j] lies in slots[b, k, j]. positions: of the queries; later
    tokens are masked. layer: which of the L layers. scale: default 1/sqrt(D). Returns the dtype of q; accumulates in
    float32.
    """
    _check(q, pool, bias, slots, block_ids, positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with jax.named_scope("decode_attention"):
        return DECODE_ATTENTION(implementation, q, pool, bias, slots, block_ids, positions, layer, scale=scale)


def update_and_attend(
    q: Float[Array, "B N D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"] | None,
    bias: Float[Array, "L B K M P"] | None,
    loads: Int32[Array, "B K J"] | None,
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    scale: float | None = None,
    zero_copy: bool = True,
    implementation: str = "auto",
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    """What a decode step does to one layer's pool, and its attention: returns (output, pool).

    Blocks that are missing cross from the host store (slots[b, k, j] gets block loads[b, k, j], -1 for none), k and v
    of the new token go to their place in the slot of its block, and `decode_attention` runs over the pool. The block
    ids of a row and head are distinct. host: in `pinned_host` memory, None (and loads None) without one.
    positions: of the new token, -1 for rows without one. zero_copy: False moves blocks by `device_put` whatever
    implementation attends. The output has the bits of `decode_attention` over the same pool.
    """
    _check(q, pool, bias, slots, block_ids, positions)
    layers, batch, kv_heads, _, two, size, dim = pool.shape
    require_shape("k", k, (batch, kv_heads, dim), "[B, K, D]")
    require_shape("v", v, k.shape, "[B, K, D]")
    if host is not None:
        require_shape("host", host, (layers, batch, kv_heads, None, two, size, dim), "[L, B, K, M, 2, P, D]")
        if loads is None:
            raise bad_value("loads", "must be given with host", loads, "Pass -1 for blocks that are resident.")
        require_shape("loads", loads, block_ids.shape, "[B, K, J]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, pool, host, bias, loads, slots, block_ids, positions, layer)
    with jax.named_scope("update_and_attend"):
        if zero_copy:
            return UPDATE_AND_ATTEND(implementation, *arguments, scale=scale)
        attend = functools.partial(DECODE_ATTENTION, implementation)
        return xla.update_and_attend(*arguments, scale=scale, attend=attend)


def _check(q: Array, pool: Array, bias: Array | None, slots: Array, block_ids: Array, positions: Array) -> None:
    require_shape("q", q, (None,) * 3, "[B, N, D]")
    require_shape("pool", pool, (None,) * 7, "[L, B, K, slots, 2, P, D]")
    batch, heads, dim = q.shape
    layers, _, kv_heads, _, _, size, _ = pool.shape
    require_shape("pool", pool, (layers, batch, kv_heads, None, 2, size, dim), "[L, B, K, slots, 2, P, D]")
    require_shape("block_ids", block_ids, (batch, kv_heads, None), "[B, K, J]")
    require_shape("slots", slots, block_ids.shape, "[B, K, J]")
    require_shape("positions", positions, (batch,), "[B]")
    if heads % kv_heads:
        raise bad_value("q", "must have a multiple of K heads", f"N={heads}, K={kv_heads}", "Check the head axis.")
    if bias is not None:
        require_shape("bias", bias, (layers, batch, kv_heads, None, size), "[L, B, K, M, P]")
