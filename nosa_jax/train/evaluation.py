"""Loss on held-out text, whole and along the rows, and how a model selects there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Integer

from nosa_jax import parallel
from nosa_jax.model import cast
from nosa_jax.train.data import Batch, Source, heldout_batches
from nosa_jax.train.loss import LossParts, bits_per_byte
from nosa_jax.train.selection import measure_selection
from nosa_jax.train.step import token_loss
from pallas_kernels.checks import bad_type, bad_value, require_int
from pallas_kernels.promotion import usual_promotion

POSITION_PARTS = 8
"""Into how many equal parts rows are cut for the loss by position: equal, so that each says as much as the others."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, in types that JSON has: `dataclasses.asdict` makes a record for a log of it.

    loss: mean nats per target.
    bits_per_byte: the same per byte of text.
    tokens: how many targets there were.
    loss_by_position: mean nats of the targets in each of `POSITION_PARTS` equal parts of the rows, by the position
        where the part begins, as text. Parts without targets are left out.
    gamma, misses, bias_by_layer: see `SelectionMeasures`. Unless measured None and empty.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    loss_by_position: dict[str, float] = dataclasses.field(default_factory=dict)
    gamma: float | None = None
    misses: dict[str, float] = dataclasses.field(default_factory=dict)
    bias_by_layer: list[float] = dataclasses.field(default_factory=list)


def evaluate(
    model: Any,
    tokens: Integer[np.ndarray, " S"] | Source | Iterable[Batch],
    *,
    batch_size: int | None = None,
    length: int | None = None,
    max_batches: int = 16,
    bytes_per_token: float | None = None,
    compute_dtype: Any = "float32",
    selection: bool = False,
) -> Evaluation:
    """Next-token loss over held-out text, the same text at every call.

    model: what is evaluated, on one device or on a mesh.
    tokens: of the text, on the host; or a Source, whose held-out rows are read; or batches. Where several processes
        share a mesh every one of them reads all rows, which are small; batches may lie on the mesh.
    batch_size: rows that are computed together; batches have their own.
    length: tokens of a window of the text that are predicted; a Source and batches have their own.
    max_batches: batches that are read, at most.
    bytes_per_token: of the text, on average, for `bits_per_byte`; None takes that of a Source, and 1 elsewhere.
    compute_dtype: of the forward pass.
    selection: whether a document of the first batch is run once more to see how a sparse model selects in it, see
        `measure_selection`.

    Every target that counts weighs the same, whatever its batch. Raises ValueError when the text is shorter than one
    window and where no target counts; TypeError where `batch_size` or `length` is missing.
    """
    if bytes_per_token is None:
        bytes_per_token = tokens.bytes_per_token if isinstance(tokens, Source) else 1.0
    found = evaluate_batches(
        model,
        _batches(tokens, batch_size, length, require_int("max_batches", max_batches, 1)),
        bytes_per_token=bytes_per_token,
        compute_dtype=compute_dtype,
        selection=selection,
    )
    if found is None:
        remedy = "Hold some text out, and look at the masks of its rows."
        raise bad_value("tokens", "must hold held-out targets that count", "none", remedy)
    return found


def evaluate_batches(
    model: Any,
    batches: Iterable[Batch],
    *,
    bytes_per_token: float = 1.0,
    compute_dtype: Any = "float32",
    selection: bool = False,
) -> Evaluation | None:
    """`evaluate` of batches, to the last one; None where there is no target that counts.

    batches: on the host, where every process gives all rows, or on a mesh as a training step takes them.
    The other arguments: see `evaluate`.
    """
    # Fetched after all batches are queued: looking at a number waits for the device.
    parts, first = [], None
    for batch in batches:
        first = batch if first is None else first
        parts.append(_loss_parts(model, batch, compute_dtype=compute_dtype))
    nats = np.sum([np.asarray(part.nats, np.float64) for part in parts], axis=0)
    counts = np.sum([np.asarray(part.counts, np.int64) for part in parts], axis=0)
    if first is None or not counts.any():
        return None
    loss = float(nats.sum() / counts.sum())
    measured = measure_selection(model, first, compute_dtype=compute_dtype) if selection else None
    return Evaluation(
        loss,
        bits_per_byte(loss, bytes_per_token),
        int(counts.sum()),
        _by_position(nats, counts),
        **({} if measured is None else dataclasses.asdict(measured)),
    )


def _batches(tokens: Any, batch_size: int | None, length: int | None, max_batches: int) -> Iterator[Batch]:
    """The held-out batches, at most so many."""
    if isinstance(tokens, np.ndarray):
        size, length = _given("batch_size", batch_size), _given("length", length)
        windows = heldout_batches(tokens, batch_size=size, length=length, max_batches=max_batches)
        return (Batch(window[:, :-1], window[:, 1:]) for window in windows)
    if isinstance(tokens, Source):
        return itertools.islice(tokens.heldout(_given("batch_size", batch_size), max_batches), max_batches)
    return itertools.islice(tokens, max_batches)


def _given(name: str, value: int | None) -> int:
    if value is None:
        raise bad_type(name, "must be given for this kind of text", "None", f"Pass {name}=.")
    return value


@partial(jax.jit, static_argnames="compute_dtype")
@usual_promotion
def _loss_parts(model: Any, batch: Batch, *, compute_dtype: Any) -> LossParts:
    """The sums over a batch, on every device of a mesh alike, so that each process can read them."""

    def body(model: Any, batch: Batch) -> LossParts:
        parts = token_loss(cast(model, compute_dtype), batch)[1]
        return jax.tree.map(parallel.constrain, parts)

    out = LossParts(*(PartitionSpec(),) * 3)
    return parallel.run(parallel.mesh_of(model, batch), body, model, batch, out=out)


def _by_position(nats: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Mean nats by the position where each part of the row begins; parts without targets are left out."""
    starts = np.unique(np.linspace(0, len(nats), POSITION_PARTS, endpoint=False).astype(int))
    sums, sizes = np.add.reduceat(nats, starts), np.add.reduceat(counts, starts)
    return {str(start): float(total / size) for start, total, size in zip(starts, sums, sizes, strict=True) if size}
