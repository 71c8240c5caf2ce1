"""Settings every test runs under.

Tests run on the CPU, so that they mean the same on every machine. `pytest -m gpu` leaves JAX its GPU and runs the tests
that need one; JAX_PLATFORMS, where set, has the last word.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

hypothesis.settings.register_profile("nosa", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nosa")


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Workers of one run share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import jax

    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return

    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run `pytest -m gpu` on a machine that has one")
        for item in marked:
            item.add_marker(skip)
