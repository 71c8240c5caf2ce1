"""Public functions of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels._dispatch import register
from pallas_kernels.checks import bad_value, require_shape
from pallas_kernels.fetch_blocks import triton, xla

FETCH_BLOCKS = register(
    "fetch_blocks", {"xla": xla.fetch_blocks, "triton": triton.fetch_blocks}, {"triton": triton.unsupported}
)
WRITE_BACK_BLOCKS = register(
    "write_back_blocks",
    {"xla": xla.write_back_blocks, "triton": triton.write_back_blocks},
    {"triton": triton.unsupported},
)


TRANSPORTS = ("auto", "device_put")


def implementation_of(transport: str, implementation: str = "auto") -> str:
    """The implementation that moves blocks.

    transport: "auto" leaves the choice to `implementation`, which by itself takes the kernel that reads and writes
    host memory where that can run. "device_put" is the portable transport, which is what "xla" does. Raises ValueError
    for another transport, and where both are named and disagree.
    """
    if transport not in TRANSPORTS:
        raise bad_value("transport", f"must be one of {TRANSPORTS}", repr(transport), "Pick one.")
    if transport == "auto":
        return implementation
    if implementation not in ("auto", "xla"):
        raise bad_value(
            "implementation",
            "must be 'auto' or 'xla' with transport='device_put'",
            repr(implementation),
            "Name one of the two only.",
        )
    return "xla"


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
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "L B K slots 2 P D"]:
    """pool[layer, b, k, slots[b, k, x]] = host[layer, b, k, block_ids[b, k, x]] for every valid x.

    host: in `pinned_host` memory. An entry with a negative or too large id or slot moves nothing. transport: see
    `implementation_of`.
    """
    _check(pool, host, block_ids, slots)
    with jax.named_scope("fetch_blocks"):
        return FETCH_BLOCKS(implementation_of(transport, implementation), pool, host, block_ids, slots, layer)


def write_back_blocks(
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "L B K X"],
    slots: Int32[Array, "L B K X"],
    *,
    transport: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "L B K M 2 P D"]:
    """host[l, b, k, block_ids[l, b, k, x]] = pool[l, b, k, slots[l, b, k, x]] for every valid x, of all layers.

    host: in `pinned_host` memory, and so is the result. transport: see `implementation_of`.
    """
    _check(pool, host, block_ids, slots, (pool.shape[0],))
    with jax.named_scope("write_back_blocks"):
        return WRITE_BACK_BLOCKS(implementation_of(transport, implementation), host, pool, block_ids, slots)
