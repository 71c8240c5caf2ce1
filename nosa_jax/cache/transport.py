"""How single blocks cross between host store and device pool: one narrow interface over the `fetch_blocks` ops."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import fetch_blocks, write_back_blocks

_IMPLEMENTATION = {"auto": "auto", "device_put": "xla"}


def fetch(
    transport: str,
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K slots 2 P D"]:
    """Copies the blocks (id -1: none) from the host store into the slots."""
    return fetch_blocks(pool, host, block_ids, slots, layer, implementation=_IMPLEMENTATION[transport])


def write_back(
    transport: str,
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K M 2 P D"]:
    """Copies the blocks (id -1: none) from the slots into the host store."""
    return write_back_blocks(host, pool, block_ids, slots, layer, implementation=_IMPLEMENTATION[transport])
