"""Where the device's time goes, read from a profile of JAX."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import jax


def kernel_times(directory: str) -> dict[str, float]:
    """Device time in milliseconds by kernel name."""
    times: dict[str, float] = defaultdict(float)
    for file in Path(directory).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        times[event.name] += event.duration_ns / 1e6
    return dict(times)
