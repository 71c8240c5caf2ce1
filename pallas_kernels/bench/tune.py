"""Which launch parameters are fastest: candidates around a kernel's own, timed in the whole op that runs the kernel."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import _tuning
from pallas_kernels._tuning import Launch
from pallas_kernels.bench.work import Work

PACKAGED = Path(_tuning.__file__).parent / "tuned"
# Kernels that choose how many keys they visit at once.
_KEYED = (
    "block_scores", "block_scores_normaliser", "rebuilt_attention",
    "block_attention_forward_dense", "block_attention_dq_dense", "block_attention_dkv_dense",
)  # fmt: skip
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


def neighbours(kernel: str, launch: Launch) -> list[Launch]:
    """`launch` first, then half or twice its rows (or keys), 4 or 8 warps, 1 to 3 stages: one change each."""
    around = lambda n: (max(1, n // 2), 2 * n)
    values = {"rows": around(launch.rows), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
    if kernel in _KEYED:
        values["keys"] = around(launch.keys)
    changed = [launch._replace(**{name: value}) for name, tried in values.items() for value in tried]
    return list(dict.fromkeys([launch, *changed]))


def search(
    kernel: str, current: Launch, works: list[Work], milliseconds: Callable[[Work, Callable[..., Any]], float]
) -> Iterator[tuple[Launch, float | Exception]]:
    """Tries the neighbours of the fastest launch so far until it has none that is faster, from `current` on.

    Yields the sum of the works' times under each, or why it does not run.
    """
    times: dict[Launch, float] = {}
    best, tried = current, set()
    while new := [launch for launch in neighbours(kernel, best) if launch not in tried]:
        tried.update(new)
        for launch, result in _try_out(kernel, new, works, milliseconds):
            if not isinstance(result, Exception):
                times[launch] = result
            yield launch, result
        best = min(times, key=times.__getitem__, default=current)


def _try_out(
    kernel: str, launches: list[Launch], works: list[Work], milliseconds: Callable[[Work, Callable[..., Any]], float]
) -> Iterator[tuple[Launch, float | Exception]]:
    """Compiles all at once, then times one by one."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = [_submitted(pool, kernel, launch, works) for launch in launches]
    for launch, compiled in zip(launches, programs, strict=True):
        try:
            result: float | Exception = sum(map(milliseconds, works, (program.result() for program in compiled)))
        except Exception as error:
            result = error
        yield launch, result


def _submitted(
    pool: concurrent.futures.Executor, kernel: str, launch: Launch, works: list[Work]
) -> list[concurrent.futures.Future[Any]]:
    """The work's compiled programs, or one exception for all of them."""
    try:
        return [pool.submit(_traced(kernel, launch, work).lower().compile) for work in works]
    except Exception as error:
        failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
        failed.set_exception(error)
        return [failed] * len(works)


def _traced(kernel: str, launch: Launch, work: Work) -> jax.stages.Traced:
    """The work with `launch` for this kernel."""
    used = False

    def choose(name: str, other: Launch, match: dict[str, Any]) -> Launch:
        nonlocal used
        used |= name == kernel
        return launch if name == kernel else other

    jax.clear_caches()  # launches are settled by tracing
    run = functools.partial(work.call, implementation=_IMPLEMENTATION)
    with _tuning.chosen_by(choose):
        traced = jax.jit(run, donate_argnames=work.updates).trace(**work.inputs)
    assert used, f"{kernel} was not traced again"
    return traced


def entry(match: dict[str, Any], cases: list[str], times: list[tuple[Launch, float | Exception]]) -> dict[str, Any]:
    """What the tuned file keeps of one kernel and shape class. ms: of the whole op, summed over the cases."""
    rounded = {launch: None if isinstance(ms, Exception) else round(ms, 4) for launch, ms in times}
    ran = [(ms, launch) for launch, ms in rounded.items() if ms is not None]
    best, launch = min(ran)
    return {
        "match": match,
        "launch": launch._asdict(),
        "ms": best,
        "case": " + ".join(cases),
        "candidates": [launch._asdict() | {"ms": ms} for launch, ms in rounded.items()],
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
