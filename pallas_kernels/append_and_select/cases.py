"""Named shapes of this op, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pallas_kernels.append_and_select.arguments import Projected, Selectable, Sizes
from pallas_kernels.append_and_select.reference import append_and_select_ref
from pallas_kernels.append_token import cases as append_cases


@dataclasses.dataclass(frozen=True)
class Case:
    """positions: of the token of each row, -1 for none. scored, biased: which summaries there are.

    slots: of the table; 0 for none. resident: which part of a selection has its slots already.
    """

    positions: tuple[int, ...]
    num_blocks: int = 21
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    layers: int = 2
    block_size: int = 16
    stride: int = 4
    num_selected_blocks: int = 9
    num_sink_blocks: int = 1
    num_local_blocks: int = 3
    num_query_blocks: int = 3
    slots: int = 12
    resident: float = 0.5
    scored: bool = True
    biased: bool = True
    dtype: str = "float32"


# Rows without a token, the first and the last token of a block, rows of fewer blocks than a selection has.
SMALL: dict[str, Case] = {
    "nosa": Case((320, -1, 3, 335, 160)),
    "infllmv2": Case((335, 31, 256), biased=False, resident=0.9),
    "dma": Case((300, 0, 207), scored=False, resident=0.1),
    "no_table": Case((335, -1, 32), slots=0),
    "other_stride": Case((1279, 640), 40, 1, 1, 32, block_size=32, stride=8, num_sink_blocks=2),
    "long": Case((4799, 4000), 300, 1, 2, 32, num_selected_blocks=60, slots=140),
    "bfloat16": Case((4479, 2048), 70, 2, 16, 128, 2, 64, 16, 20, slots=24, dtype="bfloat16"),
}
REAL: dict[str, Case] = {
    "8b_16k": Case((16384,) * 16, 257, 2, 16, 128, 2, 64, 16, 64, 1, 17, 15, 80, 0.9, dtype="bfloat16"),
    "8b_64k_batch_64": Case((65535,) * 64, 1025, 2, 16, 128, 2, 64, 16, 64, 1, 17, 15, 80, 0.9, dtype="bfloat16"),
}
CASES = SMALL | REAL


def options(case: Case) -> dict[str, Any]:
    """Static arguments of `append_and_select`."""
    sizes = {name: getattr(case, name) for name in Sizes._fields}
    return {"sizes": Sizes(**sizes)}


def make_inputs(case: Case, key: Key[Array, ""]) -> dict[str, Any]:
    """Array arguments of `append_and_select` at the last layer: summaries of any content, and a table that knows part
    of what will be selected.
    """
    shapes = {field.name: getattr(case, field.name) for field in dataclasses.fields(append_cases.Case)}
    given = append_cases.make_inputs(append_cases.Case(**shapes), key)
    selectable = Selectable(given["summaries"], given["scale"], given["delta"], None)
    inputs = {
        "projected": Projected(given["qkv"], given["cos"], given["sin"]),
        "selectable": selectable,
        "positions": given["positions"],
        "layer": given["layer"],
    }
    if case.slots:
        inputs["selectable"] = selectable._replace(table=_table(case, inputs))
    return inputs


def _table(case: Case, inputs: dict[str, Any]) -> tuple[Array, Array]:
    """Of distinct blocks that the row has had so far, used at positions so far, with some slots left empty."""
    rng = np.random.default_rng(0)
    plain = jax.tree.map(np.asarray, inputs) | {"layer": case.layers - 1}
    wanted = append_and_select_ref(**plain, **options(case))[2].block_ids
    blocks = np.full((case.layers, len(case.positions), case.kv_heads, case.slots), -1, np.int32)
    last_used = blocks.copy()
    for layer, row, head in np.ndindex(*blocks.shape[:3]):
        position = case.positions[row]
        had = -(-max(position, 0) // case.block_size)  # a block that begins with this token is in no slot yet
        ids = wanted[row, head][(wanted[row, head] >= 0) & (wanted[row, head] < had)]
        known = rng.permutation(ids)[: round(case.resident * ids.size)]
        others = rng.permutation(np.setdiff1d(np.arange(had), ids))[: case.slots - known.size]
        held = np.append(known, others)
        at = rng.permutation(case.slots)[: held.size]
        blocks[layer, row, head, at] = held
        # Small numbers, so that some are equal.
        last_used[layer, row, head, at] = rng.integers(0, min(max(position, 1), 8), held.size)
    return jnp.asarray(blocks), jnp.asarray(last_used)
