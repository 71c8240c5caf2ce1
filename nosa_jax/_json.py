"""JSON files that others wrote: an object, or a ValueError that names the file."""

from __future__ import annotations

import json
from typing import Any

from pallas_kernels.checks import bad_value

_POINTER = b"version https://git-lfs"


def parse_object(source: str, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, whose byte order mark is passed over. source: the file, for messages.

    Raises ValueError for anything else, be it nested too deeply or a number too long to read.
    """
    refuse_pointer(source, data)
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad_value(source, "must be valid JSON", f"({error})", "Restore the file or download it again.") from error
    if not isinstance(found, dict):
        raise bad_value(source, "must hold a JSON object", type(found).__name__, "Restore the file.")
    return found


def refuse_pointer(source: str, data: bytes) -> None:
    """Raises ValueError where `data`, the start of a file, shows that Git LFS has not fetched it."""
    if data.startswith(_POINTER):
        remedy = "Run `git lfs pull` in the folder, or download the file itself."
        raise bad_value(source, "must be the file itself", "a pointer of Git LFS to it", remedy)
