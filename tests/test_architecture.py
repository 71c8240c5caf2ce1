"""Imports go one way only, and `import nosa_jax` asks for nothing but the core dependencies."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pallas_kernels

ROOT = Path(__file__).parents[1]
TOPS = ("pallas_kernels", "nosa_jax", "experiments")

# From the bottom up: a module may import its own floor and those below it.
FLOORS: list[set[str]] = [
    {"pallas_kernels"},
    {"nosa_jax._extras", "nosa_jax._json", "nosa_jax._paths", "nosa_jax._pytree"},
    {"nosa_jax._drawing", "nosa_jax._figure"},
    {"nosa_jax.config", "nosa_jax.environment", "nosa_jax.origin", "nosa_jax.policy", "nosa_jax.presets"},
    {"nosa_jax.processes"},
    {"nosa_jax.parallel"},
    {"nosa_jax.attention", "nosa_jax.rope"},
    {"nosa_jax.baselines"},
    {"nosa_jax.convert", "nosa_jax.model"},
    {"nosa_jax.cache"},
    {f"nosa_jax.decode.{name}" for name in ("checks", "program", "sampling", "step", "widths")},
    {"nosa_jax.decode.prompt", "nosa_jax.decode.reading"},
    {"nosa_jax.decode"},  # generation, and the door
    {"nosa_jax.hf", "nosa_jax.locality"},
    {"nosa_jax.train"},
    {"nosa_jax.evals"},
    {"nosa_jax", "nosa_jax.ops", "nosa_jax.plots"},  # what users import
    {"nosa_jax.__main__", "nosa_jax.cli"},
    {"experiments"},
]
IMPLEMENTATION_MODULES = {*pallas_kernels.IMPLEMENTATIONS, "reference", "vjp"}
KERNEL_DEPENDENCIES = {"jax", "jaxlib", "jaxtyping", "numpy", "pallas_kernels"}
BACKEND_MODULE = "pallas_kernels._backend"
BACKENDS = (*(f"jax.experimental.pallas.{name}" for name in ("triton", "mosaic_gpu", "tpu")), "jax._src.pallas")
OPTIONAL = (
    "tyro",
    "grain",
    "tqdm",
    "matplotlib",
    "pandas",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "tensorboardX",
    "wandb",
    "jinja2",
    "lm_eval",
    "pandas",
)


def modules() -> dict[str, Path]:
    files = [file for top in TOPS for file in (ROOT / top).rglob("*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def floor(module: str) -> int | None:
    """The floor of `module` or of the closest package around it; only the package `nosa_jax` itself is the facade."""
    for length in range(module.count(".") + 1, 0, -1):
        prefix = ".".join(module.split(".")[:length])
        if prefix == "nosa_jax" and prefix != module:
            return None
        for number, names in enumerate(FLOORS):
            if prefix in names:
                return number
    return None


@functools.cache
def imported_names(module: str) -> tuple[str, ...]:
    """Dotted names of everything that the file of `module` imports, anywhere in it: modules and what is inside them."""
    names: list[str] = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(names)


def imports(module: str) -> Iterator[str]:
    """Dotted names of the modules that the file of `module` imports."""
    for name in imported_names(module):
        # `from package import thing` names a module or something inside the package.
        while name.startswith(TOPS) and name not in MODULES:
            name = name.rpartition(".")[0]
        yield name


def goes_past_the_doors(name: str) -> bool:
    """Whether an imported name is private to `pallas_kernels`: an underscore, or the module of an implementation."""
    top, *parts = name.split(".")
    private = lambda part: part in IMPLEMENTATION_MODULES or (part.startswith("_") and not part.startswith("__"))
    return top == "pallas_kernels" and any(map(private, parts))


def test_floors_name_only_what_exists():
    assert {name for names in FLOORS for name in names} - {"experiments"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    own = floor(module)
    assert own is not None, f"{module} has no place yet: give it a floor in {Path(__file__).name}"
    for name in imports(module):
        if name.split(".")[0] in TOPS:
            other = floor(name)
            assert other is not None and other <= own, f"{module} must not import {name}"


def test_kernels_are_used_through_public_doors():
    found = {
        module: names
        for module in MODULES
        if module.split(".")[0] == "nosa_jax" and (names := [*filter(goes_past_the_doors, imported_names(module))])
    }
    assert not found, found


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("pallas_kernels.checks.require_int", False),
        ("pallas_kernels.append_token.Summaries", False),
        ("pallas_kernels._dispatch.Op", True),
        ("pallas_kernels.resolve_slots.xla.EMPTY", True),
        ("pallas_kernels.block_attention.reference", True),
        ("pallas_kernels.blocks._hidden", True),
        ("jax._src.xla_bridge", False),
    ],
)
def test_what_is_a_public_door(name, private):
    assert goes_past_the_doors(name) == private


def test_kernels_know_jax_only():
    for module in MODULES:
        if module.split(".")[0] == "pallas_kernels":
            for name in imports(module):
                top = name.split(".")[0]
                assert top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_one_module_knows_the_pallas_backends():
    for module in MODULES:
        for name in imports(module):
            backend = name.startswith(BACKENDS)
            assert not backend or module == BACKEND_MODULE, f"{module} imports {name}: go through {BACKEND_MODULE}"


def test_importing_needs_the_core_alone():
    """All in one process: what none of them loads is loaded by no one alone."""
    modules = ("nosa_jax", "nosa_jax.hf", "nosa_jax.locality", "nosa_jax.plots", "nosa_jax.evals")
    script = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    print(*[f'{{module}}: {{name}}' for name in {OPTIONAL!r} if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []
