"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels import _inputs

Case = _inputs.Rows
SMALL: dict[str, Case] = {
    name: _inputs.SMALL[name] for name in ("k1_g8_packed", "k2_g4_ragged", "k2_g8_chunk", "k4_g4_blocks_of_64")
}
REAL: dict[str, Case] = _inputs.REAL
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `select_blocks`."""
    rng = _inputs.generator(key)
    positions, first_block = _inputs.layout(case)
    lead, width = (len(case.rows), case.kv_heads), case.num_blocks

    def scores(*shape: int) -> np.ndarray:
        # Neighbouring blocks share a window, hence often their score.
        windows = _inputs.alike(rng, (*lead, *shape, width + 1), -1)
        return np.maximum(windows[..., 1:], windows[..., :-1])

    arguments = {
        "query_scores": scores(positions.shape[1]),
        "importance_scores": scores(),
        "positions": positions,
        "first_block": first_block,
    }
    return jax.tree.map(jnp.asarray, arguments)


def options(case: Case) -> dict[str, int]:
    """Static arguments."""
    names = ("block_size", "num_selected_blocks", "num_sink_blocks", "num_local_blocks", "num_query_blocks")
    return {name: getattr(case, name) for name in names}
