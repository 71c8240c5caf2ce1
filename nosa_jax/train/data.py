"""Local text as bytes, cut into windows and served in seeded batches whose position can be saved.

    corpus = load_corpus(stdlib_files())
    batches = train_batches(corpus.train, batch_size=8, length=512, seed=0)
    next(batches)        # int32 [8, 513]: the inputs are [:, :-1], the targets [:, 1:]
    batches.get_state()  # JSON; set_state() continues on exactly the next batch

Text of your own goes in as a `Corpus` of token ids.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from nosa_jax._extras import import_extra
from pallas_kernels.checks import bad_type, bad_value, require_int, require_number

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


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
        require_number("Corpus.bytes_per_token", self.bytes_per_token, 1e-3)

    def fingerprint(self) -> str:
        """Short text that changes when the tokens do; a checkpoint keeps it, so resume can tell."""
        sums = (f"{len(part)}-{zlib.crc32(np.ascontiguousarray(part)):08x}" for part in (self.train, self.heldout))
        return "/".join(sums)


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, sorted, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = root.rglob("*.py")
    return sorted(path for path in files if not _STDLIB_SKIPPED & set(path.relative_to(root).parts))


def find_files(*patterns: str | os.PathLike[str]) -> list[Path]:
    """Files named by paths, folders (every file below, hidden ones not) or globs such as `src/**/*.py`.

    Returns them sorted, each once. Raises ValueError when a pattern finds no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            names = glob.iglob("**/*", root_dir=path, recursive=True)
            matches = {path / name for name in names}
        else:
            matches = {path} if path.exists() else {Path(name) for name in glob.iglob(str(path), recursive=True)}
        files = {match for match in matches if match.is_file()}
        if not files:
            raise bad_value("patterns", "must each find a file", repr(str(pattern)), "Check the path or the glob.")
        found |= files
    return sorted(found)


def load_corpus(files: Iterable[str | os.PathLike[str]], *, heldout_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Reads `files` as bytes and holds some out, whole files only, drawn with `seed`.

    Files are held out until they make up `heldout_fraction` of all bytes (0: none, so nothing can be evaluated).
    The parts are the files' bytes one after the other, sorted by path, with nothing in between.

    Raises ValueError when there are no files, no bytes, or too few files to hold one out.
    """
    require_number("heldout_fraction", heldout_fraction, 0.0, 0.9)
    paths = sorted({Path(file) for file in files})
    if not paths:
        raise bad_value("files", "must name at least one file", "none", "Check the paths; see find_files.")
    texts = [text for text in (np.fromfile(path, dtype=np.uint8) for path in paths) if len(text)]
    if not texts:
        raise bad_value("files", "must hold text", f"{len(paths)} empty files", "Point to other files.")
    if heldout_fraction and len(texts) < 2:
        raise bad_value(
            "files",
            "must be at least two that are not empty, as whole files are held out",
            len(texts),
            "Split the text into more files or pass heldout_fraction=0.0.",
        )
    wanted = heldout_fraction * sum(map(len, texts))
    heldout: set[int] = set()
    size = 0
    for index in np.random.default_rng(seed).permutation(len(texts))[:-1]:  # one file stays to train on
        if size >= wanted:
            break
        heldout.add(int(index))
        size += len(texts[index])
    return Corpus(
        train=_concatenate([text for i, text in enumerate(texts) if i not in heldout]),
        heldout=_concatenate([text for i, text in enumerate(texts) if i in heldout]),
    )


def _concatenate(texts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(texts) if texts else np.empty(0, np.uint8)


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
    grain = import_extra("grain")
    windows = grain.MapDataset.source(Windows(tokens, length))
    batches = windows.shuffle(seed=seed).repeat().batch(batch_size, drop_remainder=True)
    # The text is in memory: reader threads would only compete for the interpreter.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


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
