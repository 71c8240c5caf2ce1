"""What a result was measured on."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from nosa_jax.environment import versions
from pallas_kernels.device import current_device


def environment() -> dict[str, Any]:
    """Device, versions and commit; "+changes" where the checkout had uncommitted ones."""
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    found = versions()
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": current_device().kind,
        "devices": jax.local_device_count(),
        **{package: found[package] for package in ("python", "jax", "jaxlib")},
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }


def gpu_arguments(parser: argparse.ArgumentParser, *, tiny: bool = False) -> argparse.Namespace:
    """The parsed command line with `--output`. Ends the program, before any work, where there is no GPU.

    tiny: there is `--tiny` too, with which a CPU will do, and counts as eight.
    """
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    if tiny:
        parser.add_argument("--tiny", action="store_true", help="small shapes, to see on a CPU that it works")
    args = parser.parse_args()
    if tiny and args.tiny:
        jax.config.update("jax_num_cpu_devices", 8)
    elif not current_device().is_gpu:
        parser.error(f"it needs an NVIDIA GPU, the default device is {current_device().kind!r}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    return args


def save(output: Path | None, **result: Any) -> None:
    """Writes the result with its environment, where an output was asked for."""
    if output:
        output.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
