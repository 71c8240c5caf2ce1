"""Fetch and write-back as plain loops over numpy arrays."""

from __future__ import annotations

import numpy as np


def fetch_blocks_ref(
    pool: np.ndarray, host: np.ndarray, block_ids: np.ndarray, slots: np.ndarray, layer: int
) -> np.ndarray:
    pool = pool.copy()
    for b, k, x in np.ndindex(*block_ids.shape):
        block, slot = block_ids[b, k, x], slots[b, k, x]
        if 0 <= block < host.shape[3] and 0 <= slot < pool.shape[3]:
            pool[layer, b, k, slot] = host[layer, b, k, block]
    return pool


def write_back_blocks_ref(host: np.ndarray, pool: np.ndarray, block_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
    host = host.copy()
    for *at, x in np.ndindex(*block_ids.shape):
        block, slot = block_ids[*at, x], slots[*at, x]
        if 0 <= block < host.shape[3] and 0 <= slot < pool.shape[3]:
            host[*at, block] = pool[*at, slot]
    return host
