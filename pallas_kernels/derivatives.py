"""What to say where a derivative is asked for that there is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def reverse_mode_only(name: str) -> Iterator[None]:
    """Inside, JAX's refusal of forward mode says what to use instead.

    Around a function that is jitted as a whole JAX refuses after it has returned, in its own words.
    """
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"{name}: has derivatives in reverse mode, got forward mode (jax.jvp, jax.jacfwd). Use jax.grad, jax.vjp "
            "or jax.jacrev; jax.jvp of jax.grad gives products with second derivatives."
        ) from error
