"""How single blocks cross between host store and device pool: one narrow interface over the ops that move them.

transport: "auto" takes the kernels where they run, "device_put" never does.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

import pallas_kernels as ops

_IMPLEMENTATION = {"auto": "auto", "device_put": "xla"}


def fetch_and_attend(
    transport: str,
    q: Float[Array, "B N D"],
    pool: Float[Array, "L B K slots 2 P D"],
    host: Float[Array, "L B K M 2 P D"],
    bias: Float[Array, "L B K M P"] | None,
    loads: Int32[Array, "B K J"],
    slots: Int32[Array, "B K J"],
    block_ids: Int32[Array, "B K J"],
    positions: Int32[Array, " B"],
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B N D"], Float[Array, "L B K slots 2 P D"]]:
    """Copies `loads` (id -1: none) from the host store into the slots and attends over the pool."""
    rest = (slots, block_ids, positions, layer)
    if transport == "auto":
        return ops.fetch_and_attend(q, pool, host, bias, loads, *rest)
    pool = ops.fetch_blocks(pool, host, loads, slots, layer, implementation="xla")
    return ops.decode_attention(q, pool, bias, *rest), pool


def write_back(
    transport: str,
    host: Float[Array, "L B K M 2 P D"],
    pool: Float[Array, "L B K slots 2 P D"],
    block_ids: Int32[Array, "B K X"],
    slots: Int32[Array, "B K X"],
    layer: Int32[Array, ""],
) -> Float[Array, "L B K M 2 P D"]:
    """Copies the blocks (id -1: none) from the slots into the host store."""
    return ops.write_back_blocks(host, pool, block_ids, slots, layer, implementation=_IMPLEMENTATION[transport])
