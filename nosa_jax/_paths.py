"""Paths as users write them, folders for one run at a time, and files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.checks import bad_type, bad_value

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
LOCK_NAME = ".lock"


def lock(descriptor: Any, *, shared: bool = False, wait: bool = True) -> bool | None:
    """Locks an open file or folder until it is closed; says whether that went well, None where there are no locks."""
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def user_path(argument: str, path: Any) -> Path:
    """`path` with a leading ~ replaced by the home folder.

    Raises TypeError for what is no path, ValueError for text that cannot be one.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise bad_type(argument, "must be a path", f"{type(path).__name__} {path!r:.60}", "Pass a str or a Path.")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise bad_value(argument, "must be a path", repr(path), "Name a file or a folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or no home
        raise bad_value(argument, "must lie below a home folder that is known", path, "Write it out.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, with its ending, that takes the place of `path` when the block ends without an error.

    So a full disk costs the new content, not the old. A link stays one: the file that it names is replaced. Permissions
    stay as they are.

    Raises FileNotFoundError where there is no such folder, IsADirectoryError for a folder.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing to lose
        yield path
        return
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        with contextlib.suppress(FileNotFoundError):  # the file is new
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run(argument: str, folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps it to this run until the block ends, or the process, however that happens.

    Raises ValueError where another run has it.
    """
    # A file in the folder, not the folder itself as in nosa_jax.hf.folder: it says who has the folder. It stays, for
    # somebody may be about to lock it: then he and one who makes a new file would both have the folder.
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
        if lock(file, wait=False) is False:
            file.seek(0)
            got = f"{folder}, which process {file.read().strip() or 'unknown'} uses"
            remedy = "Wait for it to end, or take another folder."
            raise bad_value(argument, "must be a folder without another run in it", got, remedy)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
