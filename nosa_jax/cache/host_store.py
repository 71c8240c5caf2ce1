"""The KV cache in host memory, pages [L, pages, K, 2, P, D] in `pinned_host`, and how much of a row crosses at once.

Every row has a page for each block up to its limit, the same in all layers; `DecodeState.page_table` says which.
Blocks cross in the ops `fetch_blocks`, `write_back_blocks` and `update_and_attend`; nothing else touches host arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def allocate(shape: tuple[int, ...], dtype: Any) -> Array:
    """A host array of unspecified content; traced, it needs no device memory."""
    return jax.device_put(jnp.empty(shape, dtype), jax.memory.Space.Host)


def blocks_between(first: Int32[Array, " B"], end: Int32[Array, " B"], width: int) -> Int32[Array, "B 1 width"]:
    """Lists of the blocks first[b] <= block < end[b] of every row, the same for all KV heads, with -1 after them.

    width: the most that any row has.
    """
    listed = first[:, None] + jnp.arange(width, dtype=jnp.int32)
    return jnp.where(listed < end[:, None], listed, -1)[:, None]
