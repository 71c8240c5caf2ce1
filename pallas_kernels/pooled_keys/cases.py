"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pallas_kernels import _inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """dim 1 is importance. chunk: tokens per call of `append_pooled_keys`."""

    tokens: int
    batch: int = 2
    kv_heads: int = 2
    dim: int = 64
    stride: int = 16
    chunk: int = 1
    dtype: str = "float32"


SMALL: dict[str, Case] = {
    "one_head": Case(63, batch=1, kv_heads=1),
    "no_window": Case(31),
    "one_window": Case(32, kv_heads=4, dim=128),
    "bfloat16": Case(205, dim=128, dtype="bfloat16", chunk=33),
    "importance": Case(100, kv_heads=4, dim=1, stride=4, chunk=7),
}
REAL: dict[str, Case] = {
    "8b_prefill_32k": Case(32768, batch=1, dim=128, chunk=32768, dtype="bfloat16"),
    "8b_decode_32k": Case(32768, batch=8, dim=128, dtype="bfloat16"),
}
CASES = SMALL | REAL


def make_inputs(case: Case, key: Key[Array, ""]) -> Float[Array, "B K S D"]:
    """Keys, the whole of each row."""
    return jnp.asarray(
        _inputs.alike(_inputs.generator(key), (case.batch, case.kv_heads, case.tokens, case.dim), 2, case.dtype)
    )
