"""The command line: progress on stderr, the table and then one line of JSON on stdout."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import IMPLEMENTATIONS, KernelUnsupportedError, _tuning
from pallas_kernels.bench import compare, peers, report, timing, tune
from pallas_kernels.bench.work import BENCHMARKS, Work
from pallas_kernels.device import current_device

_PEER_OPS = {"block_attention": False, "block_attention_grad": True}  # op: with the backward pass


class Item(NamedTuple):
    op: str
    case: str


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Time every op.")
    parser.add_argument("--ops", nargs="+", default=["*"], metavar="OP", help="names or patterns; default: all")
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help="names or patterns; default: real ones on a GPU, else small ones"
    )
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help=f"of {', '.join(IMPLEMENTATIONS)}; default: all"
    )
    parser.add_argument("--repeats", type=int, default=20, help="samples per measurement (default 20)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the line of JSON to this file")
    parser.add_argument("--list", action="store_true", help="list ops, implementations and cases, and stop")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="time cuDNN and FLA too (default on a GPU)"
    )
    parser.add_argument("--tune", action="store_true", help="try launch parameters instead, and keep the best")
    parser.add_argument(
        "--tuned-folder", type=Path, default=tune.PACKAGED, metavar="FOLDER", help="where --tune writes (the package)"
    )
    return parser


def matching(flag: str, patterns: Sequence[str], valid: Sequence[str]) -> list[str]:
    """The valid names that any pattern matches, in their own order. Raises ValueError for a pattern without any."""
    for pattern in patterns:
        if not fnmatch.filter(valid, pattern):
            raise ValueError(f"{flag}: no match for {pattern!r}. Valid: {', '.join(valid)}")
    return [name for name in valid if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def plan(ops: Sequence[str], cases: Sequence[str] | None) -> list[Item]:
    """What to run, ops that share their inputs together. Raises ValueError for unknown names."""
    names = matching("--ops", ops, list(BENCHMARKS))
    if cases is None:
        size = "REAL" if current_device().is_gpu else "SMALL"
        items = [Item(op, case) for op in names for case in getattr(BENCHMARKS[op].source, size)]
    else:
        chosen = matching("--cases", cases, list(dict.fromkeys(case for op in names for case in BENCHMARKS[op].cases)))
        items = [Item(op, case) for op in names for case in BENCHMARKS[op].cases if case in chosen]
    order = {
        (BENCHMARKS[item.op].source.__name__, item.case): number for number, item in reversed(list(enumerate(items)))
    }
    return sorted(items, key=lambda item: order[BENCHMARKS[item.op].source.__name__, item.case])


def listing() -> str:
    lines = []
    for name, benchmark in BENCHMARKS.items():
        lines.append(f"{name}  ({', '.join(benchmark.op.implementations)})")
        lines += [f"  {size.lower()}: {', '.join(getattr(benchmark.source, size))}" for size in ("SMALL", "REAL")]
    return "\n".join(lines)


def time_work(work: Work, implementation: str, repeats: int) -> dict[str, Any]:
    """Compiles, compares and times one implementation. Raises whatever goes wrong."""
    run = jax.jit(functools.partial(work.call, implementation=implementation), donate_argnames=work.updates)
    checked = work.checked or work.inputs
    start = time.perf_counter()
    output = jax.block_until_ready(run(**(timing.copies(checked, 1)[0] if work.updates else checked)))
    compile_seconds = time.perf_counter() - start
    require_same_memory(work, output)
    error = None if work.expected is None else compare.error(work.comparable(output), work.expected)
    del output
    sets = timing.copies(work.inputs, timing.num_copies(work.inputs, work.floor.bytes + work.floor.link_bytes))
    result = timing.measure(timing.sampler(run, sets, work.updates, work.updated), repeats)
    compared = {} if error is None else {"compared": work.compared}
    return report.measured(result, work.floor) | {"error": error, "compile_seconds": compile_seconds} | compared


def require_same_memory(work: Work, output: Any) -> None:
    """Raises RuntimeError where an array that is updated in place comes back in another memory."""
    if not work.updates:
        return
    kinds = lambda arrays: [x.sharding.memory_kind for x in jax.tree.leaves(arrays)]
    for name, x in zip(work.updates, work.updated(output), strict=True):
        before, after = kinds(work.inputs[name]), kinds(x)
        if before != after:
            raise RuntimeError(f"{name} went in as {before[0]} and came back as {after[0]}")


def time_fla(inputs: dict[str, Any], block_size: int, gradient: bool, repeats: int) -> dict[str, Any]:
    touched = sum(inputs[name].nbytes for name in ("q", "k", "v"))
    copies = timing.num_copies([inputs[name] for name in ("q", "k", "v")], touched)
    work = peers.fla_nsa(inputs, block_size=block_size, gradient=gradient, copies=copies)
    assert work.truth.expected is not None
    error = compare.error(work.comparable(), work.truth.expected)
    result = timing.measure(work.sample, repeats)
    return report.measured(result, work.floor) | {"error": error, "compared": work.truth.compared}


def time_peer(name: str, inputs: dict[str, Any], block_size: int, gradient: bool, repeats: int) -> dict[str, Any]:
    inputs = {key: x for key, x in inputs.items() if key != "dout"}
    if name == peers.FLA:
        return time_fla(inputs, block_size, gradient, repeats)
    return time_work(peers.cudnn(inputs, gradient=gradient), name, repeats)


def attempt(identity: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The entry of a measurement, also where there is none to be had."""
    try:
        entry = identity | measure()
    except KernelUnsupportedError as error:
        entry = identity | report.not_measured(error, "unsupported")
    except Exception as error:  # the others go on
        entry = identity | report.not_measured(error, "failed")
    note("  ".join(report.cells(entry)))
    return entry


