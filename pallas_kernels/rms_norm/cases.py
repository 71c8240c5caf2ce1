"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels import _inputs


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    width: int
    layers: int = 3
    dtype: str = "float32"


SMALL: dict[str, Case] = {
    "one_row": Case(1, 64),
    "any_width": Case(3, 100),
    "bfloat16": Case(5, 576, dtype="bfloat16"),
}
REAL: dict[str, Case] = {"8b": Case(16, 4096, 32, "bfloat16"), "8b_batch_64": Case(64, 4096, 32, "bfloat16")}
CASES = SMALL | REAL


def options(case: Case) -> dict[str, Any]:
    """Static arguments of `rms_norm`."""
    return {"eps": 1e-5}


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `rms_norm` at the last layer."""
    rng = _inputs.generator(key)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)
    x, weight = normal(case.batch, case.width), normal(case.layers, case.width)
    return {"x": x, "weight": weight, "layer": jnp.int32(case.layers - 1)}
