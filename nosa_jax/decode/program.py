"""How the programs of a decode loop are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.checks import is_tracing
from pallas_kernels.promotion import usual_promotion

# Without it XLA copies every layer's weights at every step on a GPU, since its own matrix products cannot read a slice
# of the stack where it lies. `generate`, `stream` and `jit_decode_step` pass it themselves.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def program[**P, R](**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: `jax.jit` with COMPILER_OPTIONS, or without them where the caller is being traced itself."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        function = usual_promotion(function)
        inner = jax.jit(function, **options)
        outer = jax.jit(function, compiler_options=COMPILER_OPTIONS, **options)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (inner if is_tracing() else outer)(*args, **kwargs)

        return call

    return decorate
