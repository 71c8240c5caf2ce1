"""This process's part of the batches, put where the step wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nosa_jax import parallel
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import Batch, Corpus, Source, check_blocks, check_vocabulary
from nosa_jax.train.flops import count_documents
from pallas_kernels.checks import bad_type, bad_value


class Feed:
    """Batches of a source on the devices of a mesh, each process reading the rows that its own devices hold.

    Without a mesh they stay NumPy arrays, and `jax.jit` moves them.
    """

    def __init__(self, source: Source, config: TrainConfig, mesh: Mesh | None) -> None:
        self._source, self._config = source, config
        shape = (config.batch_size, source.length)
        self._sharding = None
        self._first, rows = 0, config.batch_size
        if mesh is not None:
            _check_shape(config, mesh, shape)
            wanted = PartitionSpec(parallel.ROWS, "context")
            self._sharding = NamedSharding(mesh, parallel.fitting(mesh, shape, wanted))
            self._first, rows = _rows_here(self._sharding, shape)
        self._rows, self._shard = rows, (self._first // rows, config.batch_size // rows)
        self._batches = source.batches(rows, seed=config.seed, shard=self._shard)
        self._documents: Counter[int] = Counter()
        self._places = 0

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch.segment_ids, np.ndarray):
            self._documents += count_documents(batch.segment_ids)
        else:  # each row is one document, or what it is lies on a device, where looking would wait
            self._documents[self._source.length] += self._rows
        self._places += self._rows * self._source.length
        return self._put(batch)

    def take_documents(self) -> tuple[Counter[int], float]:
        """How many documents there were by their tokens since this was last asked, and the share of tokens that were
        not padding, of this process's rows, which stand for those of all others."""
        documents, places = self._documents, self._places
        self._documents, self._places = Counter(), 0
        return documents, sum(size * count for size, count in documents.items()) / max(places, 1)

    def heldout(self, max_batches: int) -> Iterator[Batch]:
        """Batches of what is held out, of the same shape as the others."""
        for batch in self._source.heldout(self._rows, max_batches, self._shard):
            yield self._put(batch)

    def get_state(self) -> dict[str, Any]:
        """The position, the same in all processes."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)

    def _put(self, batch: Batch) -> Batch:
        sharding, first, rows = self._sharding, self._first, self._config.batch_size
        if sharding is None:
            return batch
        placed: Batch = jax.tree.map(lambda array: parallel.from_host(array, sharding, first=first, rows=rows), batch)
        return placed


def as_source(config: TrainConfig, source: Any) -> Source:
    """A source of rows of `config.length` tokens that the model knows."""
    if isinstance(source, Corpus):
        _check_corpus(config, source)
        source = source.source(config.length)
    if not isinstance(source, Source):
        remedy = "Pass train.text(files), for example, or a Corpus."
        raise bad_type("source", "must be a Source", f"{type(source).__name__} {source!r:.60}", remedy)
    if source.length != config.length:
        raise bad_value(
            "TrainConfig.length", f"must be that of the source, {source.length}", config.length, "Change one of them."
        )
    check_vocabulary(source, config.model.vocab_size)
    check_blocks(source, config.model.attention.block_size)
    return source


def _check_corpus(config: TrainConfig, corpus: Corpus) -> None:
    for name in ("train", "heldout"):
        tokens, vocab_size = getattr(corpus, name), config.model.vocab_size
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise bad_value(
                f"corpus.{name}",
                f"must hold token ids below vocab_size = {vocab_size}",
                f"{tokens.min()} .. {tokens.max()}",
                "Use the tokenizer of the model; bytes need 256.",
            )
    if len(corpus.heldout) and len(corpus.heldout) <= config.length:
        raise bad_value(
            "corpus.heldout",
            f"must be empty or fill one window of length + 1 = {config.length + 1}",
            len(corpus.heldout),
            "Hold out more text or shorten the windows.",
        )


def _rows_here(sharding: NamedSharding, shape: tuple[int, int]) -> tuple[int, int]:
    """The first row that this process's devices hold, and how many; all rows where these are in several places."""
    indices: Any = sharding.addressable_devices_indices_map(shape).values()
    slices = [index[0].indices(shape[0])[:2] for index in indices]
    first, stop = min(start for start, _ in slices), max(stop for _, stop in slices)
    held = len({row for start, end in slices for row in range(start, end)})
    if held == stop - first and shape[0] % held == 0 and first % held == 0:
        return first, held
    return 0, shape[0]


def _check_shape(config: TrainConfig, mesh: Mesh, shape: tuple[int, int]) -> None:
    """Raises ValueError where a batch cannot be cut evenly."""
    parts = parallel.size_of(mesh, parallel.ROWS) * config.accumulate
    if shape[0] % parts:
        raise bad_value(
            "TrainConfig.batch_size",
            f"must be a multiple of data x fsdp x accumulate = {parts}",
            shape[0],
            f"Use {max(parts, shape[0] // parts * parts)}, or another mesh.",
        )
    pieces = parallel.PIECES * parallel.size_of(mesh, "context")
    if pieces > parallel.PIECES and shape[1] % pieces:
        raise bad_value(
            "TrainConfig.length",
            f"must be a multiple of {parallel.PIECES} x context = {pieces}, two pieces of each row for every device",
            shape[1],
            f"Use {max(pieces, shape[1] // pieces * pieces)}, or another mesh.",
        )
