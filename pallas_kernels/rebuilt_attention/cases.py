"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels import _inputs
from pallas_kernels.rebuilt_attention.arguments import Chunks, Exact, Factors


@dataclasses.dataclass(frozen=True)
class Case:
    """chunks: of each row's prompt, 0 for a row that selects nothing. exact: tokens of each row.

    slots: of the pool, at least as many as are selected. room: E.
    """

    chunks: tuple[int, ...]
    exact: tuple[int, ...]
    slots: int
    room: int
    num_selected: int = 6
    chunk: int = 8
    rank: int = 12
    kv_heads: int = 2
    group: int = 4
    dim: int = 32
    layers: int = 2
    dtype: str = "float32"


def _released(tokens: int, batch: int, slots: int) -> Case:
    """ShadowKV as it is set by default, at the shape of the 8B model, with room for 64 generated tokens."""
    chunks = tokens // 8 - 32
    return Case((chunks,) * batch, (1024,) * batch, slots or chunks, 1096, 384, 8, 40, 2, 16, 128, dtype="bfloat16")


SMALL: dict[str, Case] = {
    "ragged": Case((30, 4, 0), (50, 9, 0), 7, 70),
    "k1_g1_long_chunks": Case((9,), (0,), 9, 5, 9, 20, 16, 1, 1, 16, 1),
    "k1_g16_many": Case((60,), (130,), 40, 140, 40, 8, 40, 1, 16, 64, 1, "bfloat16"),
    "k4_g3_single_tokens": Case((50, 20), (3, 1), 33, 3, 33, 1, 5, 4, 3, 16),
}
REAL: dict[str, Case] = {
    "8b_16k_batch_16": _released(16384, 16, 384),
    "8b_16k_batch_16_on_device": _released(16384, 16, 0),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `rebuilt_attention` at the last layer: chunks in random slots, NaN where nothing lies."""
    rng = _inputs.generator(key)
    batch, units = len(case.chunks), max(case.chunks)
    lead = (case.layers, batch, case.kv_heads)
    ids = np.full((*lead[1:], case.num_selected), -1, np.int32)
    slots = np.full_like(ids, -1)
    pool = _inputs.alike(rng, (*lead, case.slots, 1, case.chunk, case.dim), -2, case.dtype)
    tokens = _inputs.alike(rng, (*lead[:2], units, case.chunk, case.rank), -2, case.dtype)
    exact = _inputs.alike(rng, (*lead, 2, case.room, case.dim), -2, case.dtype)
    for b, head in np.ndindex(*lead[1:]):
        count = min(case.chunks[b], case.num_selected)
        ids[b, head, :count] = rng.permutation(case.chunks[b])[:count]
        order = rng.permutation(case.slots)
        slots[b, head, :count] = order[:count]
        pool[:, b, head, order[count:]] = np.nan
        tokens[:, b, case.chunks[b] :] = np.nan
        exact[:, b, head, :, case.exact[b] :] = np.nan
    angles = np.outer(np.arange(units * case.chunk), 10000.0 ** -np.linspace(0, 1, case.dim // 2, endpoint=False))
    heads = _inputs.alike(rng, (*lead, case.rank, case.dim), -2, case.dtype) / np.sqrt(case.rank)
    on_device = lambda *arrays: (jnp.asarray(x) for x in arrays)
    tables = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    return {
        "q": jnp.asarray(_inputs.alike(rng, (batch, case.kv_heads * case.group, case.dim), 1, case.dtype)),
        "factors": Factors(*on_device(tokens, heads.astype(case.dtype), *tables)),
        "chunks": Chunks(*on_device(pool, ids, slots)),
        "exact": Exact(*on_device(exact, np.asarray(case.exact, np.int32))),
        "layer": jnp.int32(case.layers - 1),
    }
