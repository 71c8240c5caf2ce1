"""The optional extras of the package, what each is for and the modules that it brings."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple


class Extra(NamedTuple):
    """purpose: what the extra is for, in words. modules: what it brings, as one imports them."""

    purpose: str
    modules: tuple[str, ...]


EXTRAS = {
    "cuda13": Extra("NVIDIA GPUs", ("jax_cuda13_plugin",)),
    "hf": Extra("checkpoints and tokenizers", ("safetensors", "tokenizers")),
    "train": Extra("training", ("grain", "tqdm", "jinja2")),
    "plots": Extra("figures", ("matplotlib",)),
    "pandas": Extra("data frames", ("pandas",)),
    "tensorboard": Extra("logs for TensorBoard", ("tensorboardX",)),
    "wandb": Extra("logs at Weights & Biases", ("wandb",)),
    "cli": Extra("the command line", ("tyro",)),
    "evals": Extra("evaluation with lm-eval and data frames", ("lm_eval", "pandas")),
}


def import_extra(module: str) -> ModuleType:
    """Imports a module of an extra, or one inside it. Raises ImportError that says what to install.

    What an installation that is there but broken raises is passed on: installing it again as said would not mend it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        name, extra = next((name, extra) for name, extra in EXTRAS.items() if package in extra.modules)
        raise ImportError(f"{package} is needed for {extra.purpose}: {_command(name)}") from error


def require_extras(*names: str) -> None:
    """Raises ImportError, before any work is done, unless these extras are installed; it says what to install."""
    missing = {name: missing_modules(name) for name in names if missing_modules(name)}
    if missing:
        modules = ", ".join(module for found in missing.values() for module in found)
        raise ImportError(f"this command needs {modules}: {_command(*missing)}")


def missing_modules(name: str) -> list[str]:
    """The modules of the extra `name` that are not installed."""
    return [module for module in EXTRAS[name].modules if importlib.util.find_spec(module) is None]


def status(name: str) -> str:
    """Whether the extra `name` is installed; where it is not, what is missing and how to install it."""
    missing = missing_modules(name)
    return f"missing {', '.join(missing)}: {_command(name)}" if missing else "installed"


def _command(*names: str) -> str:
    extras = ",".join(names)
    return f'pip install "nosa-jax[{extras}]", or pip install ".[{extras}]" in a checkout'
