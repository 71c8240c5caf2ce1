"""How much memory there is to put a cache into, read before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_PINNED_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_LIMIT_DEFAULT_GB = 64  # XLA's own default for pinned host memory


def host_limit() -> tuple[int, str]:
    """Bytes that a host store may take, and where the number comes from.

    On a GPU this is XLA's pool of pinned memory. Physical memory is not asked there: virtual machines grow theirs.
    """
    if jax.default_backend() == "gpu":
        limit = int(os.environ.get(_PINNED_LIMIT_VARIABLE, _PINNED_LIMIT_DEFAULT_GB))
        return limit * 10**9, f"XLA's pinned memory pool; set {_PINNED_LIMIT_VARIABLE} before JAX starts to raise it"
    return _physical_memory(), "the machine's memory"


def device_limit() -> tuple[int, str]:
    """Bytes that are free on the default device, and where the number comes from."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "free memory of the device"
    return _physical_memory(), "the machine's memory"


def _physical_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists():
        text = cgroup.read_text().strip()
        if text.isdigit():
            return min(total, int(text))
    return total
