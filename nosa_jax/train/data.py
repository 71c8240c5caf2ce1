"""Local text as bytes, cut into windows and served in seeded batches whose position can be saved.

    corpus = load_corpus(stdlib_files())
    batches = train_batches(corpus.train, batch_size=8, length=512, seed=0)
    next(batches)        # int32 [8, 513]: the inputs are [:, :-1], the targets [:, 1:]
    batches.get_state()  # JSON; set_state() continues on exactly the next batch

Text of your own goes in as a `Corpus` of token ids.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from nosa_jax._extras import import_extra
from nosa_jax._paths import user_path
from nosa_jax.train.log import LOG_NAME
from pallas_kernels.checks import bad_type, bad_value, require_int, require_number

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# What Orbax writes into every checkpoint.
_CHECKPOINT = "_CHECKPOINT_METADATA"
# Bytes that text does not hold: control characters other than bell to carriage return, and escape.
_CONTROL = np.array([*range(7), *range(14, 27), *range(28, 32), 127], np.uint8)
# How far the share held out may lie from the one wanted, relative to it, for files to stay whole.
_CLOSE = 0.2


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


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, sorted, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = root.rglob("*.py")
    return sorted(path for path in files if not _STDLIB_SKIPPED & set(path.relative_to(root).parts))


def find_files(*patterns: str | os.PathLike[str]) -> list[Path]:
    """Files named by paths, folders (every file below, hidden ones not) or globs such as `src/**/*.py`.

    Returns them sorted. A file that has several names, by links say, comes once, and what a training run wrote
    (checkpoints, log, model) is left out with a warning. Raises ValueError when a pattern finds no other file.
    """
    found: list[Path] = []
    written: set[Path] = set()

    @functools.cache
    def part_of_run(path: Path) -> Path | None:
        """What of a training run `path` is or lies in, None for anything else."""
        outer = None if path == path.parent else part_of_run(path.parent)
        return outer or (path if _is_part_of_run(path) else None)

    for pattern in patterns:
        path = user_path("patterns", pattern)
        matches = [match for match in _matches(path) if match.is_file()]
        parts = [part_of_run(Path(os.path.abspath(match))) for match in matches]
        files = [match for match, part in zip(matches, parts, strict=True) if part is None]
        if not files:
            got = f"{str(pattern)!r}" + (", which finds only what a training run wrote" if matches else "")
            raise bad_value("patterns", "must each find a file", got, "Check the path or the glob.")
        found += files
        written.update(part for part in parts if part is not None)
    if written:
        _warn("skipped what a training run wrote: " + _some(sorted(written)))
    return _once(found)


def _is_part_of_run(path: Path) -> bool:
    """Whether `path` is a checkpoint, or the log, the checkpoints or the model of a run, which lie side by side."""
    if os.path.exists(path / _CHECKPOINT):
        return True
    run = path.parent
    return path.name in (LOG_NAME, "checkpoints", "model") and (
        (run / "checkpoints").is_dir() and (run / LOG_NAME).is_file()
    )


def _matches(path: Path) -> Iterator[Path]:
    """What a path, a folder or a glob names."""
    if not path.exists():
        yield from _expand(path)
    elif path.is_dir():
        yield from _below(path)
    else:
        yield path


def _once(paths: Iterable[Path]) -> list[Path]:
    """Sorted, of several names of one file only the first."""
    files = {(status.st_dev, status.st_ino): path for path in sorted(paths, reverse=True) for status in [path.stat()]}
    return sorted(files.values())


def _expand(pattern: Path) -> Iterator[Path]:
    """What a glob names. Unlike `glob` it enters every folder once, so that links may go round in circles."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.iglob(str(pattern)))
        return
    depth = pattern.parts.index("**")
    tail = pattern.parts[depth + 1 :]
    for top in glob.iglob(str(Path(*pattern.parts[:depth]))):
        if not tail:
            yield from _below(Path(top))
            continue
        for folder, _ in _folders(Path(top)):
            yield from _expand(Path(glob.escape(str(folder)), *tail))


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it."""
    for inner, names in _folders(folder):
        yield from (inner / name for name in names if not name.startswith("."))


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """`top` and the folders below it that are not hidden, each once, with the files in it."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it was there when its parent was read: a run just renamed it
            raise error

    seen: set[tuple[int, int]] = set()
    for folder, inner, files in os.walk(top, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder), files


