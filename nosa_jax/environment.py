"""What a result was made with: versions and devices."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """{"versions": of Python and of each of PACKAGES, None where it is not installed; "devices": kinds of devices}."""
    devices = sorted({device.device_kind for device in jax.devices()})
    return {"versions": versions(), "devices": devices}


def versions() -> dict[str, str | None]:
    """The versions of Python and of each of PACKAGES, None where it is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
