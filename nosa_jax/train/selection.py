"""How a model in training selects: reuse, transfers and the size of the bias, from one document."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32, Int32

from nosa_jax import locality, parallel, processes
from nosa_jax.attention.layer import Recorded
from nosa_jax.convert import cast
from nosa_jax.model import hidden_states
from nosa_jax.train.data import Batch
from pallas_kernels.checks import require_int
from pallas_kernels.promotion import usual_promotion


@dataclasses.dataclass(frozen=True)
class SelectionMeasures:
    """How a sparse model selects, in types that JSON has.

    gamma: mean share of blocks that are kept from one token to the next, over layers and KV heads.
    misses: mean blocks that decoding would fetch from the host per step, layer and KV head, by the size of the device
        pool in slots as text: J, 5/4 J, 3/2 J and 2 J.
    bias_by_layer: root mean square of the importance b, which is what attention adds to its logits, over tokens and KV
        heads of each layer; empty for a variant without one.
    """

    gamma: float
    misses: dict[str, float]
    bias_by_layer: list[float]


def measure_selection(
    model: Any, batch: Batch, *, steps: int = 512, compute_dtype: Any = "float32"
) -> SelectionMeasures | None:
    """Runs the longest document of a batch and measures how its last tokens select, as if they were decoded.

    model: what is measured, on one device or on a mesh.
    batch: held-out rows, on the host or on a mesh. Documents are what `segment_ids` says, else whole rows.
    steps: how many of the document's last tokens count as decode steps. Only their selections are kept, so that memory
        stays bounded: 4 bytes for each step, layer, KV head and selected block.
    compute_dtype: of the forward pass.

    What the token before those steps selects, or else the document's first one, is in the pool at the beginning.
    The bias is of all tokens of the document. Returns None for `full`, which selects nothing, and where no document has
    two tokens. Raises TypeError or ValueError for `steps` below 1.
    """
    require_int("steps", steps, 1)
    config = model.config
    document, length = _longest_document(batch)
    if not config.attention.is_sparse or length < 2:
        return None
    kept = min(steps + 1, len(document))
    first = max(length - kept, 0)
    arguments = (document[None], np.array([length], np.int32), np.int32(first))
    block_ids, squares = _selections(model, *arguments, kept=kept, compute_dtype=compute_dtype)
    report = locality.locality_report(
        np.asarray(block_ids)[:, None],
        np.arange(first, first + kept, dtype=np.int32)[None],
        config.attention,
        bytes_per_block=locality.block_bytes(config.attention, config.head_dim),
        windows=(),  # nor the optimum: training waits for this
        belady=False,
    )
    return SelectionMeasures(
        gamma=float(report.gamma.mean()),
        misses={str(slots): float(values.mean()) for slots, values in report.misses.items()},
        bias_by_layer=[] if squares is None else [float(x) for x in np.sqrt(np.asarray(squares))],
    )


def _longest_document(batch: Batch) -> tuple[Int32[np.ndarray, " T"], int]:
    """The tokens of the first of the longest documents, moved to the front of a row, and how many they are.

    A row of the batch's own length, whatever the document's: all evaluations then run one program.
    """
    tokens = _on_host(batch.tokens).astype(np.int32)
    ids = np.zeros_like(tokens) if batch.segment_ids is None else _on_host(batch.segment_ids)
    best = (0, 0, 0)  # length, row, start
    for row, segments in enumerate(ids):
        starts = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
        for start, end in itertools.pairwise([*starts.tolist(), len(segments)]):
            if segments[start] >= 0 and end - start > best[0]:
                best = (end - start, row, start)
    length, row, start = best
    document = np.zeros_like(tokens[row])
    document[:length] = tokens[row, start : start + length]
    return document, length


def _on_host(array: Any) -> np.ndarray:
    """The whole of an array, also where other processes hold parts of it; all of them must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = processes.whole(array)
    return np.asarray(array)


@partial(jax.jit, static_argnames=("kept", "compute_dtype"))
@usual_promotion
def _selections(
    model: Any,
    tokens: Int32[Array, "1 T"],
    lengths: Int32[Array, " 1"],
    first: Int32[Array, ""],
    *,
    kept: int,
    compute_dtype: Any,
) -> tuple[Int32[Array, "L K kept J"], Float32[Array, " L"] | None]:
    """Block ids of `kept` positions from `first` on, and the mean square of the importance of each layer, both on every
    device of a mesh alike."""
    biased = model.config.attention.uses_importance

    def of_layer(layer: Recorded) -> Any:
        ids = parallel.in_row_order(layer.block_ids[0], axis=1)
        ids = parallel.constrain(jax.lax.dynamic_slice_in_dim(ids, first, kept, axis=1))
        if layer.importance is None:
            return ids, None
        inside = jnp.arange(tokens.shape[1]) < lengths
        importance = parallel.in_row_order(layer.importance[0], axis=1)
        return ids, jnp.square(importance).mean(where=jnp.broadcast_to(inside, importance.shape))

    def body(model: Any, tokens: Array, lengths: Array) -> Any:
        found = hidden_states(cast(model, compute_dtype), tokens, lengths, None, record=of_layer)[1]
        return jax.tree.map(parallel.constrain, found)

    out = (PartitionSpec(), PartitionSpec() if biased else None)
    return parallel.run(parallel.mesh_of(model, tokens), body, model, tokens, lengths, out=out)
