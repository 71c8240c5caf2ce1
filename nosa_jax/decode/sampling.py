"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from nosa_jax._pytree import pytree_dataclass, static_field
from pallas_kernels.checks import bad_type, bad_value, require_int, require_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k: keep the k best tokens. top_p: keep the fewest tokens that reach probability p.

    Applied in this order: temperature, top_k, top_p. Tokens that tie with the k-th best stay; of those that tie at the
    limit of top_p the first stay. Raises TypeError or ValueError for what is no number or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature = require_number("Sampling.temperature", self.temperature, 0.0)
        top_k = None if self.top_k is None else require_int("Sampling.top_k", self.top_k, 1)
        top_p = require_number("Sampling.top_p", self.top_p, -math.inf)
        if not 0 < top_p <= 1:
            raise bad_value("Sampling.top_p", "must be in (0, 1]", top_p, "1.0 keeps every token.")
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
            object.__setattr__(self, name, value)

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
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        key = _wrapped(key)
    if key.ndim == 0:
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise bad_value("key", f"must be one key or one per row, [{batch}]", key.shape, "Use jax.random.split(key, B).")
    return key


def _wrapped(key: Any) -> Array:
    """A typed key from a raw one, uint32 words on the last axis."""
    has_words = hasattr(key, "dtype") and key.dtype == jnp.uint32
    if has_words:
        with contextlib.suppress(TypeError, ValueError):  # another number of words
            return jax.random.wrap_key_data(jnp.asarray(key))
    got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else f"{type(key).__name__} {key!r:.60}"
    raise bad_type("key", "must be a JAX random key", got, "Pass jax.random.key(0).")


@pytree_dataclass
class Filter:
    """A `Sampling` as programs take it: those of other numbers share one.

    temperature, top_p: float32 scalars; None where the draw is greedy, or keeps all. top_k: static.
    """

    temperature: Any
    top_p: Any
    top_k: int | None = static_field()

    @classmethod
    def of(cls, sampling: Sampling | Filter) -> Filter:
        """A Filter stays as it is. Of a Sampling the temperature is kept where float32 knows it and its reciprocal, by
        which XLA may multiply.

        Nearer 0 than that the best token alone is left, as by any top_p near 0; beyond it all tokens are as likely.
        """
        if isinstance(sampling, Filter):
            return sampling
        if sampling.is_greedy:
            return cls(None, None, None)
        least = float(np.finfo(np.float32).tiny)
        temperature = np.float32(np.clip(sampling.temperature, least, 0.5 / least))
        top_p = np.float32(max(sampling.top_p, least)) if sampling.top_p < 1 else None
        return cls(temperature, top_p, sampling.top_k)


def has_finite_best(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Which rows a token can be drawn from: not those that hold NaN or +inf, nor those of -inf alone."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def sample(
    logits: Float[Array, "B V"], keys: Array | None, positions: Int32[Array, " B"], sampling: Sampling | Filter
) -> Int32[Array, " B"]:
    """The token that will stand at `positions`. The position is folded into the row's key, so a row draws what it
    would draw alone. Rows without a finite best logit, see `has_finite_best`, give a token that means nothing."""
    filter = Filter.of(sampling)
    if filter.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits, filter)
    return jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))(
        keys, positions, logits
    ).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling | Filter) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where top-k or top-p drops a token. Ties at the limit of top-k stay.

    Where the quotient of the best would overflow, logits are counted from it.
    """
    filter = Filter.of(sampling)
    best = jnp.max(logits, axis=-1, keepdims=True)
    origin = jnp.where(jnp.isfinite(best / filter.temperature), 0, best)
    logits = (logits - origin) / filter.temperature
    if filter.top_k is not None and filter.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, filter.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if filter.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays while the probability before it is below p, so the best one always does.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < filter.top_p
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        ties = logits == smallest
        room = jnp.sum(kept, axis=-1, keepdims=True) - jnp.sum(logits > smallest, axis=-1, keepdims=True)
        stays = (logits > smallest) | (ties & (jnp.cumsum(ties, axis=-1) <= room))
        logits = jnp.where(stays, logits, -jnp.inf)
    return logits
