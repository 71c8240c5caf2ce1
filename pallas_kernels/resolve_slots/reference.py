"""The slot table as a Python loop over numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.resolve_slots.xla import Resolved


def resolve_slots_ref(
    blocks: np.ndarray, last_used: np.ndarray, wanted: np.ndarray, step: np.ndarray, layer: int
) -> Resolved:
    blocks, last_used = blocks.copy(), last_used.copy()
    slots, missing = np.full(wanted.shape, -1, np.int32), np.zeros(wanted.shape, bool)
    for b, k in np.ndindex(*wanted.shape[:2]):
        table, used = blocks[layer, b, k], last_used[layer, b, k]
        asked = [block for block in wanted[b, k] if block >= 0]
        free = [slot for slot in range(table.size) if table[slot] not in asked or table[slot] < 0]
        leaving = iter(sorted(free, key=lambda slot: (used[slot], table[slot], slot)))
        for j, block in enumerate(wanted[b, k]):
            if block < 0:
                continue
            where = np.flatnonzero(table == block)
            missing[b, k, j] = where.size == 0
            slots[b, k, j] = where[0] if where.size else next(leaving)
        taken = wanted[b, k] >= 0
        table[slots[b, k, taken]], used[slots[b, k, taken]] = wanted[b, k, taken], step[b]
    found: Any = (blocks, last_used, slots, np.where(missing, wanted, -1), missing.sum(-1, dtype=np.int32))
    return Resolved(*found)
