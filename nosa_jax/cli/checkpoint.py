"""The model of a checkpoint folder, as the subcommands load it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nosa_jax import NosaLM, from_pretrained
from nosa_jax.cli.terminal import working
from nosa_jax.config import Variant
from pallas_kernels.device import current_device

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load(path: Path, variant: Variant | None, dtype: Dtype) -> NosaLM:
    """The model of a folder; dtype "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if current_device().platform == "cpu" else "bfloat16"
    with working(f"loading {path}"):
        return from_pretrained(path, dtype=dtype, variant=variant)
