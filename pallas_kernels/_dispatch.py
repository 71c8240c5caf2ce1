"""Which implementation of an op runs, and the registry of all ops.

`implementation=` is "auto" or one of IMPLEMENTATIONS. A named one never falls back: where it cannot run,
KernelUnsupportedError says why. "auto" takes the first of IMPLEMENTATIONS that can, and warns once per op when one that
has kernels cannot use them on a GPU.
"""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import _backend, varying
from pallas_kernels.checks import bad_value
from pallas_kernels.device import current_device
from pallas_kernels.promotion import usual_promotion

IMPLEMENTATIONS = ("cudnn", "mosaic", "triton", "xla")


class KernelUnsupportedError(NotImplementedError):
    """The named implementation cannot run here; the message gives the reason."""


# Why an implementation cannot run on this machine; None where it can.
_UNAVAILABLE: Mapping[str, Callable[[], str | None]] = {
    "cudnn": _backend.cudnn_unavailable,
    "mosaic": _backend.mosaic_unavailable,
    "triton": _backend.triton_unavailable,
    "xla": lambda: None,
}


@dataclasses.dataclass(frozen=True)
class Op:
    """An op's name, its implementations, all of one signature, and why one cannot take some arguments.

    unsupported: per implementation, a function of the same arguments that gives the reason, or None where it can run.
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    unsupported: Mapping[str, Callable[..., str | None]] = dataclasses.field(default_factory=dict)

    @usual_promotion
    def __call__(self, implementation: str, *args: Any, **kwargs: Any) -> Any:
        """Runs `implementation` on the arguments. Raises ValueError or KernelUnsupportedError.

        Inside `jax.shard_map` all arrays are made to vary over the axes that any of them does, so that implementations
        need no word about it but for what they make from nothing.
        """
        args = varying.alike(args)
        return self.implementations[self.pick(implementation, *args, **kwargs)](*args, **kwargs)

    def pick(self, implementation: str, *args: Any, **kwargs: Any) -> str:
        """The name of the implementation that takes these arguments."""
        if implementation == "auto":
            chosen = next(name for name in IMPLEMENTATIONS if self.reason(name, *args, **kwargs) is None)
            if chosen == "xla" and len(self.implementations) > 1 and current_device().is_gpu:
                others = (name for name in IMPLEMENTATIONS if name in self.implementations and name != "xla")
                reasons = (f"{name}: {self.reason(name, *args, **kwargs)}" for name in others)
                _warn_slow_path(self.name, "; ".join(reasons))
            return chosen
        if implementation not in IMPLEMENTATIONS:
            raise bad_value(
                "implementation", f"must be 'auto' or one of {IMPLEMENTATIONS}", repr(implementation), "Pick one."
            )
        reason = self.reason(implementation, *args, **kwargs)
        if reason is not None:
            raise KernelUnsupportedError(
                f"{self.name}: implementation={implementation!r} cannot run: {reason}; use 'auto' or 'xla'"
            )
        return implementation

    def reason(self, implementation: str, *args: Any, **kwargs: Any) -> str | None:
        """Why `implementation` does not take these arguments; None where it does."""
        check = self.unsupported.get(implementation)
        return self.unavailable(implementation) or (None if check is None else check(*args, **kwargs))

    def unavailable(self, implementation: str) -> str | None:
        """Why `implementation` takes no arguments at all on this machine; None where it takes some."""
        if implementation not in self.implementations:
            return f"no {implementation!r} kernel has been written for this op"
        return _UNAVAILABLE[implementation]()


_registered: dict[str, Op] = {}
OPS: Mapping[str, Op] = types.MappingProxyType(_registered)  # every op by its name


def register(
    name: str,
    implementations: Mapping[str, Callable[..., Any]],
    unsupported: Mapping[str, Callable[..., str | None]] | None = None,
) -> Op:
    """A new Op, which OPS has from now on."""
    assert name not in _registered, f"two ops are called {name}"
    _registered[name] = Op(name, implementations, unsupported or {})
    return _registered[name]


_warned: set[str] = set()


def _warn_slow_path(name: str, reasons: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name}: no GPU kernel takes this call ({reasons}), running the XLA implementation",
            RuntimeWarning,
            skip_file_prefixes=(str(Path(__file__).parent),),  # it is about the line that calls the op
        )
