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
    """empty: slots without a block. moved: wanted blocks that are not resident, per row and head."""

    num_blocks: int
    slots: int
    width: int
    moved: int
    empty: int = 0
    padding: int = 0
    batch: int = 2
    kv_heads: int = 2
    layers: int = 2


SMALL: dict[str, Case] = {
    "all_resident": Case(9, 5, 3, 0),
    "all_move": Case(20, 6, 6, 6, batch=1, kv_heads=1),
    "some_move": Case(40, 11, 7, 3, padding=2),
    "half_empty": Case(40, 12, 8, 4, empty=6, kv_heads=1),
    "one_slot": Case(5, 1, 1, 1),
    "many_slots": Case(90, 37, 37, 20, padding=2, empty=1),
}
REAL: dict[str, Case] = {
    "8b_16k": Case(256, 80, 64, 2, batch=16),
    "8b_96k_batch_64": Case(1536, 128, 64, 4, batch=64),
    "8b_16k_chunks_of_8": Case(2016, 384, 384, 191, batch=16),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `resolve_slots`; many slots were used at the same step."""
    rng = _inputs.generator(key)
    shape = (case.layers, case.batch, case.kv_heads, case.slots)
    blocks, last_used = (np.full(shape, -1, np.int32) for _ in range(2))
    wanted = np.full((case.batch, case.kv_heads, case.width), -1, np.int32)
    held = case.slots - case.empty
    for cell in np.ndindex(*shape[:3]):
        places = rng.permutation(case.slots)[:held]
        ids = rng.permutation(case.num_blocks)
        blocks[cell][places] = ids[:held]
        last_used[cell][places] = rng.integers(0, 4, held)
        count = case.width - case.padding
        kept = rng.permutation(ids[:held])[: count - case.moved]
        wanted[cell[1:]][:count] = np.sort(np.append(kept, ids[held : held + case.moved]))
    arguments = {
        "blocks": blocks,
        "last_used": last_used,
        "wanted": wanted,
        "step": np.arange(7, 7 + case.batch, dtype=np.int32),
        "layer": np.array(case.layers - 1, np.int32),
    }
    return jax.tree.map(jnp.asarray, arguments)
