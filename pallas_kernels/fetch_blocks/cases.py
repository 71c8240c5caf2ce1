"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels import _inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """moves: blocks that move per row and head; width - moves entries say -1."""

    blocks: int
    slots: int
    width: int
    moves: int
    batch: int = 2
    kv_heads: int = 2
    dim: int = 8
    layers: int = 2
    block_size: int = 4
    dtype: str = "float32"


SMALL: dict[str, Case] = {
    "one_head": Case(5, 3, 4, 2, batch=1, kv_heads=1),
    "nothing": Case(7, 4, 4, 0),
    "all": Case(7, 4, 4, 4, kv_heads=4, dtype="bfloat16"),
}
REAL: dict[str, Case] = {
    "8b_step": Case(512, 96, 64, 2, batch=8, dim=128, block_size=64, dtype="bfloat16"),
    "8b_first_fill": Case(512, 96, 64, 64, batch=8, dim=128, block_size=64, dtype="bfloat16"),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `fetch_blocks`; the store lies in pinned memory, its pages in any order, and no id or slot
    comes twice."""
    rng = _inputs.generator(key)
    lead, tail = (case.layers, case.batch, case.kv_heads), (2, case.block_size, case.dim)
    pages = case.batch * case.blocks
    host = rng.standard_normal((case.layers, pages, case.kv_heads, *tail), np.float32).astype(jnp.dtype(case.dtype))
    pool = rng.standard_normal((*lead, case.slots, *tail), np.float32).astype(jnp.dtype(case.dtype))
    block_ids, slots = (np.full((case.batch, case.kv_heads, case.width), -1, np.int32) for _ in range(2))
    for cell in np.ndindex(case.batch, case.kv_heads):
        where = rng.choice(case.width, case.moves, replace=False)
        block_ids[cell][where] = rng.choice(case.blocks, case.moves, replace=False)
        slots[cell][where] = rng.choice(case.slots, case.moves, replace=False)
    return {
        "host": jax.device_put(host, jax.memory.Space.Host),
        "pool": jnp.asarray(pool),
        "page_table": jnp.asarray(rng.permutation(pages).reshape(case.batch, -1), jnp.int32),
        "block_ids": jnp.asarray(block_ids),
        "slots": jnp.asarray(slots),
        "layer": jnp.asarray(case.layers - 1, jnp.int32),
    }


def of_all_layers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Array arguments of `write_back_blocks`: in layer l every row moves what that l rows before it fetches."""
    layers = range(len(inputs["pool"]))
    stacked = {name: jnp.stack([jnp.roll(inputs[name], n, axis=0) for n in layers]) for name in ("block_ids", "slots")}
    return {name: inputs[name] for name in ("host", "pool", "page_table")} | stacked


def staged(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with a pool of one layer and the lists of the first KV head for all of them."""
    first = {name: inputs[name][:, :1] for name in ("block_ids", "slots")}
    return inputs | first | {"pool": inputs["pool"][:1]}
