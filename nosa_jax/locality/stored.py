"""Selections in a file: a compressed .npz whose ids take one or two bytes, read with care, for it may be anybody's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nosa_jax._paths import replacing
from nosa_jax.cache import memory
from nosa_jax.config import AttentionConfig
from nosa_jax.locality.rules import require_counting
from pallas_kernels.checks import bad_value

_FORMATS = ("nosa-jax selections 1", "nosa-jax selections 2")  # the first one keeps ids as int32
_MOST_DEFLATED = 1032
_HEADER_BYTES = 2**20


def write(path: Path, header: dict[str, Any], block_ids: np.ndarray, **arrays: Any) -> None:
    """Writes a compressed .npz at exactly `path`. A file that is there is replaced at the end, or not at all.

    header: what JSON holds.   block_ids: int32, -1 for padding; stored as id + 1 in the smallest unsigned type.
    """
    smallest = np.min_scalar_type(int(block_ids.max(initial=-1)) + 1)
    packed = (block_ids + 1).astype(smallest)
    header = header | {"format": _FORMATS[-1]}
    # An open file, because NumPy would append .npz to other names.
    with replacing(path) as new, new.open("wb") as file:
        np.savez_compressed(file, **arrays, block_ids=packed, header=np.array(json.dumps(header)))


def read(path: Path) -> dict[str, Any]:
    """The fields of `Selections` in a file that `write` wrote.

    Raises ValueError for other files, before memory is asked for what they claim to hold; OSError for a file that
    cannot be opened.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with refusing(path), zipfile.ZipFile(file) as archive:
            read = partial(_read_array, archive, size)
            header = json.loads(str(read("header", _HEADER_BYTES, ())[()]))
            if header.get("format") not in _FORMATS:
                rule = f"must hold {_FORMATS[-1]!r}"
                raise bad_value("path", rule, repr(header.get("format")), "Record it again.")
            attention = AttentionConfig(**header["attention"])
            fields = {name: header[name] for name in ("head_dim", "itemsize", "label")}
            limit = memory.host_limit()[0]
            positions = read("positions", limit, (None, None))
            require_counting(positions)
            batch, steps = positions.shape
            ids = read("block_ids", limit, (None, batch, None, steps, attention.num_selected_blocks))
            if header["format"] != _FORMATS[0]:
                if ids.dtype.kind != "u":
                    raise ValueError(f"block_ids cannot be {ids.dtype}")
                ids = ids.astype(np.int32) - 1
            importance = None
            if "importance.npy" in archive.namelist():
                importance = read("importance", limit, (ids.shape[0], batch, ids.shape[2], None))
            return {
                "block_ids": ids, "positions": positions, "attention": attention, "importance": importance, **fields,
            }  # fmt: skip


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns whatever a file of someone else breaks, in zipfile, NumPy or JSON, into one ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("path: "):
            raise
        reason = f"{path} ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        raise bad_value("path", "must be a file written by Selections.save", reason, "Record it again.") from error


def _read_array(
    archive: zipfile.ZipFile, size: int, name: str, limit: int, expected: tuple[int | None, ...]
) -> np.ndarray:
    """An array of an .npz of `size` bytes, once its shape is as expected, can be there and as int32 fits `limit`."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in another way")
    # Deflate makes nothing smaller than this, so more is a lie.
    most = _MOST_DEFLATED * (min(entry.compress_size, size) + 1)
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        stored = math.prod(shape) * dtype.itemsize
        needed = math.prod(shape) * max(dtype.itemsize, 4)
        fits = len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))
        if not fits or file.tell() + stored != entry.file_size or entry.file_size > most:
            raise ValueError(f"{name} cannot have shape {list(shape)}")
        if needed > limit:
            raise ValueError(f"{name} needs {needed} bytes, more than the {limit} available")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
