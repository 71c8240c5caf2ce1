"""The least an op has to do, counted from its inputs, and the rates at which devices do it: its roofline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels import blocks
from pallas_kernels.append_and_select.cases import Case
from pallas_kernels.device import RATES


@dataclasses.dataclass(frozen=True)
class Floor:
    """bytes: through device memory, every input read once and every output written once. link_bytes: between host and
    device memory. flops: operations on operands of `dtype`.
    """

    bytes: int
    flops: int = 0
    dtype: str = "float32"
    link_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates measured on a device, per second. flops: of the matrix units, by dtype of the operands."""

    bytes: float
    link_bytes: float
    flops: Mapping[str, float]


# Matrix products as measured on the device; the float32 peak is the datasheet's.
CEILINGS = {"nvidia_h200": Ceilings(*RATES["NVIDIA H200"], {"bfloat16": 790e12, "float16": 790e12, "float32": 60e12})}


def roofline_seconds(floor: Floor, device: str) -> float | None:
    """The time below which the device cannot do it; None where its rates are not known."""
    ceilings = CEILINGS.get(device)
    if ceilings is None or floor.dtype not in ceilings.flops:
        return None
    return max(
        floor.bytes / ceilings.bytes, floor.link_bytes / ceilings.link_bytes, floor.flops / ceilings.flops[floor.dtype]
    )


