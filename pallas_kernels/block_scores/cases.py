"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pallas_kernels import _inputs, blocks

Case = _inputs.Rows
SMALL: dict[str, Case] = _inputs.SMALL | {"no_window": _inputs.small(2, 4, 64, (5,), (1,))}
REAL: dict[str, Case] = _inputs.REAL | {
    "8b_decode_32k": dataclasses.replace(_inputs.released(32768, batch=8), queries=1),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `block_scores`."""
    rng = _inputs.generator(key)
    q = _inputs.queries(case, rng)
    windows = blocks.num_windows(case.tokens, case.stride)
    # Neighbouring windows share half of their keys.
    pooled = _inputs.alike(rng, (len(case.rows), case.kv_heads, windows, case.dim), 2, case.dtype)
    positions, first_block = _inputs.layout(case)
    arguments = {"q": q, "pooled_keys": pooled, "positions": positions, "first_block": first_block}
    return jax.tree.map(jnp.asarray, arguments)


def options(case: Case) -> dict[str, int]:
    """Static arguments."""
    return {"num_blocks": case.num_blocks, "block_size": case.block_size, "stride": case.stride}
