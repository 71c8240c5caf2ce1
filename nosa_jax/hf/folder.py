"""A checkpoint folder as one thing: read as a whole, replaced as a whole, whoever else is at it.

Writers fill a folder of their own and then move its files over, config.json away first and back last. They hold a lock
while they move. A reader looks at the folder under that lock before and after it reads: where anything has changed it
reads again. The lock is on the folder itself, so nothing is left behind, and a process that dies lets go of it.

What a writer moves out lies in its own folder until all is over. So where one was killed halfway, or could not take
back what it had moved, the next one does that before it begins.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from nosa_jax._paths import HAS_LOCKS, lock, user_path
from nosa_jax.origin import CONFIG_NAME, GENERATION_NAME
from pallas_kernels.checks import bad_value

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS = (SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
TEXT_FILES = (GENERATION_NAME, *TOKENIZER_FILES)
PARTIAL = ".saving-"
_OLD, _NEW = "old", "new"  # in a folder of a writer: what it moved out, and the names of what it moves in
_READS = 10


def read_texts(folder: Path) -> dict[str, bytes]:
    """The contents of generation_config.json and of the tokenizer's files in `folder`, by name."""
    return {name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).is_file()}


def existing_folder(path: Any) -> Path:
    """The path of a folder, ~ expanded; raises FileNotFoundError where there is none."""
    folder = user_path("path", path)
    if not folder.is_dir():
        what = "which is a file" if folder.exists() else "no such folder"
        raise FileNotFoundError(
            f"path: must be a local checkpoint folder, got {folder} ({what}). "
            f"Pass the folder that holds {CONFIG_NAME}; download it first if it is on a hub."
        )
    return folder


def read_whole[T](folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of `folder`, of one state of it alone: it is called again where a writer came in between.

    Raises ValueError where writers come in between again and again.
    """
    for _ in range(_READS):
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                # Kept open, so that no new file can pass for this one by its number.
                stack.enter_context(open(folder / CONFIG_NAME, "rb"))
            before = _look(folder)
            try:
                found = read()
            except Exception:
                if _look(folder) == before:
                    raise
            else:
                if _look(folder) == before:
                    return found
                del found  # before the next one is made
    remedy = "Load it when its writer is done."
    raise bad_value("path", "must stay as it is while it is read", f"{folder}, replaced {_READS} times", remedy)


def _look(folder: Path) -> object:
    """What changes when any file of a checkpoint in `folder` does; None without a folder."""
    try:
        with locked(folder, shared=True):
            stats = [(name, (folder / name).stat()) for name in os.listdir(folder) if _is_read(name)]
    except OSError:
        return None
    return sorted((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)


def _is_read(name: str) -> bool:
    return name in (CONFIG_NAME, INDEX_NAME, *TEXT_FILES) or name.endswith(".safetensors")


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on `folder`, waiting for it unless told otherwise; yields whether it does.

    Where there are no such locks readers still compare, and writers should not meet.
    """
    if not HAS_LOCKS:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield bool(lock(descriptor, shared=shared, wait=wait))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into what becomes `folder`: inside it where it exists, else beside it.

    It is gone at the end, as are those that killed processes left there, and parents made for it where it was in vain.
    """
    inside = folder.exists()
    place, prefix = (folder, PARTIAL) if inside else (folder.parent, f".{folder.name}{PARTIAL}")
    made = [parent for parent in (place, *place.parents) if not parent.exists()]
    partial = place / f"{prefix}{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with locked(place):  # nobody tidies up between the making of a folder and its lock
                _remove_leftovers(place, prefix, folder)
                partial.mkdir()
                stack.enter_context(locked(partial))
        except OSError as error:
            reason = f"path: a folder must be made in {place}, which failed ({error.strerror})"
            raise OSError(error.errno, f"{reason}. Choose another path or change who may write there.") from error
        stack.callback(_end, partial, folder)
        yield partial


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def tidy(folder: Path) -> None:
    """Removes from `folder` what writers left there that were killed; what they had moved out is moved back first."""
    with locked(folder):
        _remove_leftovers(folder, PARTIAL, folder)


def _remove_leftovers(place: Path, prefix: str, folder: Path) -> None:
    """Removes from `place` what killed writers of `folder` left; the caller holds the lock of `place`."""
    for name in os.listdir(place):
        leftover = place / name
        with contextlib.suppress(FileNotFoundError):  # its writer is alive, and has just removed it or moved it in
            if name.startswith(prefix) and leftover.is_dir() and not leftover.is_symlink():
                with locked(leftover, wait=False) as dead:
                    if dead:
                        _remove(leftover, folder)


def _end(partial: Path, folder: Path) -> None:
    """Removes the folder of a writer that is done, whichever way it ended."""
    if partial.exists():
        with locked(folder) if folder.exists() else contextlib.nullcontext():
            _remove(partial, folder)


def _remove(partial: Path, folder: Path) -> None:
    """Removes `partial`; keeps it where it holds the old files of `folder` and they cannot be moved back."""
    if (partial / _OLD).is_dir() and not os.path.lexists(folder / CONFIG_NAME):
        try:
            _take_back(partial, folder)
        except OSError:
            return
    shutil.rmtree(partial, ignore_errors=True)


def swap_in(partial: Path, folder: Path, leaving: Collection[str] = ()) -> None:
    """Moves the checkpoint in `partial` to `folder`, in the place of the one there, whose other files stay.

    leaving: names of other files that go with the old checkpoint.
    Where anything fails, all that was moved is moved back.
    """
    if not folder.exists():
        try:
            partial.rename(folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
            # Another writer was faster; its checkpoint is replaced like any other.
    new = _config_last(os.listdir(partial))
    (partial / _NEW).write_text("\n".join(new), encoding="utf-8")
    (partial / _OLD).mkdir()
    with locked(folder):
        old = [name for name in os.listdir(folder) if _is_checkpoint(name) or name in new or name in leaving]
        try:
            for name in reversed(_config_last(old)):
                (folder / name).rename(partial / _OLD / name)
            for name in new:
                (partial / name).rename(folder / name)
        except BaseException:
            _take_back(partial, folder)
            raise


def _take_back(partial: Path, folder: Path) -> None:
    """Undoes what `swap_in` has done by now. Where this is cut short too, it may be called again.

    config.json comes back last of all: a folder without it is half moved, one with it is whole.
    """
    for name in reversed((partial / _NEW).read_text(encoding="utf-8").split("\n")):
        if not os.path.lexists(partial / name):
            (folder / name).rename(partial / name)
    for name in _config_last(os.listdir(partial / _OLD)):
        (partial / _OLD / name).rename(folder / name)


def _config_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == CONFIG_NAME, name))


def _is_checkpoint(name: str) -> bool:
    """Whether a file of this name goes with the checkpoint that it belongs to."""
    return name == CONFIG_NAME or any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)
