"""What is said of a measurement: one entry, one line of the table, and the machine it was made on."""

from __future__ import annotations

import datetime
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib

from pallas_kernels import _tuning
from pallas_kernels.bench import counts, timing
from pallas_kernels.bench.counts import Floor
from pallas_kernels.bench.timing import Timing
from pallas_kernels.device import current_device

_HEAD = ("op", "case", "implementation", "ms", "min", "max", "calls", "share", "TFLOP/s", "GB/s", "error")


def measured(timing: Timing, floor: Floor) -> dict[str, Any]:
    """The fields of an entry that follow from its time."""
    seconds = timing.median / 1e3
    bound = counts.roofline_seconds(floor, _tuning.device_kind())
    return {
        "status": "ok",
        "ms": {"median": timing.median, "min": timing.least, "max": timing.most},
        "calls_per_sample": timing.calls,
        "floor": {"bytes": floor.bytes, "link_bytes": floor.link_bytes, "flops": floor.flops, "dtype": floor.dtype},
        "roofline_ms": None if bound is None else 1e3 * bound,
        "share": None if bound is None else bound / seconds,
        "tflop_per_s": floor.flops / seconds / 1e12,
        "gb_per_s": (floor.link_bytes or floor.bytes) / seconds / 1e9,
    }


def not_measured(error: Exception, status: str) -> dict[str, Any]:
    """status: "unsupported" or "failed"."""
    lines = str(error).strip().splitlines() or [""]
    return {"status": status, "reason": lines[0] if status == "unsupported" else f"{type(error).__name__}: {lines[0]}"}


def shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """ "shapes" of the inputs by name, and the "dtype" of the first one that holds floats, int32 where none does."""
    arrays = {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree.leaves_with_path(inputs)}
    floats = (x.dtype.name for x in arrays.values() if jax.numpy.issubdtype(x.dtype, jax.numpy.floating))
    dtype = next(floats, "int32")
    return {"shapes": {name: list(x.shape) for name, x in arrays.items()}, "dtype": dtype}


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of an entry's line; the reason, where there is one, is the last."""
    name = (entry["op"], entry["case"], entry["implementation"])
    if entry["status"] != "ok":
        return (*name, f"{entry['status']}: {entry['reason']}")
    ms = entry["ms"]
    share = "-" if entry["share"] is None else f"{entry['share']:.1%}"
    rates = ("-" if rate < 1e-3 else f"{rate:.4g}" for rate in (entry["tflop_per_s"], entry["gb_per_s"]))
    times = (f"{ms[which]:.4g}" for which in ("median", "min", "max"))
    return (*name, *times, str(entry["calls_per_sample"]), share, *rates, _error_cell(entry))


def _error_cell(entry: dict[str, Any]) -> str:
    error = entry["error"]
    if error is None:
        return "-"
    return f"{error} ids differ" if isinstance(error, int) else f"{error:.1e}" if isinstance(error, float) else error


def table(entries: list[dict[str, Any]]) -> str:
    rows = [_HEAD, *(cells(entry) for entry in entries)]
    full = [row for row in rows if len(row) == len(_HEAD)]
    names = [max(len(row[i]) for row in rows) for i in range(3)]
    widths = names + [max(len(row[i]) for row in full) for i in range(3, len(_HEAD))]
    left = [cell.ljust(width) for cell, width in zip(_HEAD, names, strict=False)]
    lines = ["  ".join([*left, *(h.rjust(w) for h, w in zip(_HEAD[3:], widths[3:], strict=True))])]
    for row in rows[1:]:
        start = [cell.ljust(width) for cell, width in zip(row[:3], names, strict=True)]
        end = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)] if row in full else row[3:]
        lines.append("  ".join([*start, *end]).rstrip())
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """The machine, the versions and the date; None for what is not known."""
    device = current_device()
    return {
        "device": device.kind,
        "platform": device.platform,
        "platform_version": jax.devices(device.platform)[0].client.platform_version,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timing": f"median over samples of {1e3 * timing.SAMPLE_SECONDS:g} ms or more: calls_per_sample calls, "
        "one wait; updated arrays are donated; inputs take turns among copies that exceed the L2 cache",
    }


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def as_json(value: Any) -> str:
    """One line; numbers that JSON does not know become strings."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
