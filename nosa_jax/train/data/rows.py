"""Rows to train on, made from documents when they are asked for: windows of all text, or packed documents."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Int64

from nosa_jax._extras import import_extra
from nosa_jax.train.data.batch import Row
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.packing import pack


def read_here(dataset: Any) -> Any:
    """A grain MapDataset as an IterDataset that this thread reads. Rows are copied from memory or from mapped files:
    reader threads would only compete for the interpreter."""
    grain = import_extra("grain")
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def shuffled(rows: Sequence[Row], seed: int) -> Any:
    """All rows in an order of `seed`, in another one every epoch, as an endless grain MapDataset.

    grain adds the epoch to the seed that it is given. Neighbouring seeds would share their orders, an epoch apart: it
    is given a hash. Whoever changes the order of a seed counts `batch.ORDER` up.
    """
    (hashed,) = np.random.SeedSequence(seed).generate_state(1).tolist()
    return import_extra("grain").MapDataset.source(rows).shuffle(seed=hashed).repeat()


class Rows(Sequence[Row]):
    """Rows by number, each made anew. What grain reads from."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.row(int(index))

    def row(self, index: int) -> Row:
        raise NotImplementedError


class WindowRows(Rows):
    """Windows of documents put one after the other. Neighbours share one token, so every token but one is a target.

    tokens, spans: the documents, and start and stop of each.
    length: of a row.
    partial: whether the rest of the text, which fills no window, is a row too; all rows have a mask then.
    """

    def __init__(self, tokens: Tokens, spans: Int64[np.ndarray, "N 2"], length: int, *, partial: bool = False) -> None:
        self._tokens, self._length, self._partial = tokens, length, partial
        apart = np.ones(len(spans), bool)
        apart[1:] = spans[1:, 0] != spans[:-1, 1]
        starts, stops = spans[apart, 0], spans[np.roll(apart, -1), 1]
        self._runs = np.stack([starts, stops], axis=1).tolist()  # whatever lies side by side is one run
        self._starts = [0, *np.cumsum(stops - starts).tolist()]  # of runs, in the text without what lies between them

    def __len__(self) -> int:
        targets = max(self._starts[-1] - 1, 0)
        return -(-targets // self._length) if self._partial else targets // self._length

    def row(self, index: int) -> Row:
        start = index * self._length
        stop = min(start + self._length + 1, self._starts[-1])
        window = np.zeros(self._length + 1, np.int32)
        known = np.zeros(self._length + 1, bool)
        at = 0
        for begin, end in self._parts(start, stop):
            window[at : at + end - begin] = self._tokens.read(begin, end)
            known[at : at + end - begin] = self._tokens.read_learned(begin, end)
            at += end - begin
        return Row(window[:-1], window[1:], known[1:] if self._partial or self._tokens.masked else None)

    def _parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the text from `start` to `stop` lies in the tokens."""
        first, last = bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)
        return [
            (begin + max(start - offset, 0), min(end, begin + stop - offset))
            for (begin, end), offset in zip(self._runs[first:last], self._starts[first:last], strict=True)
        ]


class PackedRows(Rows):
    """Rows of several documents. Every token is in one row, once; the last token of a document has no target.

    A document longer than a row is cut into pieces. Each piece starts on a multiple of `block_size`, and the next token
    of its document is the target of its last one.

    tokens, spans: the documents, and start and stop of each.
    length: of a row, a multiple of block_size.
    """

    def __init__(self, tokens: Tokens, spans: Int64[np.ndarray, "N 2"], length: int, block_size: int) -> None:
        self._tokens, self._length, self._block_size = tokens, length, block_size
        # Documents of one size share rows with any others, whatever the order of the files.
        spans = spans[np.random.default_rng(0).permutation(len(spans))]
        counts = -(-(spans[:, 1] - spans[:, 0]) // length)
        first = np.cumsum(counts) - counts
        document = np.repeat(np.arange(len(spans)), counts)
        starts = spans[document, 0] + length * (np.arange(len(document)) - first[document])
        ends = spans[document, 1]
        stops = np.minimum(starts + length, ends)
        blocks = -(-(stops - starts) // block_size)
        row = pack(blocks, length // block_size)
        order = np.lexsort((-blocks, row))
        self._starts, self._stops, self._ends = starts[order], stops[order], ends[order]
        self._offsets = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> Row:
        tokens, targets = np.zeros(self._length, np.int32), np.zeros(self._length, np.int32)
        mask, segment_ids = np.zeros(self._length, bool), np.full(self._length, -1, np.int32)
        pieces = slice(self._offsets[index], self._offsets[index + 1])
        at = 0
        parts = (places[pieces].tolist() for places in (self._starts, self._stops, self._ends))
        for segment, (start, stop, end) in enumerate(zip(*parts, strict=True)):
            read_to = min(stop + 1, end)
            size, targeted = stop - start, read_to - start - 1
            read = self._tokens.read(start, read_to)
            tokens[at : at + size] = read[:size]
            targets[at : at + targeted] = read[1:]
            mask[at : at + targeted] = self._tokens.read_learned(start, read_to)[1:]
            segment_ids[at : at + size] = segment
            at += -(-size // self._block_size) * self._block_size
        return Row(tokens, targets, mask, segment_ids)


class MixedRows(Rows):
    """The rows of several, one after the other.

    mask, segment_ids: whether all of them have these arrays.
    """

    def __init__(self, parts: Sequence[Sequence[Row]], *, mask: bool, segment_ids: bool) -> None:
        self._parts, self._mask, self._segment_ids = parts, mask, segment_ids
        self._starts = [0, *np.cumsum([len(part) for part in parts]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Row:
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]].complete(mask=self._mask, segment_ids=self._segment_ids)
