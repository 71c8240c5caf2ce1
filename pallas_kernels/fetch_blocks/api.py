"""Public functions of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._checks import require_shape
from pallas_kernels._dispatch import Op
from pallas_kernels.fetch_blocks import triton, xla

FETCH_BLOCKS = Op(
    "fetch_blocks", {"xla": xla.fetch_blocks, "triton": triton.fetch_blocks}, {"triton": triton.unsupported}
)
WRITE_BACK_BLOCKS = Op(
    "write_back_blocks",
    {"xla": xla.write_back_blocks, "triton": triton.write_back_blocks},
    {"triton": triton.unsupported},
)


def _check(pool: Array, host: Array, block_ids: Array, slots: Array) -> None:
    require_shape("pool", pool, (None,) * 7, "[L, B, K, slots, 2, P, D]")
    layers, batch, kv_heads, _, two, size, dim = pool.shape
    require_shape("host", host, (layers, batch, kv_heads, None, two, size, dim), "[L, B, K, M, 2, P, D]")
    require_shape("block_ids", block_ids, (batch, kv_heads, None), "[B, K, X]")
    require_shape("slots", slots, block_ids.shape, "[B, K, X]")


def fetch_blocks(
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
    *,
    implementation: str = "auto",
) -> Float[Array, "L B K slots 2 P D"]:
    """pool[layer, b, k, slots[b, k, x]] = host[layer, b, k, block_ids[b, k, x]] for every valid x.

    host: in `pinned_host` memory. An entry with a negative or too large id or slot moves nothing.
    """
    _check(pool, host, block_ids, slots)
    with jax.named_scope("fetch_blocks"):
        return FETCH_BLOCKS(implementation, pool, host, block_ids, slots, layer)


def write_back_blocks(
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
    *,
    implementation: str = "auto",
) -> Float[Array, "L B K M 2 P D"]:
    """host[layer, b, k, block_ids[b, k, x]] = pool[layer, b, k, slots[b, k, x]] for every valid x."""
    _check(pool, host, block_ids, slots)
    with jax.named_scope("write_back_blocks"):
        return WRITE_BACK_BLOCKS(implementation, host, pool, block_ids, slots, layer)
