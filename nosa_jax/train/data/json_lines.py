"""Files with one JSON object per line, plain or compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nosa_jax._json import refuse_pointer
from pallas_kernels.checks import bad_value


def read_objects(paths: Iterable[Path]) -> Iterator[tuple[dict[str, Any], str]]:
    """The object of every line and `file:line`, for messages. Empty lines are passed over.

    Raises ValueError for a line that is no JSON object in UTF-8, and for a damaged .gz file.
    """
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            where = f"{path}:{number}"
            if number == 1:
                refuse_pointer(str(path), line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse(line, where), where


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at byte {error.start} of the line"
        raise bad_value(where, "must be UTF-8", got, "Convert the file.") from error
    except (ValueError, RecursionError) as error:
        raise bad_value(where, "must be one JSON object", f"({error})", "Correct or drop the line.") from error
    if not isinstance(found, dict):
        raise bad_value(where, "must be one JSON object", type(found).__name__, "Correct or drop the line.")
    return found


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield from file
        return
    try:
        with gzip.open(path, "rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        rule = "must be a whole gzip file"
        raise bad_value(str(path), rule, f"({error})", "Copy or download it again.") from error
