"""What a result was measured on."""

from __future__ import annotations

import argparse
import json
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


def gpu_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line with `--output`. Ends the program, before any work, where there is no GPU."""
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"it needs an NVIDIA GPU, the default device is {jax.default_backend()!r}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    return args


def save(output: Path | None, **result: Any) -> None:
    """Writes the result with its environment, where an output was asked for."""
    if output:
        output.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
