"""Settings every test runs under.

Tests run on the CPU, so that they mean the same on every machine. `pytest -m gpu` leaves JAX its GPU and runs the tests
that need one; JAX_PLATFORMS, where set, has the last word.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from nosa_jax import NosaLM

hypothesis.settings.register_profile("nosa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nosa")

# Outside the checkout, so that a fresh clone finds it; `make clean` empties it.
COMPILED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nosa-jax" / "tests"

# Files that take longest are begun first, so that no worker is left alone with one at the end.
_LONG = ("test_rows", "test_offload", "test_generation", "test_cli", "test_triton_decode", "test_lowering_cuda",
         "test_lowering_decode", "test_model", "test_golden_model", "test_train", "test_readme", "test_docstrings",
         "test_examples", "test_triton_block_attention", "test_bits", "test_devices", "test_parallel_steps",
         "test_parallel_ops", "test_golden_parts", "test_train_evaluation", "test_evals_likelihood",
         "test_ops_append_token", "test_bench", "test_architecture")  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="compile every test's programs as users' programs are")


@pytest.fixture(autouse=True, scope="module")
def compiled_as_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """In files marked `optimized` programs are compiled as users' are; in others with little effort, see below."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # which know nothing of this option
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def model() -> NosaLM:
    """A small model whose selections are lively."""
    from support import lively_model, small_config

    return lively_model(small_config())


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """The ragged batch that many files share, of `support.LENGTHS`."""
    from support import prompts

    return prompts()


@pytest.fixture
def without_type_checker() -> Iterator[None]:
    """What users see: our own checks, not the annotations that are switched on under pytest."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # With little effort XLA takes a third of the time, also in programs that tests start.
    if not config.option.optimized:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # What XLA compiled is kept for the next run, and for the other workers and the programs that tests start.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # many small ones take half of the time
    # Workers of one run share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    # A shell ignores it in what it runs in the background; tests that interrupt a run need it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # For every operation that lowers to Triton MLIR looks in four places for a module of its dialect, which jaxlib does
    # not have: half of the time of such tests, pytest's hooks of imports being slow. An empty one is found once.
    sys.modules.setdefault("jaxlib.mlir.dialects.tt", types.ModuleType("jaxlib.mlir.dialects.tt"))

    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return

    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run `pytest -m gpu` on a machine that has one")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their picture, which takes longer than all steps of a small one."""
    monkeypatch.setattr("nosa_jax.train.loop._draw", lambda root: None)
