"""Which implementation of an op runs: `implementation=` "auto", "xla", "triton" or "mosaic".

A named implementation never falls back: where it cannot run, KernelUnsupportedError says why. "auto" takes the first of
PREFERENCE that can, and warns once per op when that is the slow path on a GPU.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels._checks import bad_value

PREFERENCE = ("mosaic", "triton", "xla")


class KernelUnsupportedError(NotImplementedError):
    """The named implementation cannot run here; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An op's name and its implementations, all of one signature."""

    name: str
    implementations: Mapping[str, Callable[..., Any]]

    def pick(self, implementation: str) -> Callable[..., Any]:
        """The function for `implementation`. Raises ValueError or KernelUnsupportedError."""
        if implementation == "auto":
            chosen = next(name for name in PREFERENCE if name in self.implementations)
            if chosen == "xla" and jax.default_backend() == "gpu":
                _warn_slow_path(self.name)
            return self.implementations[chosen]
        if implementation not in PREFERENCE:
            raise bad_value(
                "implementation", f"must be 'auto' or one of {PREFERENCE}", repr(implementation), "Pick one."
            )
        if implementation not in self.implementations:
            raise KernelUnsupportedError(f"{self.name}: {self.reason(implementation)}")
        return self.implementations[implementation]

    def reason(self, implementation: str) -> str:
        """Why `implementation` is not taken, or "available"."""
        if implementation in self.implementations:
            return "available"
        return f"no {implementation!r} kernel has been written for this op; use implementation='xla'"


_warned: set[str] = set()


def _warn_slow_path(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name}: no GPU kernel, running the XLA implementation", RuntimeWarning, stacklevel=4)
