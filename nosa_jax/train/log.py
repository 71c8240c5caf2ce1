"""JSON-lines log of a run: one object per line, the first one with configuration, versions and seed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends objects to a file, each on its own line and flushed; with `path=None` it only swallows them."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines log, without those that a resumed run took again.

    A run that resumes at step s appends to the log; what was logged of steps after s before is dropped here.
    """
    records: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "start":
            records = [old for old in records if old.get("step", 0) <= record["step"]]
        records.append(record)
    return records
