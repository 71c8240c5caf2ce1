"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels import _inputs, blocks
from pallas_kernels.append_token.summaries import Summaries


@dataclasses.dataclass(frozen=True)
class Case:
    """positions: of the token of each row, -1 for none. scored, biased: which summaries there are."""

    positions: tuple[int, ...]
    num_blocks: int = 9
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    layers: int = 2
    block_size: int = 16
    stride: int = 4
    scored: bool = True
    biased: bool = True
    dtype: str = "float32"


SMALL: dict[str, Case] = {
    "nosa": Case((0, 3, 7, 100, -1, 143)),
    "infllmv2": Case((7, 62), kv_heads=1, group=16, dim=128, biased=False),
    "dma": Case((7, -1, 63), kv_heads=3, group=3, scored=False),
    "full": Case((5,), scored=False, biased=False),
    "bfloat16": Case((7, 11, 50), kv_heads=4, group=1, dim=16, dtype="bfloat16"),
}
REAL: dict[str, Case] = {
    "8b_16k": Case((16383,) * 16, 256, 2, 16, 128, 2, 64, 16, dtype="bfloat16"),
    "8b_16k_batch_64": Case((16383,) * 64, 256, 2, 16, 128, 2, 64, 16, dtype="bfloat16"),
}
CASES = SMALL | REAL


def options(case: Case) -> dict[str, Any]:
    """Static arguments of `append_token`."""
    return {"stride": case.stride}


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `append_token` at the last layer: summaries of any content."""
    rng = _inputs.generator(key)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    batch, width = len(case.positions), case.kv_heads * case.dim
    lead = (case.layers, batch, case.kv_heads)
    windows = blocks.num_windows(case.num_blocks * case.block_size, case.stride)
    pooled = lambda dim, dtype: (normal(*lead, windows, dim).astype(dtype), normal(*lead, 2, dim))
    angles = normal(batch, case.dim // 2)
    return {
        "qkv": normal(batch, case.kv_heads, case.group + 2, case.dim).astype(case.dtype),
        "cos": jnp.cos(angles),
        "sin": jnp.sin(angles),
        "scale": normal(case.layers, case.kv_heads) if case.biased else None,
        "delta": normal(case.layers, case.kv_heads, case.dim, case.kv_heads) / width**0.5 if case.biased else None,
        "summaries": Summaries(
            pooled(case.dim, case.dtype) if case.scored else None,
            normal(*lead, case.num_blocks, case.block_size) if case.biased else None,
            pooled(1, jnp.float32) if case.biased else None,
        ),
        "positions": jnp.asarray(case.positions, jnp.int32),
        "layer": jnp.int32(case.layers - 1),
    }