def bench(items: Sequence[Item], implementations: Sequence[str] | None, repeats: int, with_peers: bool) -> list[Any]:
    """One entry per item and implementation, and per peer of an item; one alone for what takes no case here."""
    entries: list[dict[str, Any]] = []
    runnable: dict[str, list[str]] = {}
    for op in dict.fromkeys(item.op for item in items):
        peers_of_op = peers.NAMES if with_peers and op in _PEER_OPS else ()
        reasons = peers.missing() if peers_of_op else {}
        for name in implementations or BENCHMARKS[op].op.implementations:
            reasons |= {name: reason} if (reason := BENCHMARKS[op].op.unavailable(name)) else {}
        names = [*(implementations or BENCHMARKS[op].op.implementations), *peers_of_op]
        runnable[op] = [name for name in names if name not in reasons]
        for name in names:
            if name in reasons:
                failure = functools.partial(_raise, KernelUnsupportedError(reasons[name]))
                entries.append(attempt({"op": op, "case": "-", "implementation": name}, failure))

    for op, case_name in items:
        if not runnable[op]:
            continue
        note(f"{op} {case_name}: making inputs")
        case, identity = BENCHMARKS[op].cases[case_name], {"op": op, "case": case_name}
        try:
            work = BENCHMARKS[op].work(case)
        except Exception as error:
            entries.append(attempt(identity | {"implementation": "-"}, functools.partial(_raise, error)))
            continue
        identity |= report.shapes(work.inputs)
        for name in runnable[op]:
            run = functools.partial(time_work, work, name, repeats)
            if name in peers.NAMES:
                run = functools.partial(time_peer, name, work.inputs, case.rows.block_size, _PEER_OPS[op], repeats)
            entries.append(attempt(identity | {"implementation": name}, run))
    return entries


def _raise(error: Exception) -> Any:
    raise error


def tune_kernels(items: Sequence[Item], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Tunes each kernel in the first op that runs it, over all cases of one shape class together."""
    device, results, done = _tuning.device_kind(), [], set()
    for op in dict.fromkeys(item.op for item in items):
        works: dict[str, Work] = {}
        classes: dict[tuple[str, str], list[str]] = {}
        for case in [item.case for item in items if item.op == op]:
            note(f"{op} {case}: making inputs")
            work = BENCHMARKS[op].work(BENCHMARKS[op].cases[case])
            try:
                asked = tune.asked(work)
            except KernelUnsupportedError as error:
                note(f"{op}  {case}  unsupported: {error}")
                continue
            works[case] = work
            for kernel, (_, match) in asked.items():
                classes.setdefault((kernel, repr(sorted(match.items()))), []).append(case)
        for (kernel, shape), cases in classes.items():
            if (kernel, shape) in done:
                continue
            done.add((kernel, shape))
            current, match = tune.asked(works[cases[0]])[kernel]
            times = []
            milliseconds = lambda work, run: _milliseconds(work, run, repeats)
            chosen = [works[case] for case in cases]
            for launch, ms in tune.search(kernel, current, chosen, milliseconds):
                times.append((launch, ms))
                text = str(ms).strip().split("\n")[0][:100] if isinstance(ms, Exception) else f"{ms:.4g} ms"
                note(f"{kernel}  {match}  {tuple(launch)}  {text}")
            if all(isinstance(ms, Exception) for _, ms in times):
                note(f"{kernel}: no candidate runs")
                continue
            best = tune.entry(match, cases, times)
            file = tune.write(folder, device, kernel, best)
            note(f"{kernel}: {best['launch']}, {best['ms']:.4g} ms, written to {file}")
            results.append({"op": op, "kernel": kernel, "was": current._asdict()} | best)
    return results


def _milliseconds(work: Work, run: Callable[..., Any], repeats: int) -> float:
    sets = timing.copies(work.inputs, timing.num_copies(work.inputs, work.floor.bytes + work.floor.link_bytes))
    return timing.measure(timing.sampler(run, sets, work.updates, work.updated), repeats).median


def tuned_table(results: list[dict[str, Any]]) -> str:
    """Every candidate, the fastest of its kernel first."""
    lines = [f"{'kernel':<28}{'rows':>6}{'warps':>6}{'stages':>7}{'keys':>6}  {'ms':>9}  cases"]
    for result in results:
        failed = [c for c in result["candidates"] if c["ms"] is None]
        for c in sorted((c for c in result["candidates"] if c["ms"] is not None), key=lambda c: c["ms"]) + failed:
            ms = "-" if c["ms"] is None else f"{c['ms']:.4g}"
            sizes = f"{c['rows']:>6}{c['num_warps']:>6}{c['num_stages']:>7}{c['keys']:>6}"
            lines.append(f"{result['kernel']:<28}{sizes}  {ms:>9}  {result['op']} {result['case']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything failed; what is not supported has not failed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory too
    flags = parser()
    options = flags.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        if options.repeats < 1:
            raise ValueError(f"--repeats: must be at least 1, got {options.repeats}")
        if options.implementations is not None:
            options.implementations = matching("--implementations", options.implementations, IMPLEMENTATIONS)
        items = plan(options.ops, options.cases)
    except ValueError as error:
        flags.error(str(error))
    result: dict[str, Any] = {"environment": report.environment(), "repeats": options.repeats}
    if options.tune:
        result["tuned"] = tune_kernels(items, options.repeats, options.tuned_folder)
        print(tuned_table(result["tuned"]))
        failed = False
    else:
        result["environment"]["peers"] = peers.versions() if options.peers else {}
        result["entries"] = bench(items, options.implementations, options.repeats, options.peers)
        print(report.table(result["entries"]))
        failed = any(entry["status"] == "failed" for entry in result["entries"])
    line = report.as_json(result)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
