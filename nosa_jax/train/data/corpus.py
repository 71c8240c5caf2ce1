"""Local text as bytes in memory, split, and its windows as a source of batches.

    from nosa_jax.train import stdlib_files

    corpus = load_corpus(stdlib_files())
    batches = corpus.source(length=512).batches(batch_size=8, seed=0)
    next(batches)        # a Batch of tokens and targets, int32 [8, 512]
    batches.get_state()  # JSON; set_state() continues on exactly the next batch

Text of your own goes in as a `Corpus` of token ids.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable

import numpy as np

from nosa_jax.train.data.documents import Tokens
from nosa_jax.train.data.files import are, is_binary, read_bytes, unique_files, warn_skipped
from nosa_jax.train.data.source import Cut, DocumentSource
from nosa_jax.train.data.split import kept_sizes
from pallas_kernels.checks import bad_type, bad_value, require_number


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
        """A `Source` of windows of `length` target tokens. Neighbours share one token, so every token is a target once;
        the rest of `train` that fills no window is left out, that of `heldout` is a row too.

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
