"""The KV cache in host memory, [L, B, K, M, 2, P, D] in `pinned_host`: allocation and moves of whole layers.

Single blocks cross in the op `update_and_attend`; nothing else touches host arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.blocks import slice_start


def allocate(shape: tuple[int, ...], dtype: Any) -> Array:
    """A host array of unspecified content; traced, it needs no device memory."""
    return jax.device_put(jnp.empty(shape, dtype), jax.memory.Space.Host)


def load_layer(host: Float[Array, "L B K M 2 P D"], layer: Int32[Array, ""]) -> Float[Array, "B K M 2 P D"]:
    """One layer of the store, on the device."""
    data = jax.lax.dynamic_slice(host, slice_start(layer, 0, 0, 0, 0, 0, 0), (1, *host.shape[1:]))
    return jax.device_put(data, jax.memory.Space.Device)[0]


def store_layer(
    host: Float[Array, "L B K M 2 P D"], blocks: Float[Array, "B K m 2 P D"], layer: Int32[Array, ""]
) -> Float[Array, "L B K M 2 P D"]:
    """Writes the first m blocks of every row."""
    return jax.lax.dynamic_update_slice(
        host, jax.device_put(blocks[None], jax.memory.Space.Host), slice_start(layer, *(0,) * (host.ndim - 1))
    )


def store_rows(
    host: Float[Array, "L B K M 2 P D"],
    blocks: Float[Array, "B K M 2 P D"],
    first: Int32[Array, " B"],
    count: int,
    layer: Int32[Array, ""],
) -> Float[Array, "L B K M 2 P D"]:
    """Writes `count` blocks of every row, each row from its own `first` (clipped so that they fit)."""
    batch, kv_heads, m = blocks.shape[:3]
    first = jnp.clip(first, 0, m - count)

    def body(row: Array, host: Array) -> Array:
        start = slice_start(row, 0, first[row], 0, 0, 0)
        data = jax.lax.dynamic_slice(blocks, start, (1, kv_heads, count, *blocks.shape[3:]))
        return jax.lax.dynamic_update_slice(
            host, jax.device_put(data[None], jax.memory.Space.Host), slice_start(layer, *start)
        )

    return jax.lax.fori_loop(0, batch, body, host)
