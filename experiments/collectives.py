"""What moves between devices, read from a compiled program's text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf" = (?P<type>.*?) (?P<kind>{_KINDS})(?:-start)?\((?P<operands>[^)]*)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: XLA's name. axes: of the mesh, joined by "+". arrays: what is whole of operands and results, dtype[shape].
    bytes: of that. times: per step. where: forward, backward or recomputed, in the layers or the loss's chunks, or the
    update. operation: JAX's name of the operation that it comes from."""

    kind: str
    axes: str
    arrays: str
    bytes: int
    times: int
    where: str
    operation: str


def collectives(text: str, axes: dict[str, int]) -> list[Collective]:
    """The collectives that a step does, equal ones counted together.

    text: `compiled.as_text()`.
    axes: sizes of the mesh, in the order of its devices.
    """
    bodies, entry = _computations(text)
    counts: Counter[Collective] = Counter()
    for name, times in _times(bodies, entry).items():
        types = dict(re.findall(r"%([\w.-]+) = (\([^=]*?\)|\S+) [\w-]+\(", "\n".join(bodies[name])))
        for line in bodies[name]:
            if found := _OPERATION.search(line):
                counts[_collective(line, found, types, axes)] += times
    return [dataclasses.replace(one, times=times) for one, times in counts.items()]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the one that runs first."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if begin := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = begin[2]
            bodies[current] = []
            entry = current if begin[1] else entry
        elif line.startswith("  ") and current:
            bodies[current].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for role, called in re.findall(
                r"\b(body|calls|called_computations|branch_computations)=\{?%([\w.-]+)", line
            ):
                visit(called, count * (int(trips[1]) if trips and role == "body" else 1))

    visit(entry, 1)
    return times


def _collective(line: str, found: re.Match[str], types: dict[str, str], axes: dict[str, int]) -> Collective:
    operands = [types.get(name, "") for name in re.findall(r"%([\w.-]+)", found["operands"])]
    given = _arrays(" ".join(operands))
    made = _arrays(found["type"])
    if f"{found['kind']}-start(" in line and len(made) == 2 * len(given):  # the type of a start has the operands, too
        made = made[len(given) :]
    whole = max(given, made, key=lambda arrays: sum(map(_bytes, arrays)))
    operation = re.search(r'op_name="([^"]*)"', line)
    name = operation[1] if operation else ""
    return Collective(
        found["kind"], _axes(line, axes), " ".join(f"{dtype}[{shape}]" for dtype, shape in whole),
        sum(map(_bytes, whole)), 1, _where(name), name,
    )  # fmt: skip


def _arrays(types: str) -> list[tuple[str, str]]:
    return [(dtype, shape) for dtype, shape in _ARRAY.findall(types) if dtype == "pred" or _BITS.search(dtype)]


def _bytes(array: tuple[str, str]) -> int:
    dtype, shape = array
    bits = _BITS.search(dtype)
    width = max(int(bits[0]) // 8, 1) if bits else 1
    return width * math.prod(int(size) for size in shape.split(",") if size)


def _where(name: str) -> str:
    if "jvp" not in name:
        return "update" if name else "unnamed"
    passed = "recomputed" if "rematted" in name else "backward" if "transpose(jvp" in name else "forward"
    if re.search(r"jvp\(\)\)?/while/body", name):
        return f"{passed}, layers"
    return f"{passed}, chunks of the loss" if "/while/body" in name else passed


def _axes(line: str, axes: dict[str, int]) -> str:
    """The axes along which devices of the first group differ."""
    places = np.array(np.unravel_index(_first_group(line), tuple(axes.values())))
    return "+".join(name for name, row in zip(axes, places, strict=True) if len(set(row.tolist())) > 1)


def _first_group(line: str) -> list[int]:
    """Device numbers, from any of the ways in which XLA writes groups."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(number) for number in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [[int(size) for size in part.split(",")] if part else None for part in iota.groups()]
        groups, shape, order = sizes
        assert groups and shape
        numbers = np.arange(math.prod(shape)).reshape(shape)
        found: list[int] = numbers.transpose(order).reshape(groups)[0].tolist()
        return found
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?[^{]*?)? ?\{([^}]*)\}", line)
    assert named, line[:300]
    mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    inside = re.findall(r"'(\w+)'", named[2])
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    picked: list[int] = numbers[tuple(slice(None) if name in inside else 0 for name in mesh)].reshape(-1).tolist()
    return picked
