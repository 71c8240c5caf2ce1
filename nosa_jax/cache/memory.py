"""How much memory there is to put a cache into, read before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from jax._src import xla_bridge  # nothing public says whether JAX has a device yet

from pallas_kernels.checks import require_int
from pallas_kernels.device import current_device, default_device

_FREE = "free memory of the device"
_PINNED_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_LIMIT_DEFAULT_GIB = 64  # XLA's own default for pinned host memory; it counts in GiB whatever the name says


def set_host_memory_limit(gib: int) -> None:
    """How many GiB of pinned host memory JAX may take for all host stores of the process; 64 without it.

    Only on a GPU: elsewhere there is no such limit. Raises RuntimeError where JAX has a device already, whose limit
    cannot be changed any more, and ValueError for a limit below 1.
    """
    gib = require_int("gib", gib, 1)
    if has_device():
        raise RuntimeError(
            "set_host_memory_limit: must be called before JAX first uses a device, and it has used one; "
            "call it right after the imports."
        )
    os.environ[_PINNED_LIMIT_VARIABLE] = str(gib)


def has_device() -> bool:
    """Whether JAX has begun to use a device; asking does not make it begin."""
    return xla_bridge.backends_are_initialized()


class Limit(NamedTuple):
    """size: bytes. source: where the number comes from."""

    size: int
    source: str

    @property
    def is_free(self) -> bool:
        """Whether what is taken already has been subtracted."""
        return self.source == _FREE


def host_limit() -> Limit:
    """What a host store may take.

    On a GPU this is XLA's pool of pinned memory. Physical memory is not asked there: virtual machines grow theirs.
    """
    if current_device().is_gpu:
        limit = int(os.environ.get(_PINNED_LIMIT_VARIABLE, _PINNED_LIMIT_DEFAULT_GIB))
        remedy = f"nosa_jax.set_host_memory_limit, called first, or {_PINNED_LIMIT_VARIABLE} raises it"
        return Limit(limit * 2**30, f"XLA's pinned memory pool; {remedy}")
    return Limit(_physical_memory(), "the machine's memory")


def device_limit() -> Limit:
    """What is free on the default device, or the machine's memory where the device does not say."""
    stats = default_device().memory_stats()
    if stats and "bytes_limit" in stats:
        return Limit(stats["bytes_limit"] - stats.get("bytes_in_use", 0), _FREE)
    return Limit(_physical_memory(), "the machine's memory")


def _physical_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists():
        text = cgroup.read_text().strip()
        if text.isdigit():
            return min(total, int(text))
    return total
