"""One program per row, which holds it whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend

_MOST = 16384  # numbers of a row, which are held in registers


def _kernel(layer, x, weight, out, *, eps):
    row, width = _backend.program_id(0), x.shape[1]
    number = _backend.layer_index(layer, weight)
    lane = jnp.arange(_backend.next_power_of_two(width), dtype=jnp.int32)

    def load(ref, at):
        if lane.size == width:
            return ref[at, _backend.ds(0, width)].astype(jnp.float32)
        inside = lane < width
        return _backend.load(ref.at[at, jnp.where(inside, lane, 0)], mask=inside, other=0).astype(jnp.float32)

    wide, factors = load(x, row), load(weight, number)
    normal = wide * jax.lax.rsqrt(jnp.sum(wide * wide) / width + eps) * factors
    _backend.store(out.at[row, lane], normal.astype(out.dtype), mask=lane < width)


def unsupported(x: Array, weight: Array, layer: Array, *, eps: float) -> str | None:
    """Why these arguments cannot take the kernel; None where they can."""
    if not 1 <= x.shape[1] <= _MOST or x.shape[0] == 0 or weight.shape[0] == 0:
        return f"it takes rows of 1 to {_MOST} numbers, got {list(x.shape)} and weights {list(weight.shape)}"
    return None


def rms_norm(
    x: Float[Array, "B H"], weight: Float[Array, "L H"], layer: Int32[Array, ""], *, eps: float
) -> Float[Array, "B H"]:
    def kernel(*refs: Any) -> None:
        _kernel(*refs, eps=eps)

    return _backend.triton_call(
        kernel,
        name="rms_norm",
        grid=(x.shape[0],),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_warps=min(8, max(1, _backend.next_power_of_two(x.shape[1]) // 512)),
    )(jax.lax.reshape(layer, (1,)), x, weight)
