"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Int32

from pallas_kernels._dispatch import register
from pallas_kernels.checks import require_shape
from pallas_kernels.resolve_slots import triton, xla

RESOLVE_SLOTS = register(
    "resolve_slots", {"xla": xla.resolve_slots, "triton": triton.resolve_slots}, {"triton": triton.unsupported}
)


def resolve_slots(
    blocks: Int32[Array, "L B K slots"],
    last_used: Int32[Array, "L B K slots"],
    wanted: Int32[Array, "B K J"],
    step: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    implementation: str = "auto",
) -> tuple[Int32[Array, "L B K slots"], Int32[Array, "L B K slots"], Int32[Array, "B K J"], Bool[Array, "B K J"]]:
    """Finds a slot for every wanted block of one layer, evicting where it must.

    blocks: block id in each slot, -1 where it is empty. last_used: step of its last use, -1 where it is empty.
    wanted: distinct block ids, -1 for padding, whose slots are -1. step: grows from call to call. layer: which of the L
    layers. Returns (blocks, last_used, slot of each wanted block, whether it was missing), the tables up to date.
    """
    _, batch, kv_heads, _ = blocks.shape
    require_shape("last_used", last_used, blocks.shape, "[L, B, K, slots]")
    require_shape("wanted", wanted, (batch, kv_heads, None), "[B, K, J]")
    require_shape("step", step, (batch,), "[B]")
    with jax.named_scope("resolve_slots"):
        return RESOLVE_SLOTS(implementation, blocks, last_used, wanted, step, layer)
