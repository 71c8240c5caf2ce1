"""JSON-lines log of a run: one object per line, the first one with configuration, versions and seed."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nosa_jax._paths import user_path
from nosa_jax.train.folder import LOG_NAME

Record = dict[str, Any]


class JsonLines:
    """Appends objects to a file, each on its own line and flushed; with `path=None` it only swallows them.

    Numbers that are not finite become null, see `as_json`. What a killed run left of its last line is removed first.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None and path.exists():
            _mend_end(path)
        self._path = path
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(as_json(record), allow_nan=False) + "\n")
            self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """What `read_log` finds in the file so far."""
        return [] if self._path is None else read_log(self._path)


def as_json(value: Any) -> Any:
    """`value` with None in place of numbers that are not finite, which JSON does not have, at any depth."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines log, without those that a resumed run took again.

    None stands for a number that was not finite, and for one that nobody knows, such as the MFU of an unknown card.
    A run that resumes at step s appends to the log; what was logged of steps after s before is dropped here, and of two
    evaluations after one step the first one. A line that is no record is skipped: with a warning, unless it is the last
    one, which a killed run leaves unfinished.
    """
    records: list[dict[str, Any]] = []
    lines = user_path("path", path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            if number < len(lines):
                warnings.warn(f"skipped line {number} of {path}, which is no record of a run", stacklevel=2)
            continue
        if record["kind"] == "start":
            records = [old for old in records if old["step"] <= record["step"]]
        elif record["kind"] == "eval":
            records = [old for old in records if (old["kind"], old["step"]) != ("eval", record["step"])]
        records.append(record)
    return records


def as_records(log: str | os.PathLike[str] | Sequence[Record]) -> list[Record]:
    """The records of a log, of the log in the folder of a run, or as they are."""
    if not isinstance(log, str | os.PathLike):
        return list(log)
    path = user_path("log", log)
    return read_log(path / LOG_NAME if path.is_dir() else path)


def summary(log: str | os.PathLike[str] | Sequence[Record]) -> str:
    """A run in a few lines: held-out loss, last loss, speed, skipped steps, and where its files are.

    log: a log, the folder of a run, or records as `read_log` returns them. Lines about what it does not hold are left
        out.
    """
    records = as_records(log)
    steps, evaluations, starts = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval", "start"))
    evaluations = [record for record in evaluations if "loss" in record]
    loss = lambda record: math.nan if record["loss"] is None else record["loss"]
    lines = []
    if evaluations:
        best = min(evaluations, key=lambda record: math.inf if math.isnan(loss(record)) else loss(record))
        last = evaluations[-1]
        text = f"best held-out loss {loss(best):.4f} nats per token after step {best['step']}"
        lines.append(text if best is last else f"{text}, {loss(last):.4f} after step {last['step']}")
    if steps:
        lines.append(f"training loss {loss(steps[-1]):.4f} in step {steps[-1]['step']}")
        # The first record of each part of a run includes compiling.
        first = {id(after) for before, after in itertools.pairwise(records) if before["kind"] == "start"}
        settled = [record for record in steps if id(record) not in first] or steps
        speed = f"median {statistics.median(record['tokens_per_second'] for record in settled):,.0f} tokens/s"
        shares = [record["mfu"] for record in settled if record.get("mfu") is not None]
        lines.append(f"{speed}, MFU {statistics.median(shares):.0%}" if shares else speed)
        if skipped := int(steps[-1].get("skipped") or 0):
            what = "step" if skipped == 1 else "steps"
            lines.append(f"{skipped:,} {what} skipped, whose loss or gradients were not finite")
    if starts and starts[-1].get("directory"):
        lines.append(f"files in {starts[-1]['directory']}")
    return "\n".join(lines)


def _parse(line: str) -> dict[str, Any] | None:
    """The record in a line, None where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if whole else None


def _mend_end(path: Path) -> None:
    """Ends the last line of a file where it is a whole record, and removes it where it is not."""
    content = path.read_bytes()
    kept, newline, last = content.rpartition(b"\n")
    if not last:
        return
    if _parse(last.decode("utf-8", errors="replace")) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, len(kept) + len(newline))
