"""Sources: endless batches of rows in a seeded order, and batches of what is held out."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from nosa_jax.train.data.batch import Batch, Batches, Row, stack
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.rows import PackedRows, Rows, WindowRows, read_here, shuffled
from nosa_jax.train.data.split import split_spans
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int, require_number, require_size


class RowSource:
    """A Source made of rows that can be read in any order.

    length, bytes_per_token, vocab_size: as in `Source`.
    train_tokens, heldout_tokens: how many tokens there are of each.
    heldout_targets: how many of those held out are learned, all but the questions of conversations.
    heldout_bytes_per_token: as `bytes_per_token`, of what is held out.
    block_size: packed documents start on its multiples; None where rows are not packed.
    """

    length: int
    bytes_per_token: float
    vocab_size: int
    train_tokens: int
    heldout_tokens: int
    heldout_targets: int
    block_size: int | None = None

    @property
    def heldout_bytes_per_token(self) -> float:
        return self.bytes_per_token

    def fingerprint(self) -> str:
        """Short text that changes when what would be read changes; a checkpoint keeps it, so that resume can tell."""
        raise NotImplementedError

    def train_rows(self, seed: int) -> Any:
        """An endless grain MapDataset of Row, each epoch in another order."""
        raise NotImplementedError

    def heldout_rows(self) -> Sequence[Row]:
        """The rows held out, each with a mask."""
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> Batches:
        """An endless iterator of Batch of NumPy arrays: all rows in an order of `seed`, in another one every epoch.

        batch_size: rows that this process gets at once.
        seed: of the order, below 2**32.
        shard: (index, count), this process among all that read. Global batch i has `batch_size * count` rows, of which
            this process gets those from `batch_size * index` on: 1, 2 or 4 processes see the same global batches.

        `get_state()` returns a small JSON-able dict and `set_state()` takes it back: the next batch is then exactly the
        one that would have come. It counts global batches, so it holds for any number of processes with the same rows
        in all. Build the iterator with the same source and seed.

        Raises TypeError or ValueError for arguments out of range, ImportError without the `train` extra.
        """
        batch_size = require_int("batch_size", batch_size, 1)
        seed = require_size("seed", seed, 0, 2**32 - 1)
        index, count = _shard(shard)
        rows = self.train_rows(seed).batch(batch_size, drop_remainder=True, batch_fn=stack)
        return Batches(read_here(rows[index::count]))

    def heldout(
        self, batch_size: int, max_batches: int | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Batches of what is held out, the same at every call; none where nothing is.

        batch_size: rows of each, for this process.
        max_batches: where there are more, as many are given, of rows spread evenly over all.
        shard: (index, count) as in `batches`.

        All have one shape and a mask: the last ones are filled up with rows that have no target.
        """
        return spread(self.heldout_rows(), batch_size, max_batches, shard)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How documents become rows and which are held out: the arguments that all sources of documents have.

    length: T, target tokens of a row.
    pack: documents packed into rows; False for windows of all text.
    block_size: packed documents start on its multiples.
    heldout_fraction, heldout_seed: the share of tokens that is held out, and what draws it.

    Raises TypeError or ValueError when a field is out of range, or when rows to pack are not whole blocks.
    """

    length: int
    pack: bool = False
    block_size: int = 1
    heldout_fraction: float = 0.0
    heldout_seed: int = 0

    def __post_init__(self) -> None:
        length, block_size = require_int("length", self.length, 1), require_int("block_size", self.block_size, 1)
        if require_bool("pack", self.pack) and length % block_size:
            remedy = f"Use {max(length // block_size, 1) * block_size}, or pack=False."
            raise bad_value("length", f"must be a multiple of block_size = {block_size} to pack", length, remedy)
        require_number("heldout_fraction", self.heldout_fraction, 0.0, 0.9)
        require_int("heldout_seed", self.heldout_seed, 0)

    def source(
        self, tokens: Tokens, spans: Int64[np.ndarray, "N 2"], *, bytes_per_token: float, vocab_size: int
    ) -> DocumentSource:
        """The source of the documents at `spans`, some of them held out; errors as of DocumentSource."""
        train, heldout = split_spans(spans, self.heldout_fraction, self.heldout_seed)
        return DocumentSource(
            tokens, train, heldout, self, bytes_per_token=bytes_per_token, vocab_size=vocab_size, argument="files"
        )


class DocumentSource(RowSource):
    """A source of documents that are cut into windows or packed into rows. `train.text` and the like make them."""

    def __init__(
        self,
        tokens: Tokens,
        train: Int64[np.ndarray, "N 2"],
        heldout: Int64[np.ndarray, "H 2"],
        cut: Cut,
        *,
        bytes_per_token: float,
        vocab_size: int,
        argument: str,
        fingerprint: str | None = None,
    ) -> None:
        """tokens: of all documents.
        train, heldout: start and stop of each document to train on, and of each that is held out.
        cut: how they become rows.
        bytes_per_token, vocab_size: as in `Source`.
        argument: what holds the documents, for messages.
        fingerprint: instead of one of all that is said here.

        Raises ValueError where there is not one row to train on.
        """
        self.length, self.bytes_per_token, self.vocab_size = cut.length, bytes_per_token, vocab_size
        self.train_tokens, self.heldout_tokens = (int((spans[:, 1] - spans[:, 0]).sum()) for spans in (train, heldout))
        self.heldout_targets = self.heldout_tokens
        if tokens.masked:
            self.heldout_targets = sum(int(tokens.read_learned(*span).sum()) for span in heldout.tolist())
        if cut.pack:
            self.block_size = cut.block_size
            self._train: Rows = PackedRows(tokens, train, cut.length, cut.block_size)
            self._heldout: Rows = PackedRows(tokens, heldout, cut.length, cut.block_size)
            rule, how = "must hold text to train on", f"packed-{cut.length}-{cut.block_size}"
        else:
            self._train = WindowRows(tokens, train, cut.length)
            self._heldout = WindowRows(tokens, heldout, cut.length, partial=True)
            rule, how = f"must fill one window of length + 1 = {cut.length + 1} tokens", f"windows-{cut.length}"
        if not len(self._train):
            remedy = "Add text, hold out less or shorten the rows."
            raise bad_value(argument, rule, f"{self.train_tokens} tokens", remedy)
        checksum = tokens.checksum
        for spans in (train, heldout):
            checksum = zlib.crc32(np.ascontiguousarray(spans), checksum)
        self._fingerprint = fingerprint or f"{self.train_tokens}/{self.heldout_tokens}/{how}/{checksum:08x}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def train_rows(self, seed: int) -> Any:
        return shuffled(self._train, seed)

    def heldout_rows(self) -> Rows:
        return self._heldout


def spread(
    rows: Sequence[Row], batch_size: int, max_batches: int | None = None, shard: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Batches of rows that have a mask, all rows or some spread evenly over them; see `RowSource.heldout`."""
    batch_size = require_int("batch_size", batch_size, 1)
    most = None if max_batches is None else require_int("max_batches", max_batches, 1)
    index, count = _shard(shard)
    number = -(-len(rows) // (batch_size * count))
    number = number if most is None else min(most, number)
    chosen = np.full((number, count, batch_size), -1)
    used = min(len(rows), chosen.size)
    chosen.ravel()[:used] = np.linspace(0, len(rows) - 1, used).round()
    return (_batch(rows, numbers) for numbers in chosen[:, index].tolist())


def _batch(rows: Sequence[Row], numbers: Sequence[int]) -> Batch:
    """The rows of these numbers; -1 is a row without any target."""
    return stack([rows[number] if number >= 0 else rows[0].padding() for number in numbers])


def _shard(shard: Any) -> tuple[int, int]:
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise bad_type("shard", "must be (index, count)", f"{shard!r:.60}", "Pass (0, 1) for one process.")
    count = require_int("shard[1]", shard[1], 1)
    return require_size("shard[0]", shard[0], 0, count - 1), count
