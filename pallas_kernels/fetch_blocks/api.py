"""Public functions of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._dispatch import Op
from pallas_kernels.checks import require_shape
from pallas_kernels.fetch_blocks import triton, xla

FETCH_BLOCKS = Op(
    "fetch_blocks", {"xla": xla.fetch_blocks, "triton": triton.fetch_blocks}, {"triton": triton.unsupported}
)
WRITE_BACK_BLOCKS = Op(
    "write_back_blocks",
    {"xla": xla.write_back_blocks, "triton": triton.write_back_blocks},
    {"triton": triton.unsupported},
)


def _check(pool: Array, host: Array, block_ids: Array, slots: Array, lead: tuple[int, ...] = ()) -> None:
    """lead: of ids and slots, before their rows."""
    require_shape("pool", pool, (None,) * 7, "[L, B, K, slots, 2, P, D]")
    layers, batch, kv_heads, _, two, size, dim = pool.shape
    require_shape("host", host, (layers, batch, kv_heads, None, two, size, dim), "[L, B, K, M, 2, P, D]")
    listed = "[L, B, K, X]" if lead else "[B, K, X]"
    require_shape("block_ids", block_ids, (*lead, batch, kv_heads, None), listed)
    require_shape("slots", slots, block_ids.shape, listed)


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
    block_ids: Int32[Array, "L B K X"],
    slots: Int32[Array, "L B K X"],
    *,
    implementation: str = "auto",
) -> Float[Array, "L B K M 2 P D"]:
    """host[l, b, k, block_ids[l, b, k, x]] = pool[l, b, k, slots[l, b, k, x]] for every valid x, of all layers."""
    _check(pool, host, block_ids, slots, (pool.shape[0],))
    with jax.named_scope("write_back_blocks"):
        return WRITE_BACK_BLOCKS(implementation, host, pool, block_ids, slots)
