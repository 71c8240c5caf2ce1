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
    """rows: shapes and selection. dense: no block ids. biased: with a bias. numbered: with positions, else None."""

    rows: _inputs.Rows
    dense: bool = False
    biased: bool = True
    numbered: bool = True


SMALL: dict[str, Case] = {name: Case(rows, biased=name != "k2_g16_rows") for name, rows in _inputs.SMALL.items()} | {
    "dense_packed": Case(_inputs.SMALL["k2_g1_packed"], dense=True),
    "dense_without_bias": Case(_inputs.SMALL["k2_g4_ragged"], dense=True, biased=False),
    "dense_chunk": Case(_inputs.SMALL["k2_g8_chunk"], dense=True, biased=False),
}
REAL: dict[str, Case] = {name: Case(rows) for name, rows in _inputs.REAL.items()} | {
    "8b_dense_16k": Case(_inputs.released(16384), dense=True, biased=False, numbered=False),
    "8b_dense_16k_numbered": Case(_inputs.released(16384), dense=True, biased=False),
    "8b_dense_512_of_16k": Case(_inputs.released(16384, queries=512), dense=True, biased=False),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `block_attention`."""
    rng = _inputs.generator(key)
    positions, first_block = _inputs.layout(case.rows)
    keys = (len(positions), case.rows.kv_heads, case.rows.tokens, case.rows.dim)
    arguments = {
        "q": _inputs.queries(case.rows, rng),
        "k": _inputs.alike(rng, keys, 2, case.rows.dtype),
        "v": _inputs.alike(rng, keys, 2, case.rows.dtype),
        "bias": np.exp(0.5 * _inputs.alike(rng, keys[:3], 2)) if case.biased else None,
        "block_ids": None if case.dense else _inputs.selection(case.rows, rng, positions, first_block),
        "positions": positions if case.numbered else None,
        "first_block": first_block,
    }
    return jax.tree.map(jnp.asarray, arguments)


def options(case: Case) -> dict[str, int]:
    """Static arguments."""
    return {"block_size": case.rows.block_size}
