"""Local text as bytes in memory, cut into windows and served in seeded batches whose position can be saved.

    from nosa_jax.train import stdlib_files

    corpus = load_corpus(stdlib_files())
    batches = train_batches(corpus.train, batch_size=8, length=512, seed=0)
    next(batches)        # int32 [8, 513]: the inputs are [:, :-1], the targets [:, 1:]
    batches.get_state()  # JSON; set_state() continues on exactly the next batch

Text of your own goes in as a `Corpus` of token ids.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from nosa_jax._extras import import_extra
from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.files import are, is_binary, read_bytes, unique_files, warn_skipped
from nosa_jax.train.data.rows import read_here
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.split import kept_sizes
from pallas_kernels.checks import bad_type, bad_value, require_int, require_number


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids to train on and to hold out, one dimension each.

    Text read by `load_corpus` is uint8, one token per byte. Own tokens may have any integer dtype.

    bytes_per_token: mean bytes of text behind a token, which turns a loss into bits per byte.
    Raises TypeError or ValueError when an array is not a vector of integers.
    """

    train: np.ndarray
    heldout: np.ndarray
    bytes_per_token: float = 1.0

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            tokens = getattr(self, name)
            if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
                got = getattr(tokens, "dtype", type(tokens).__name__)
                raise bad_type(f"Corpus.{name}", "must be a NumPy array of integers", got, "Pass token ids.")
            if tokens.ndim != 1:
                raise bad_value(f"Corpus.{name}", "must have one dimension", tokens.shape, "Flatten it.")
        number = require_number("Corpus.bytes_per_token", self.bytes_per_token, 1e-3)
        object.__setattr__(self, "bytes_per_token", number)

    def fingerprint(self) -> str:
        """Short text that changes when the tokens do; a checkpoint keeps it, so resume can tell."""
        sums = (f"{len(part)}-{zlib.crc32(np.ascontiguousarray(part)):08x}" for part in (self.train, self.heldout))
        return "/".join(sums)

    def source(self, length: int) -> DocumentSource:
        """A `Source` of windows of `length` target tokens: those of `train_batches`, in the same order.

        Raises ValueError when `train` is shorter than one window, or for negative ids.
        """
        tokens = Tokens([self.train, self.heldout], names=["Corpus.train", "Corpus.heldout"])
        spans = np.array([[0, len(self.train)], [len(self.train), tokens.size]])
        return DocumentSource(
            tokens,
            spans[:1],
            spans[1:],
            Cut(length),
            bytes_per_token=float(self.bytes_per_token),
            vocab_size=tokens.vocab_size,
            argument="Corpus.train",
            fingerprint=self.fingerprint(),
        )


def load_corpus(files: Iterable[str | os.PathLike[str]], *, heldout_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Reads `files` as bytes and holds some out, drawn with `seed`.

    Files are held out until they make up `heldout_fraction` of all bytes (0: none, so nothing can be evaluated). They
    stay whole where that comes close; a file that would be far too much is split, and its end held out.
    The parts are the files' bytes one after the other, sorted by path, with nothing in between. A file of several
    names is read once; binary files are skipped with a warning.

    Raises ValueError when there are no files, or no text in them.
    """
    require_number("heldout_fraction", heldout_fraction, 0.0, 0.9)
    paths = unique_files(files)
    texts, binary = [], []
    for path in paths:
        text = read_bytes(path)
        if is_binary(text):
            binary.append(path)
        elif len(text):
            texts.append(text)
    total = sum(map(len, texts))
    if total < 1 + (heldout_fraction > 0):
        got = f"{len(binary)} that {are(binary)} not text and {len(paths) - len(binary)} with {total} bytes"
        raise bad_value("files", "must hold text", got, "Point to other files.")
    warn_skipped(binary, "not text")
    kept = kept_sizes([len(text) for text in texts], heldout_fraction, seed)
    kept = [size if size in (0, len(text)) else _line_end(text, size) for text, size in zip(texts, kept, strict=True)]
    return Corpus(
        train=np.concatenate([text[:size] for text, size in zip(texts, kept, strict=True)]),
        heldout=np.concatenate([text[size:] for text, size in zip(texts, kept, strict=True)]),
    )


def _line_end(text: np.ndarray, size: int) -> int:
    """Where the line ends that `size` bytes end in, unless it goes on for much of the rest."""
    ends = np.flatnonzero(text[size - 1 : -1][: max((len(text) - size) // 10, 1)] == ord("\n"))
    return size + int(ends[0]) if len(ends) else size


class Windows(Sequence[np.ndarray]):
    """Windows of `length + 1` tokens, int32; neighbours share one token, so every token is a target once.

    Raises ValueError when the text is shorter than one window.
    """

    def __init__(self, tokens: Integer[np.ndarray, " S"], length: int) -> None:
        require_int("length", length, 1)
        if len(tokens) < length + 1:
            raise bad_value(
                "tokens", f"must fill one window of length + 1 = {length + 1}", len(tokens), "Add text or shorten it."
            )
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(index) * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)


def train_batches(tokens: Integer[np.ndarray, " S"], *, batch_size: int, length: int, seed: int) -> Any:
    """An endless grain iterator of int32 [batch_size, length + 1]: all windows shuffled, anew in every epoch.

    `get_state()` returns a small JSON-able dict and `set_state()` takes it back: the next batch is then exactly
    the one that would have come. It holds a position only, so build the iterator with the same arguments.

    Raises ValueError when the text is shorter than one window, ImportError without the `train` extra.
    """
    require_int("batch_size", batch_size, 1)
    require_int("seed", seed, 0)
    windows = import_extra("grain").MapDataset.source(Windows(tokens, length))
    return iter(read_here(windows.shuffle(seed=seed).repeat().batch(batch_size, drop_remainder=True)))


def heldout_batches(
    tokens: Integer[np.ndarray, " S"], *, batch_size: int, length: int, max_batches: int
) -> Iterator[Integer[np.ndarray, "B W"]]:
    """Up to `max_batches` batches of int32 [B, length + 1], the same at every call, spread evenly over the text.

    B is `batch_size`, or the number of windows when the text holds fewer.
    Raises ValueError when the text is shorter than one window.
    """
    require_int("batch_size", batch_size, 1)
    require_int("max_batches", max_batches, 1)
    windows = Windows(tokens, length)
    rows = min(batch_size, len(windows))
    count = min(max_batches, len(windows) // rows)
    chosen = np.linspace(0, len(windows) - 1, rows * count).round().astype(int)
    return (np.stack([windows[i] for i in batch]) for batch in chosen.reshape(count, rows))
