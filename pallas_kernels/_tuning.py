"""Launch parameters of the Triton kernels: measured ones from `tuned/<device>.json`, else the kernel's own default.

A file holds, per kernel, entries {"match": shape class, "launch": parameters, "ms": time, "case": what was timed}; the
first entry whose shape class agrees is taken. `python -m pallas_kernels.bench --tune` writes them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, NamedTuple

from pallas_kernels import _backend
from pallas_kernels.checks import bad_value
from pallas_kernels.device import current_device


class Launch(NamedTuple):
    """rows: query heads multiplied at once, tokens x group. keys: visited at once, where a kernel has the choice."""

    rows: int
    num_warps: int
    num_stages: int
    keys: int = 64


def checked(**parameters: int) -> Launch:
    """A Launch of `parameters`. Raises ValueError unless the sizes are powers of two and the counts in range."""
    names = set(Launch._fields)
    if not {"rows", "num_warps", "num_stages"} <= set(parameters) <= names:
        raise bad_value("launch", f"must name {sorted(names)}, keys at will", sorted(parameters), "Correct the entry.")
    launch = Launch(**parameters)
    for name in ("rows", "num_warps", "keys"):
        value = getattr(launch, name)
        if not _backend.is_power_of_two(value):
            raise bad_value(name, "must be a power of two", value, "Correct the entry.")
    for name, most in (("num_warps", 32), ("num_stages", 8)):
        if not 1 <= getattr(launch, name) <= most:
            raise bad_value(name, f"must be in [1, {most}]", getattr(launch, name), "Correct the entry.")
    return launch


def device_kind() -> str:
    """Name of the device that kernels are compiled for, as its file has it: "nvidia_h200"."""
    return current_device().kind.lower().replace(" ", "_")


@functools.cache
def _entries(kind: str) -> dict[str, list[dict[str, Any]]]:
    file = resources.files("pallas_kernels") / "tuned" / f"{kind}.json"
    return json.loads(file.read_text())["kernels"] if file.is_file() else {}


Choose = Callable[[str, Launch, dict[str, Any]], Launch]
_choose: contextvars.ContextVar[Choose | None] = contextvars.ContextVar("choose", default=None)


@contextlib.contextmanager
def chosen_by(choose: Choose) -> Iterator[None]:
    """Inside, launches are `choose(kernel, the launch otherwise taken, shape class)`: for tuning.

    Launches are settled while a function is traced, so only functions that are traced inside see the choice.
    """
    token = _choose.set(choose)
    try:
        yield
    finally:
        _choose.reset(token)


def launch_of(kernel: str, default: Launch, **shape: Any) -> Launch:
    """The measured launch for this shape class on this device, or `default`."""
    matching = (
        checked(**entry["launch"])
        for entry in _entries(device_kind()).get(kernel, [])
        if all(shape.get(name) == value for name, value in entry["match"].items())
    )
    launch, choose = next(matching, default), _choose.get()
    return launch if choose is None else choose(kernel, launch, shape)
