"""Tokens of many documents, one after the other, in memory or mapped from files."""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int64, Integer

from pallas_kernels.checks import bad_value

_CHUNK = 2**22  # tokens that are put into one array, or looked at at once


class Tokens:
    """Integer vectors as if they were one, read in parts. None of them is copied, so a mapped file stays one.

    shards: the vectors, of any integer dtypes.
    learned: bool vectors of the same lengths: whether a token counts as a target. None where all do.

    size: how many tokens there are. checksum: of their bytes. ends: where `end_of_document` was found, counted
    from the first token, int64: the place after it.

    Every token is looked at once, for the checksum, the largest id and the ends. Raises ValueError for negative ids.
    """

    def __init__(
        self,
        shards: Sequence[Integer[np.ndarray, " _"]],
        learned: Sequence[Bool[np.ndarray, " _"]] | None = None,
        *,
        end_of_document: int | None = None,
        names: Sequence[str] | None = None,
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        """names: of the shards, for messages. progress: called with the number of tokens that were looked at."""
        self._shards, self._learned = list(shards), None if learned is None else list(learned)
        self._starts = [0, *np.cumsum([len(shard) for shard in shards]).tolist()]
        self.size: int = self._starts[-1]
        self.vocab_size, self.checksum, ends = 0, 0, [np.zeros(0, np.int64)]
        for number, shard in enumerate(shards):
            for start in range(0, len(shard), _CHUNK):
                part = shard[start : start + _CHUNK]
                least, most = int(part.min()), int(part.max())
                if least < 0:
                    where = names[number] if names else "tokens"
                    rule = "must hold token ids of at least 0"
                    raise bad_value(where, rule, least, "Check how they were written, and their dtype.")
                self.vocab_size = max(self.vocab_size, most + 1)
                self.checksum = zlib.crc32(np.ascontiguousarray(part), self.checksum)
                if end_of_document is not None:
                    found = np.flatnonzero(part == end_of_document)
                    ends.append(found + (self._starts[number] + start + 1))
                progress(len(part))
        for flags in self._learned or ():
            self.checksum = zlib.crc32(np.packbits(flags), self.checksum)
        self.ends: Int64[np.ndarray, " E"] = np.concatenate(ends)

    @property
    def shard_ends(self) -> list[int]:
        """The place after the last token of every shard."""
        return self._starts[1:]

    @property
    def masked(self) -> bool:
        """Whether some tokens may not count as targets."""
        return self._learned is not None

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to `stop`, at least one, ints."""
        return self._read(self._shards, start, stop)

    def read_learned(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens from `start` to `stop`, at least one, count as targets, bool."""
        return np.ones(stop - start, bool) if self._learned is None else self._read(self._learned, start, stop)

    def _read(self, shards: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        first = bisect.bisect_right(self._starts, start) - 1
        if stop <= self._starts[first + 1]:
            return shards[first][start - self._starts[first] : stop - self._starts[first]]
        last = bisect.bisect_left(self._starts, stop)
        begins = zip(shards[first:last], self._starts[first:last], strict=True)
        return np.concatenate([shard[max(start - begin, 0) : stop - begin] for shard, begin in begins])


class Collector:
    """Documents put together one by one: `Tokens` of a few large arrays, and the span of every document."""

    def __init__(self, dtype: np.dtype, *, masked: bool = False) -> None:
        self._dtype, self._masked = dtype, masked
        self._open: list[np.ndarray] = []
        self._open_learned: list[np.ndarray] = []
        self._shards: list[np.ndarray] = []
        self._learned: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._waiting = 0

    def add(self, ids: Sequence[int] | np.ndarray, learned: np.ndarray | None = None) -> None:
        """One document more; an empty one is none."""
        if not len(ids):
            return
        self._open.append(np.asarray(ids, self._dtype))
        if learned is not None:
            self._open_learned.append(learned)
        self._sizes.append(len(ids))
        self._waiting += len(ids)
        if self._waiting >= _CHUNK:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._shards.append(np.concatenate(self._open))
            if self._masked:
                self._learned.append(np.concatenate(self._open_learned))
        self._open, self._open_learned, self._waiting = [], [], 0

    def finish(self) -> tuple[Tokens, Int64[np.ndarray, "N 2"]]:
        """The tokens, and start and stop of every document in them."""
        self._close()
        stops = np.cumsum(np.asarray(self._sizes, np.int64), dtype=np.int64)
        spans = np.stack([stops - np.asarray(self._sizes, np.int64), stops], axis=1)
        return Tokens(self._shards, self._learned if self._masked else None), spans
