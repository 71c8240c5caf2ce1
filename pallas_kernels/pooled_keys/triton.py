"""One more token per row for the running pooled keys, in Pallas-Triton: a decode step's append, in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import _backend


def _kernel(layer, new, start, count, pooled_in, sums_in, pooled, sums, *, stride):
    head, row = (_backend.program_id(axis) for axis in range(2))
    at = (_backend.layer_index(layer, sums), row, head)

    @_backend.when(count[row] > 0)
    def _():
        before, opened = sums_in[(*at, 0)], sums_in[(*at, 1)] + new[row, head, 0].astype(jnp.float32)
        complete = (start[row] + 1) % stride == 0
        window = start[row] // stride - 1

        @_backend.when(complete & (window >= 0) & (window < pooled.shape[3]))
        def _():
            pooled[(*at, jnp.maximum(window, 0))] = ((before + opened) / (2 * stride)).astype(pooled.dtype)

        sums[(*at, 0)] = jnp.where(complete, opened, before)
        sums[(*at, 1)] = jnp.where(complete, 0.0, opened)


def unsupported(
    pooled: Array, sums: Array, new: Array, start: Array, count: Array, layer: Array, *, stride: int
) -> str | None:
    """Why these arguments cannot take the kernel; None where they can."""
    if new.shape[2] != 1:
        return f"it appends one token per row, got {new.shape[2]}"
    if not _backend.is_power_of_two(new.shape[3]):
        return f"the head dim must be a power of two, got {new.shape[3]}"
    if pooled.shape[3] == 0:
        return "there is no window to write"
    return None


def append_pooled_keys(
    pooled: Float[Array, "L B K C D"],
    sums: Float[Array, "L B K 2 D"],
    new: Float[Array, "B K 1 D"],
    start: Int32[Array, " B"],
    count: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    stride: int,
) -> tuple[Float[Array, "L B K C D"], Float[Array, "L B K 2 D"]]:
    batch, kv_heads = new.shape[:2]

    def kernel(*refs: Any) -> None:
        _kernel(*refs, stride=stride)

    return _backend.triton_call(
        kernel,
        name="append_pooled_keys",
        grid=(kv_heads, batch),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pooled, sums)),
        num_warps=1,
        aliases={4: 0, 5: 1},
    )(jnp.atleast_1d(layer), new, start, count, pooled, sums)
