"""The optional extras and the modules that each of them brings."""

from __future__ import annotations

import importlib.util

EXTRAS = {
    "cuda13": ("jax_cuda13_plugin",),
    "hf": ("safetensors", "tokenizers"),
    "train": ("grain", "tqdm"),
    "plots": ("matplotlib",),
    "cli": ("tyro",),
}


def missing_modules(extra: str) -> list[str]:
    """Modules of `extra` that are not installed."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]


def require(*extras: str) -> None:
    """Raises ImportError, before any work is done, that says what to install."""
    missing = [extra for extra in extras if missing_modules(extra)]
    if missing:
        modules = ", ".join(module for extra in missing for module in missing_modules(extra))
        raise ImportError(f'this command needs {modules}: pip install "nosa-jax[{",".join(missing)}]"')
