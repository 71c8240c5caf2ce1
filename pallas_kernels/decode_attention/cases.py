"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key

from pallas_kernels import _inputs, blocks
from pallas_kernels.decode_attention.arguments import Residence, Store, Token


@dataclasses.dataclass(frozen=True)
class Case:
    """lengths: tokens of each row, the query's included; 0 is an empty row. slots: of the pool."""

    lengths: tuple[int, ...]
    slots: int
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    layers: int = 2
    block_size: int = 16
    num_selected_blocks: int = 6
    biased: bool = True
    dtype: str = "float32"

    @property
    def num_blocks(self) -> int:
        return blocks.num_blocks(max(self.lengths), self.block_size)


def _released(tokens: int, batch: int, slots: int) -> Case:
    return Case((tokens,) * batch, slots, 2, 16, 128, 2, 64, 64, dtype="bfloat16")


SMALL: dict[str, Case] = {
    "k1_g1": Case((205,), 7, 1, 1, 64),
    "k1_g16": Case((63,), 6, 1, 16, 128),
    "k2_g4_ragged": Case((205, 100, 63, 1, 0), 9, 2, 4, 64),
    "k2_g8_no_bias": Case((100, 205), 8, 2, 8, 128, biased=False),
    "k4_g1": Case((64, 65), 6, 4, 1, 128, layers=1),
    "runs_of_two_and_three": Case((400, 700), 41, 1, 2, 16, 1, num_selected_blocks=40),
    "k4_g16_blocks_of_64": Case((205,), 4, 4, 16, 64, block_size=64, num_selected_blocks=3),
}
REAL: dict[str, Case] = {
    "8b_16k": _released(16384, 1, 96),
    "8b_32k_batch_8": _released(32768, 8, 96),
    "8b_32k_on_device": _released(32768, 8, 512),
}
CASES = SMALL | REAL


def random_selection(case: Case, rng: np.random.Generator) -> Int32[np.ndarray, "B K J"]:
    """Ascending ids, the query's own block among them, -1 at the end."""
    ids = np.full((len(case.lengths), case.kv_heads, case.num_selected_blocks), -1, np.int32)
    for b, head in np.ndindex(*ids.shape[:2]):
        own = (case.lengths[b] - 1) // case.block_size
        if own >= 0:
            others = rng.choice(own, min(own, case.num_selected_blocks - 1), replace=False)
            ids[b, head, : len(others) + 1] = np.sort(np.append(others, own))
    return ids


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `decode_attention` at the last layer: the blocks in random slots, NaN in the free ones."""
    rng = _inputs.generator(key)
    lead = (case.layers, len(case.lengths), case.kv_heads)
    block_ids = random_selection(case, rng)
    pool = _inputs.alike(rng, (*lead, case.slots, 2, case.block_size, case.dim), -2, case.dtype)
    slots = np.full_like(block_ids, -1)
    for cell in np.ndindex(*block_ids.shape[:2]):
        count = (block_ids[cell] >= 0).sum()
        order = rng.permutation(case.slots)
        slots[cell][:count] = order[:count]
        pool[:, *cell, order[count:]] = np.nan
    bias = np.exp(0.5 * _inputs.alike(rng, (*lead, case.num_blocks, case.block_size), -1))
    arguments = {
        "q": _inputs.alike(rng, (lead[1], case.kv_heads * case.group, case.dim), 1, case.dtype),
        "pool": pool,
        "bias": bias if case.biased else None,
        "slots": slots,
        "block_ids": block_ids,
        "positions": np.array(case.lengths, np.int32) - 1,
        "layer": np.array(case.layers - 1, np.int32),
    }
    return jax.tree.map(jnp.asarray, arguments)


def offloaded(inputs: dict[str, Any], key: Key[Array, ""], share: float = 0.05) -> dict[str, Any]:
    """Those of `decode_attention` with a new token and a host store, from which this share of the selected blocks, but
    not the query's own, is missing; `arguments` makes a call of `update_and_attend` of them."""
    rng = _inputs.generator(key)
    pool, ids = inputs["pool"], np.asarray(inputs["block_ids"])
    batch, kv_heads, _ = ids.shape
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), pool.dtype)
    own = np.asarray(inputs["positions"])[:, None, None] // pool.shape[5]
    missing = (rng.random(ids.shape) < share) & (ids != own)
    num_blocks = int(ids.max()) + 1
    store = normal(pool.shape[0], batch * num_blocks, kv_heads, *pool.shape[4:])
    return inputs | {
        "k": normal(batch, kv_heads, pool.shape[6]),
        "v": normal(batch, kv_heads, pool.shape[6]),
        "host": jax.device_put(store, jax.memory.Space.Host),
        "page_table": jnp.asarray(rng.permutation(batch * num_blocks).reshape(batch, -1), jnp.int32),
        "loads": jnp.asarray(np.where(missing, ids, -1)),
    }


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `update_and_attend` from arrays by name."""
    return {
        "token": Token(given["q"], given["k"], given["v"]),
        "store": Store(given["pool"], given["host"], given["page_table"], given["bias"]),
        "residence": Residence(given["block_ids"], given["slots"], given["loads"]),
        "positions": given["positions"],
        "layer": given["layer"],
    }
