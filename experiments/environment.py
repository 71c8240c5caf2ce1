"""What a result was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib


def environment() -> dict[str, Any]:
    """Device, versions and commit; "+changes" where the checkout had uncommitted ones."""
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }
