"""What belongs together among the arguments of `update_and_attend`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class Token(NamedTuple):
    """The new token of each row: its queries and its key, both rotated, and its value."""

    q: Float[Array, "B N D"]
    k: Float[Array, "B K D"]
    v: Float[Array, "B K D"]


class Store(NamedTuple):
    """Keys and values of all layers: K (index 0) and V (index 1) of each block are one contiguous run.

    pool: the blocks that are resident on the device. host: pages of every full block, in `pinned_host` memory; None
    where the pool holds all blocks. page_table: the page of each row's blocks; None without `host`. bias: per token of
    each block, float32, on the device; None where attention has none.
    """

    pool: Float[Array, "L B K slots 2 P D"]
    host: Float[Array, "L pages K 2 P D"] | None
    page_table: Int32[Array, "B M"] | None
    bias: Float[Array, "L B K M P"] | None

    @property
    def num_slots(self) -> int:
        """Blocks that the pool holds per layer, row and KV head."""
        return self.pool.shape[3]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.pool.shape[5]


class Residence(NamedTuple):
    """Which blocks each row and KV head attends to in this step, and where they lie.

    block_ids: distinct and ascending, with -1 padding at the end. slots: block_ids[b, k, j] lies in slot
    slots[b, k, j] of the pool. loads: the block that must first be fetched into slots[b, k, j], -1 where nothing is
    missing; None without a host store.
    """

    block_ids: Int32[Array, "B K J"]
    slots: Int32[Array, "B K J"]
    loads: Int32[Array, "B K J"] | None