def read_text(path: str | os.PathLike[str], *, argument: str = "path") -> np.ndarray:
    """The bytes of a text file, uint8 and as they are. `argument` is the name of `path` in an error.

    Any encoding will do that writes no zero bytes, as UTF-8, Latin-1 and GB 18030. Raises ValueError for a binary file,
    which one in UTF-16 or UTF-32 counts as, and OSError for one that cannot be read.
    """
    file = user_path(argument, path)
    text = _read(file)
    if is_binary(text):
        raise bad_value(argument, "must be a text file", f"{file}, which is binary", "Unpack or convert it.")
    return text


def _read(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def is_binary(content: np.ndarray) -> bool:
    """Whether bytes are something else than text: a zero, or too many control characters, near the beginning."""
    start = content[: 2**16]
    return bool((start == 0).any() or np.isin(start, _CONTROL).sum() > 0.03 * len(start))


def load_corpus(files: Iterable[str | os.PathLike[str]], *, heldout_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Reads `files` as bytes and holds some out, drawn with `seed`.

    Files are held out until they make up `heldout_fraction` of all bytes (0: none, so nothing can be evaluated). They
    stay whole where that comes close; a file that would be far too much is split, and its end held out.
    The parts are the files' bytes one after the other, sorted by path, with nothing in between. A file of several
    names is read once; binary files are skipped with a warning.

    Raises ValueError when there are no files, or no text in them.
    """
    require_number("heldout_fraction", heldout_fraction, 0.0, 0.9)
    if isinstance(files, str | os.PathLike):
        raise bad_type("files", "must be a sequence of paths", repr(files), "Pass [path], or find_files(path).")
    paths = _once({user_path("files", file) for file in files})
    if not paths:
        raise bad_value("files", "must name at least one file", "none", "Check the paths; see find_files.")
    texts, binary = [], []
    for path in paths:
        text = _read(path)
        if is_binary(text):
            binary.append(path)
        elif len(text):
            texts.append(text)
    total = sum(map(len, texts))
    if total < 1 + (heldout_fraction > 0):
        got = f"{len(binary)} that {_are(binary)} not text and {len(paths) - len(binary)} with {total} bytes"
        raise bad_value("files", "must hold text", got, "Point to other files.")
    if binary:
        _warn(f"skipped {len(binary)} file{'s' * (len(binary) > 1)} that {_are(binary)} not text: {_some(binary)}")
    kept = _kept([len(text) for text in texts], heldout_fraction, seed)
    kept = [size if size in (0, len(text)) else _line_end(text, size) for text, size in zip(texts, kept, strict=True)]
    return Corpus(
        train=np.concatenate([text[:size] for text, size in zip(texts, kept, strict=True)]),
        heldout=np.concatenate([text[size:] for text, size in zip(texts, kept, strict=True)]),
    )


def _kept(sizes: list[int], heldout_fraction: float, seed: int) -> list[int]:
    """How many bytes of each file to train on; the rest, its end, is held out."""
    kept, wanted, heldout = list(sizes), heldout_fraction * sum(sizes), 0
    order = np.random.default_rng(seed).permutation(len(sizes))
    for index in order:
        missing = wanted - heldout
        if missing <= 0:
            break
        if sizes[index] - missing <= _CLOSE * wanted and index != order[-1]:  # something stays to train on
            part = sizes[index]
        elif missing <= _CLOSE * wanted:
            break
        else:
            part = max(round(missing), 1)
        kept[index] -= part
        heldout += part
    return kept


def _line_end(text: np.ndarray, size: int) -> int:
    """Where the line ends that `size` bytes end in, unless it goes on for much of the rest."""
    ends = np.flatnonzero(text[size - 1 : -1][: max((len(text) - size) // 10, 1)] == ord("\n"))
    return size + int(ends[0]) if len(ends) else size


def _are(things: Sequence[Any]) -> str:
    return "is" if len(things) == 1 else "are"


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


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
