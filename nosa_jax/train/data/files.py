"""Files to read text from: where they are, which of them are text, and each of them once."""

from __future__ import annotations

import functools
import glob
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nosa_jax._paths import user_path
from nosa_jax.train.folder import is_part_of_run
from pallas_kernels.checks import bad_type, bad_value

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Bytes that text does not hold: control characters other than bell to carriage return, and escape.
_CONTROL = np.array([*range(7), *range(14, 27), *range(28, 32), 127], np.uint8)


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
        return outer or (path if is_part_of_run(path) else None)

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
        warn("skipped what a training run wrote: " + some(sorted(written)))
    return _once(found)


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
    text = read_bytes(file)
    if is_binary(text):
        raise bad_value(argument, "must be a text file", f"{file}, which is binary", "Unpack or convert it.")
    return text


def is_binary(content: np.ndarray) -> bool:
    """Whether bytes are something else than text: a zero, or too many control characters, near the beginning."""
    start = content[: 2**16]
    return bool((start == 0).any() or np.isin(start, _CONTROL).sum() > 0.03 * len(start))


def unique_files(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """`files` as paths, sorted, each file once. Raises TypeError for a single path, ValueError where there is none, and
    FileNotFoundError for one that is not there."""
    if isinstance(files, str | os.PathLike):
        raise bad_type("files", "must be a sequence of paths", repr(files), "Pass [path], or find_files(path).")
    paths = {user_path("files", file) for file in files}
    if not paths:
        raise bad_value("files", "must name at least one file", "none", "Check the paths; see find_files.")
    for path in sorted(paths):
        if not path.exists():
            raise FileNotFoundError(f"files: must exist, got {str(path)!r}. Check the path; find_files takes globs.")
    return _once(paths)


def read_bytes(path: Path) -> np.ndarray:
    """What a file holds, uint8."""
    return np.frombuffer(path.read_bytes(), np.uint8)


def warn_skipped(paths: Sequence[Path], what: str) -> None:
    """Warns, where there are any, that `paths` are passed over because they are `what`."""
    if paths:
        message = f"skipped {len(paths)} file{'s' * (len(paths) > 1)} that {are(paths)} {what}: {some(paths)}"
        warnings.warn(message, UserWarning, stacklevel=3)


def are(things: Sequence[Any]) -> str:
    return "is" if len(things) == 1 else "are"


def some(paths: Sequence[Path]) -> str:
    """The first few of them, for messages."""
    return ", ".join(map(str, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