def nbytes(*arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def with_backward(flops: int) -> int:
    """Attention's backward pass takes 2.5 times the operations of its forward pass."""
    return flops * 7 // 2


def _first_blocks(positions: Any, first_block: Any, block_size: int) -> np.ndarray:
    """The first block of each query's document [B, T]."""
    if first_block is None:
        return np.zeros_like(positions)
    return np.take_along_axis(first_block, np.maximum(positions, 0) // block_size, 1)


def visible_windows(
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    windows: int,
    *,
    block_size: int,
    stride: int,
) -> int:
    """(query, window) pairs where the query sees the window, over the batch."""
    positions, first_block = jax.device_get((positions, first_block))
    begin = block_size // stride * _first_blocks(positions, first_block, block_size)
    end = np.clip((positions + 1) // stride - 1, 0, windows)
    return int(np.maximum(end - begin, 0).sum(dtype=np.int64))


def selected_tokens(
    block_ids: Int32[Array, "B K T J"] | None,
    positions: Int32[Array, "B T"],
    first_block: Int32[Array, "B M"] | None,
    *,
    kv_heads: int,
    tokens: int,
    block_size: int,
) -> int:
    """(query, KV head, token) triples where the query attends to the token, over the batch."""
    block_ids, positions, first_block = jax.device_get((block_ids, positions, first_block))
    first = _first_blocks(positions, first_block, block_size)
    seen = np.minimum(positions + 1, tokens)
    if block_ids is None:
        return kv_heads * int(np.maximum(seen - block_size * first, 0).sum(dtype=np.int64))
    valid = (block_ids >= first[:, None, :, None]) & (block_ids < blocks.num_blocks(tokens, block_size))
    inside = seen[:, None, :, None] - block_size * np.where(valid, block_ids, 0)
    return int(np.where(valid, np.clip(inside, 0, block_size), 0).sum(dtype=np.int64))


def attention(inputs: dict[str, Any], *, block_size: int, gradient: bool) -> Floor:
    """Counts `block_attention`: two products per selected token and query head; `gradient` adds 2.5 times that."""
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "bias"))
    heads, dim = q.shape[2:]
    kv_heads, tokens = k.shape[1:3]
    selected = selected_tokens(
        inputs["block_ids"], inputs["positions"], inputs["first_block"],
        kv_heads=kv_heads, tokens=tokens, block_size=block_size,
    )  # fmt: skip
    flops = 4 * (heads // kv_heads) * dim * selected
    lse = 4 * q.size // dim
    moved = nbytes(inputs) + nbytes(q) + lse
    if gradient:
        moved += nbytes(q) + nbytes(q, k, v, bias)  # dout, and the gradients
    return Floor(moved, with_backward(flops) if gradient else flops, q.dtype.name)


def dense_attention(inputs: dict[str, Any], *, gradient: bool) -> Floor:
    """Counts causal attention of q [B, T, N, D], the last tokens of k, v [B, K, S, D]."""
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    batch, length, heads, dim = q.shape
    flops = 4 * batch * heads * dim * (length * (length + 1) // 2 + length * (k.shape[2] - length))
    moved = nbytes(q, k, v) + nbytes(q)
    if gradient:
        moved += nbytes(q) + nbytes(q, k, v)
    return Floor(moved, with_backward(flops) if gradient else flops, q.dtype.name)


def decode_attention(inputs: dict[str, Any]) -> Floor:
    """Counts the visible tokens of the selected blocks alone, not the whole pool."""
    q, pool = inputs["q"], inputs["pool"]
    ids, slots, positions = jax.device_get((inputs["block_ids"], inputs["slots"], inputs["positions"]))
    kv_heads, num_slots, size, dim = pool.shape[2], pool.shape[3], pool.shape[5], pool.shape[6]
    valid = (ids >= 0) & (slots >= 0) & (slots < num_slots)
    seen = positions[:, None, None] + 1 - size * np.where(valid, ids, 0)
    tokens = int(np.where(valid, np.clip(seen, 0, size), 0).sum(dtype=np.int64))
    per_token = 2 * dim * pool.dtype.itemsize + (0 if inputs["bias"] is None else inputs["bias"].dtype.itemsize)
    return Floor(
        nbytes(q) + nbytes(q) + nbytes(ids, slots, positions) + tokens * per_token,
        4 * (q.shape[1] // kv_heads) * dim * tokens,
        q.dtype.name,
    )


def append_and_select(case: Case, inputs: dict[str, Any]) -> Floor:
    """Counts the token and its summaries, the selection, and the windows that the token sees."""
    projected, (summaries, _, delta, table) = inputs["projected"], inputs["selectable"]
    pooled = [cache for cache in (summaries.pooled_keys, summaries.pooled_importance) if cache is not None]
    sums = [cache[1][0] for cache in pooled]  # of one layer
    listed = 12 * case.num_selected_blocks * len(case.positions) * case.kv_heads  # ids, slots and loads
    seen = visible_windows(
        inputs["positions"][:, None], None, case.num_blocks * case.block_size // case.stride - 1,
        block_size=case.block_size, stride=case.stride,
    )  # fmt: skip
    # Every visible window's pooled key and importance are read once.
    per_window = case.kv_heads * sum(means.shape[-1] * means.dtype.itemsize for means, _ in pooled)
    tables = [] if table is None else [x[0] for x in table]  # of one layer, read and written
    moved = 2 * nbytes(projected.qkv, sums, tables) + nbytes(projected.cos, projected.sin)
    moved += (0 if delta is None else nbytes(delta[0])) + listed + seen * per_window
    products = 2 * case.kv_heads * case.group * case.dim * seen if case.scored else 0
    return Floor(moved, products, projected.qkv.dtype.name)


def rebuilt_attention(inputs: dict[str, Any]) -> Floor:
    """Counts what is attended to alone; factors of tokens once for every head that selects them."""
    q, factors, chunks, exact = (inputs[name] for name in ("q", "factors", "chunks", "exact"))
    ids, lengths = jax.device_get((chunks.ids, exact.lengths))
    rank, dim, group = factors.tokens.shape[-1], q.shape[-1], q.shape[1] // ids.shape[1]
    selected, kept = int((ids >= 0).sum()) * factors.tokens.shape[3], int(lengths.sum()) * ids.shape[1]
    moved = (selected * (rank + dim) + kept * 2 * dim) * q.dtype.itemsize + 2 * nbytes(q)
    moved += nbytes(factors.heads[0], factors.cos, factors.sin, ids, chunks.slots, lengths)
    return Floor(moved, 2 * dim * (selected * rank + 2 * group * (selected + kept)), q.dtype.name)


def moved_blocks(inputs: dict[str, Any]) -> Floor:
    """Counts `fetch_blocks` and `write_back_blocks`: once through device memory and once over the link."""
    pool, blocks = inputs["pool"], inputs["page_table"].shape[1]
    ids, slots = jax.device_get((inputs["block_ids"], inputs["slots"]))
    valid = (ids >= 0) & (ids < blocks) & (slots >= 0) & (slots < pool.shape[3])
    moved = int(valid.sum()) * int(np.prod(pool.shape[4:])) * pool.dtype.itemsize
    return Floor(moved + nbytes(ids, slots), link_bytes=moved)
