"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.checks import bad_type, bad_value


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k: keep the k best tokens. top_p: keep the fewest tokens that reach probability p.

    Applied in this order: temperature, top_k, top_p. Raises ValueError out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise bad_value("Sampling.temperature", "must be finite and >= 0", self.temperature, "0.0 is greedy.")
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise bad_value("Sampling.top_k", "must be >= 1 or None", self.top_k, "None keeps every token.")
        if not 0 < self.top_p <= 1:
            raise bad_value("Sampling.top_p", "must be in (0, 1]", self.top_p, "1.0 keeps every token.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def row_keys(key: Any, batch: int, sampling: Sampling) -> Array | None:
    """One key per row [B] from one key or one per row; None for greedy. Typed and raw uint32 keys are taken.

    Raises ValueError when sampling needs a key and there is none.
    """
    if sampling.is_greedy:
        return None
    if key is None:
        raise bad_value(
            "key", f"temperature {sampling.temperature} needs a random key", None, "Pass jax.random.key(0)."
        )
    if not hasattr(key, "dtype"):
        got = f"{type(key).__name__} {key!r:.60}"
        raise bad_type("key", "must be a JAX random key", got, "Pass jax.random.key(0).")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.ndim == 0:
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise bad_value("key", f"must be one key or one per row, [{batch}]", key.shape, "Use jax.random.split(key, B).")
    return key


def sample(
    logits: Float[Array, "B V"], keys: Array | None, positions: Int32[Array, " B"], sampling: Sampling
) -> Int32[Array, " B"]:
    """The token that will stand at `positions`. The position is folded into the row's key, so a row draws what it
    would draw alone."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits, sampling)
    return jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))(
        keys, positions, logits
    ).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where top-k or top-p drops a token. Ties at the limit of top-k stay."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays while the probability before it is below p, so the best one always does.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits
