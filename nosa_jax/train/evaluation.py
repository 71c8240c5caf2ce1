"""Loss on held-out text, whole and along the rows, and how a model selects there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Integer

from nosa_jax import parallel
from nosa_jax.convert import cast
from nosa_jax.model import NosaLM
from nosa_jax.train.data import Batch, Corpus, Source, check_vocabulary, heldout_bytes_per_token
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.rows import MixedRows, WindowRows
from nosa_jax.train.data.source import spread
from nosa_jax.train.loss import LossParts, bits_per_byte
from nosa_jax.train.selection import measure_selection
from nosa_jax.train.step import token_loss
from pallas_kernels.checks import bad_type, bad_value, require_int, require_integers, require_number, require_type
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
    tokens: Integer[np.ndarray | Array, " S"]
    | Corpus
    | Source
    | Batch
    | Iterable[Batch | Integer[np.ndarray | Array, "B W"]],
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
    tokens: of the text, an array [S], read in windows, its rest that fills none left out; or a Corpus, whose held-out
        text is; or a Source, whose held-out rows are read; or a Batch, or some of them, or of arrays [B, length + 1].
        Where several processes share a mesh every one of them reads all rows, which are small; batches may lie on the
        mesh.
    batch_size: rows that are computed together; batches have their own.
    length: tokens of a window of the text that are predicted; that of a Source, if given; batches have their own.
    max_batches: batches that are read, at most.
    bytes_per_token: of the text, on average, for `bits_per_byte`; None takes that of what a Source holds out or that of
        a Corpus, and 1 elsewhere.
    compute_dtype: of the forward pass.
    selection: whether a document of the first batch is run once more to see how a sparse model selects in it, see
        `measure_selection`.

    Every target that counts weighs the same, whatever its batch. Raises ValueError when the text is shorter than one
    window or out of the vocabulary, for another `length` than that of a Source, and where no target counts; TypeError
    where `batch_size` or `length` is missing, or given though the batches are, and for tokens of another kind.
    """
    require_type("model", model, NosaLM, "See nosa_jax.from_pretrained and train.load_model.")
    max_batches = require_int("max_batches", max_batches, 1)
    if bytes_per_token is not None:
        bytes_per_token = require_number("bytes_per_token", bytes_per_token, 1e-3)
    elif isinstance(tokens, Source):
        bytes_per_token = heldout_bytes_per_token(tokens)
    else:
        bytes_per_token = tokens.bytes_per_token if isinstance(tokens, Corpus) else 1.0
    found = evaluate_batches(
        model,
        _batches(tokens, batch_size, length, max_batches, model.config.vocab_size),
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


def _batches(
    tokens: Any, batch_size: int | None, length: int | None, max_batches: int, vocab_size: int
) -> Iterable[Batch]:
    """The held-out batches, at most so many."""
    if isinstance(tokens, Source):
        check_vocabulary(tokens, vocab_size)
        if length not in (None, tokens.length):
            rule = f"must be that of the source, {tokens.length}, or None"
            raise bad_value("length", rule, length, "Leave it out, or make the source with that length.")
        return itertools.islice(tokens.heldout(_given("batch_size", batch_size), max_batches), max_batches)
    name = "tokens"
    if isinstance(tokens, Corpus):
        name, tokens = "Corpus.heldout", tokens.heldout
    if isinstance(tokens, np.ndarray | jax.Array):
        size, length = _given("batch_size", batch_size), _given("length", length)
        return spread(_windows(name, np.asarray(tokens), length, vocab_size), size, max_batches)
    for argument, value in (("batch_size", batch_size), ("length", length)):
        if value is not None:
            raise bad_type(argument, "must be None where batches are given, which have theirs", value, "Leave it out.")
    if isinstance(tokens, Batch):
        return [tokens]
    if isinstance(tokens, str | bytes | dict) or not isinstance(tokens, Iterable):
        raise bad_type(name, _KINDS, f"{type(tokens).__name__} {tokens!r:.60}", _REMEDY)
    return (_as_batch(number, each) for number, each in enumerate(itertools.islice(tokens, max_batches)))


_KINDS = "must be token ids, a Corpus, a Source, or batches"
_REMEDY = "Pass text as np.array(ids), or a list of Batch."


def _windows(name: str, tokens: np.ndarray, length: int, vocab_size: int) -> MixedRows:
    """All windows of a text, those of which neighbours share one token, with a mask."""
    length = require_int("length", length, 1)
    require_integers(name, tokens)
    if tokens.ndim != 1:
        remedy = "Pass the ids of one text; rows of length + 1 tokens go in as batches: [tokens]."
        raise bad_value(name, "must have one dimension", tokens.shape, remedy)
    if len(tokens) < length + 1:
        rule = f"must fill one window of length + 1 = {length + 1}"
        raise bad_value(name, rule, f"{len(tokens)} tokens", "Pass more text, or a smaller length.")
    text = Tokens([tokens], names=[name])
    if text.vocab_size > vocab_size:
        rule = f"must hold token ids below vocab_size = {vocab_size}"
        raise bad_value(name, rule, text.vocab_size - 1, "Use the tokenizer of the model; bytes need 256.")
    return MixedRows([WindowRows(text, np.array([[0, len(tokens)]]), length)], mask=True, segment_ids=False)


def _as_batch(number: int, value: Any) -> Batch:
    """A batch as it is, or of windows of inputs and the target after them."""
    if isinstance(value, Batch):
        return value
    is_array = isinstance(value, np.ndarray | jax.Array) and jnp.issubdtype(value.dtype, jnp.integer)
    if not is_array or value.ndim != 2 or value.shape[1] < 2:
        got = f"{value.dtype}{list(value.shape)}" if is_array else f"{type(value).__name__} {value!r:.60}"
        raise bad_type(f"tokens[{number}]", "must be a Batch, or integers [B, length + 1]", got, _REMEDY)
    return Batch(value[:, :-1], value[:, 1:])


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
