"""Public function of this op; see the package docstring for the contract."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Integer

from pallas_kernels._arguments import as_integers, as_layer
from pallas_kernels._dispatch import register
from pallas_kernels.checks import require_given, require_shape
from pallas_kernels.resolve_slots import triton, xla
from pallas_kernels.resolve_slots.xla import Resolved

RESOLVE_SLOTS = register(
    "resolve_slots", {"xla": xla.resolve_slots, "triton": triton.resolve_slots}, {"triton": triton.unsupported}
)


def resolve_slots(
    blocks: Integer[ArrayLike, "L B K slots"],
    last_used: Integer[ArrayLike, "L B K slots"],
    wanted: Integer[ArrayLike, "B K J"],
    step: Integer[ArrayLike, " B"],
    layer: Integer[ArrayLike, ""],
    *,
    implementation: str = "auto",
) -> Resolved:
    """Finds a slot for every wanted block of one layer, evicting where it must.

    blocks: distinct block ids, one in each slot, -1 where it is empty. last_used: step of its last use, -1 where it is
        empty. wanted: distinct block ids, -1 for padding, whose slots are -1. step: grows from call to call.
    layer: which of the L layers; one out of range is refused, or means nothing where it is traced.

    Returns `Resolved`, whose tables are up to date. Raises ValueError or TypeError for arguments that do not go
    together.
    """
    require_given(blocks=blocks, last_used=last_used, wanted=wanted, step=step, layer=layer)
    blocks, last_used, wanted, step = as_integers(blocks=blocks, last_used=last_used, wanted=wanted, step=step)
    require_shape("blocks", blocks, (None,) * 4, "[L, B, K, slots]")
    _, batch, kv_heads, _ = blocks.shape
    require_shape("last_used", last_used, blocks.shape, "[L, B, K, slots]")
    require_shape("wanted", wanted, (batch, kv_heads, None), "[B, K, J]")
    require_shape("step", step, (batch,), "[B]")
    layer = as_layer(layer, blocks.shape[0])
    with jax.named_scope("resolve_slots"):
        return RESOLVE_SLOTS(implementation, blocks, last_used, wanted, step, layer)
