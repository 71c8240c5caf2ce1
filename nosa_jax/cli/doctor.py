"""`nosa doctor`: what is installed, what JAX sees, and which kernels will run."""

from __future__ import annotations

import dataclasses

import jax

import nosa_jax
from nosa_jax import _extras
from nosa_jax.cache import memory
from nosa_jax.cli.terminal import facts, heading, show, size
from nosa_jax.environment import versions
from pallas_kernels import IMPLEMENTATIONS, OPS, Op

_AVAILABLE = "available"


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show versions, devices, memory, the kernel that each operation will use and why, and optional extras."""

    def run(self) -> int:
        heading("Versions")
        found = {"nosa-jax": nosa_jax.__version__, **versions()}
        facts((package, version or "not installed") for package, version in found.items())
        heading("Devices and memory")
        for device in jax.local_devices():
            kinds = ", ".join(sorted(kind.kind for kind in device.addressable_memories()))
            facts([(f"{device.platform}:{device.id}", f"{device.device_kind}; memory kinds: {kinds}")])
        limits = (("device memory", memory.device_limit()), ("host memory", memory.host_limit()))
        facts((name, f"{size(limit)} ({source})") for name, (limit, source) in limits)
        heading('Kernels (implementation="auto")')
        show(kernel_table())
        heading("Extras")
        facts((name, _extras.status(name)) for name in _extras.EXTRAS)
        return 0


def kernel_table() -> str:
    """One line per op: what "auto" tries, in this order, and for the other implementations a note that says why not."""
    notes: dict[str, int] = {}
    lines = [f"  {'operation':<20}{'auto tries':<30}" + "".join(f"{name:<11}" for name in IMPLEMENTATIONS)]
    for op in OPS.values():
        cells = [_cell(op, name, notes) for name in IMPLEMENTATIONS]
        tried = ", ".join(name for name in IMPLEMENTATIONS if op.unavailable(name) is None)
        lines.append(f"  {op.name:<20}{tried:<30}" + "".join(f"{cell:<11}" for cell in cells))
    return "\n".join([*(line.rstrip() for line in lines), *(f"  [{n}] {text}" for text, n in notes.items())])


def _cell(op: Op, implementation: str, notes: dict[str, int]) -> str:
    reason = op.unavailable(implementation)
    return _AVAILABLE if reason is None else f"[{notes.setdefault(reason, len(notes) + 1)}]"
