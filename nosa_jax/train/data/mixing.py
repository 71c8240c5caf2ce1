"""Several sources as one, in given shares."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from nosa_jax._extras import import_extra
from nosa_jax.train.data.batch import Row
from nosa_jax.train.data.rows import MixedRows
from nosa_jax.train.data.source import RowSource
from pallas_kernels.checks import bad_type, bad_value, require_number


class MixtureSource(RowSource):
    """What `train.mixture` makes."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = list(sources), [weight / sum(weights) for weight in weights]
        self.length = sources[0].length
        self.vocab_size = max(source.vocab_size for source in sources)
        # Rows are of one length, so the shares of rows are about those of tokens.
        shares = zip(self._sources, self._weights, strict=True)
        self.bytes_per_token = float(sum(weight * source.bytes_per_token for source, weight in shares))
        self.train_tokens = sum(source.train_tokens for source in sources)
        self.heldout_tokens = sum(source.heldout_tokens for source in sources)
        self.heldout_targets = sum(source.heldout_targets for source in sources)
        packed = [source.block_size for source in sources if source.block_size is not None]
        self.block_size = math.gcd(*packed) if packed else None
        samples = [source.train_rows(0)[0] for source in sources]
        self._mask = any(row.mask is not None for row in samples)
        self._segment_ids = any(row.segment_ids is not None for row in samples)

    @property
    def heldout_bytes_per_token(self) -> float:
        # What is held out is that of all sources, whatever their weights in training.
        sizes = sum(source.heldout_targets * source.heldout_bytes_per_token for source in self._sources)
        return sizes / self.heldout_targets if self.heldout_targets else self.bytes_per_token

    def fingerprint(self) -> str:
        parts = [(source.fingerprint(), f"{w:.12g}") for source, w in zip(self._sources, self._weights, strict=True)]
        return f"mixture-{len(parts)}-{zlib.crc32(repr(parts).encode()):08x}"

    def train_rows(self, seed: int) -> Any:
        # Seeds of their own: sources with as many rows would else run through them in one order.
        seeds = np.random.SeedSequence(seed).generate_state(len(self._sources)).tolist()
        parts = [source.train_rows(own) for source, own in zip(self._sources, seeds, strict=True)]
        mixed = import_extra("grain").MapDataset.mix(parts, weights=self._weights)
        return mixed.map(partial(Row.complete, mask=self._mask, segment_ids=self._segment_ids))

    def heldout_rows(self) -> MixedRows:
        parts = [source.heldout_rows() for source in self._sources]
        return MixedRows(parts, mask=True, segment_ids=self._segment_ids)


def mixture(parts: Sequence[tuple[Any, int | float]]) -> MixtureSource:
    """One source that takes its rows from several, each by its weight, in an order that is always the same.

    parts: pairs (source, weight), of sources that this package makes, mixtures among them. Of all rows a source gives
        `weight / sum of weights`, at any point of the run; the smallest of these shares is kept to 1%. Each starts
        again when it is through.

    Whole rows are mixed. What is held out is that of all sources, one after the other, whatever the weights;
    `heldout_bytes_per_token` is of their targets there, `bytes_per_token` of the rows to train on.

    Raises TypeError or ValueError for other sources, rows of different lengths, and weights that are not positive.
    """
    parts = list(parts)
    if not parts:
        raise bad_value("parts", "must hold at least one source", "none", "Pass [(source, weight), ...].")
    for number, part in enumerate(parts):
        name = f"parts[{number}]"
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise bad_type(name, "must be (source, weight)", f"{part!r:.60}", "Pass [(source, weight), ...].")
        source, weight = part
        if not isinstance(source, RowSource):
            remedy = "Make it with train.text, jsonl, tokens, chat, mixture or Corpus.source."
            raise bad_type(f"{name}[0]", "must be a source of this package", type(source).__name__, remedy)
        require_number(f"{name}[1]", weight, 0.0)
        if weight <= 0:
            raise bad_value(f"{name}[1]", "must be positive", weight, "Raise it or drop the source.")
        if source.length != parts[0][0].length:
            rule = f"must have rows of {parts[0][0].length} tokens as the first source has"
            raise bad_value(f"{name}[0]", rule, source.length, "Make all with the same length.")
    sources, weights = zip(*parts, strict=True)
    return MixtureSource(sources, [float(weight) for weight in weights])
