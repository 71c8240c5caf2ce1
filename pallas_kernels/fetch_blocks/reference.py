"""Fetch and write-back as plain loops over numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def _moves(
    pool: np.ndarray, host: np.ndarray, page_table: np.ndarray, block_ids: np.ndarray, slots: np.ndarray, layer: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where each block that moves lies in pool and store. block_ids, slots: of one layer."""
    own = layer if len(pool) == len(host) else 0
    for b, head, x in np.ndindex(*block_ids.shape):
        block, slot = int(block_ids[b, head, x]), int(slots[b, head, x])
        if not (0 <= block < page_table.shape[1] and 0 <= slot < pool.shape[3]):
            continue
        page = int(page_table[b, block])
        if page >= 0:
            for k in range(pool.shape[2]) if block_ids.shape[1] == 1 else (head,):
                yield (own, b, k, slot), (layer, page % host.shape[1], k)


def fetch_blocks_ref(
    pool: np.ndarray, host: np.ndarray, page_table: np.ndarray, block_ids: np.ndarray, slots: np.ndarray, layer: int
) -> np.ndarray:
    pool = pool.copy()
    for here, there in _moves(pool, host, page_table, block_ids, slots, layer):
        pool[here] = host[there]
    return pool


def write_back_blocks_ref(
    host: np.ndarray,
    pool: np.ndarray,
    page_table: np.ndarray,
    block_ids: np.ndarray,
    slots: np.ndarray,
    layer: int | None = None,
) -> np.ndarray:
    host = host.copy()
    of_layers = enumerate(zip(block_ids, slots, strict=True)) if layer is None else [(int(layer), (block_ids, slots))]
    for number, lists in of_layers:
        for here, there in _moves(pool, host, page_table, lists[0], lists[1], number):
            host[there] = pool[here]
    return host
