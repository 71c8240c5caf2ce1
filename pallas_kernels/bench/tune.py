"""Which launch parameters are fastest: candidates around a kernel's own, timed in the whole op that runs the kernel."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import _tuning
from pallas_kernels._tuning import Launch
from pallas_kernels.bench.work import Work

PACKAGED = Path(_tuning.__file__).parent / "tuned"
_KEYED = ("block_scores", "block_scores_normaliser")  # kernels that choose how many keys they visit at once
_IMPLEMENTATION = "triton"


class Asked(NamedTuple):
    """A kernel's launch in some function, and the shape class it stands for."""

    launch: Launch
    match: dict[str, Any]


def asked(work: Work) -> dict[str, Asked]:
    """What the kernels of this work ask for. Raises KernelUnsupportedError where it does not take them."""
    found: dict[str, Asked] = {}

    def record(kernel: str, launch: Launch, match: dict[str, Any]) -> Launch:
        found[kernel] = Asked(launch, match)
        return launch

    with _tuning.chosen_by(record):
        jax.eval_shape(functools.partial(work.call, implementation=_IMPLEMENTATION), **work.inputs)
    return found


def candidates(kernel: str, current: Launch) -> list[Launch]:
    """`current` first, then half, as many and twice the rows (and keys), 4 or 8 warps, 1 to 3 stages."""
    around = lambda n: (n, max(1, n // 2), 2 * n)
    keys = around(current.keys) if kernel in _KEYED else (current.keys,)
    grid = itertools.product(around(current.rows), (4, 8), (1, 2, 3), keys)
    return list(dict.fromkeys([current, *(Launch(*parameters) for parameters in grid)]))


def try_out(
    kernel: str, launches: list[Launch], works: list[Work], milliseconds: Callable[[Work], float]
) -> Iterator[tuple[Launch, float | Exception]]:
    """The sum of the works' times under each launch, or why it does not run."""
    for launch in launches:
        yield launch, _try_one(kernel, launch, works, milliseconds)


def _try_one(
    kernel: str, launch: Launch, works: list[Work], milliseconds: Callable[[Work], float]
) -> float | Exception:
    used = False

    def choose(name: str, other: Launch, match: dict[str, Any]) -> Launch:
        nonlocal used
        used |= name == kernel
        return launch if name == kernel else other

    jax.clear_caches()  # launches are settled by tracing
    try:
        with _tuning.chosen_by(choose):
            total = sum(milliseconds(work) for work in works)
    except Exception as error:
        return error
    assert used, f"{kernel} was not traced again"
    return total


def entry(match: dict[str, Any], cases: list[str], times: list[tuple[Launch, float | Exception]]) -> dict[str, Any]:
    """What the tuned file keeps of one kernel and shape class. ms: of the whole op, summed over the cases."""
    ran = [(ms, launch) for launch, ms in times if not isinstance(ms, Exception)]
    best, launch = min(ran)
    return {
        "match": match,
        "launch": launch._asdict(),
        "ms": best,
        "case": " + ".join(cases),
        "candidates": [launch._asdict() | {"ms": None if isinstance(ms, Exception) else ms} for launch, ms in times],
    }


def merged(table: dict[str, Any], device: str, kernel: str, new: dict[str, Any]) -> dict[str, Any]:
    """`table` with `new` in the place of the kernel's entry of the same shape class; the others stay."""
    kernels = table.get("kernels", {})
    others = [old for old in kernels.get(kernel, []) if old["match"] != new["match"]]
    return {"device": device, "jax": jax.__version__, "kernels": kernels | {kernel: [*others, new]}}


def write(folder: Path, device: str, kernel: str, new: dict[str, Any]) -> Path:
    """Merges `new` into the device's file in `folder`, which starts as a copy of the packaged one."""
    file = folder / f"{device}.json"
    base = next((f for f in (file, PACKAGED / file.name) if f.is_file()), None)
    table = json.loads(base.read_text()) if base else {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(merged(table, device, kernel, new), indent=1) + "\n")
    _tuning._entries.cache_clear()
    return file
