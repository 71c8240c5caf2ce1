"""The importance of tokens, which does not depend on the query: recorded, and the tokens that have most of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int

from nosa_jax.config import CacheConfig
from nosa_jax.decode import prefill
from nosa_jax.model import NosaLM
from pallas_kernels.checks import IntegersLike, bad_value, require_int, require_shape, require_type


def require_importance(model: NosaLM) -> None:
    """Raises ValueError for the model of a variant that has no importance."""
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    if not model.config.attention.uses_importance:
        variant = model.config.attention.variant
        raise bad_value("model", "must have importance, as `nosa` and `dma` do", repr(variant), "Take another variant.")


def token_importance(
    model: NosaLM, tokens: IntegersLike, lengths: IntegersLike | None = None, *, chunk: int | None = None
) -> Float32[np.ndarray, "L B K T"]:
    """The importance b of each token in every layer and KV head; NaN behind a row's end.

    tokens, lengths, chunk: as `nosa_jax.prefill` takes them. It reads the rows, with their cache on the device, and
    the importance is what it keeps there.
    Raises ValueError or TypeError for what `prefill` refuses, and for a variant without importance.
    """
    require_importance(model)
    width = np.shape(tokens)[-1] if np.ndim(tokens) else 0
    cache = CacheConfig(offload=False)
    state, _ = prefill(model, tokens, lengths, max_length=max(width, 1), cache=cache, chunk=chunk)
    kept, ends = jax.device_get((state.importance, state.lengths))
    importance = np.asarray(kept).reshape(*kept.shape[:3], -1)[..., :width]
    return np.where(np.arange(width) < ends[:, None, None], importance, np.float32(np.nan))


class TokenWeight(NamedTuple):
    """A token of a vocabulary, its text, how often it came, and the mean of its importance."""

    token: int
    text: str
    occurrences: int
    importance: float


def top_tokens(
    importance: Float[np.ndarray, "*heads T"],
    tokens: Int[np.ndarray, " T"],
    tokenizer: Any = None,
    *,
    count: int = 20,
    least: int = 1,
) -> list[TokenWeight]:
    """The tokens of the vocabulary that matter most in a text, most important first.

    importance: of each token of the text, e.g. `selections.importance[:, row]` or one layer's or head's part of it.
        Each head is put on one scale, less its mean and over its standard deviation, then the mean over heads is taken:
        1 is one standard deviation above a head's own mean.
    tokens: the text's ids; more of them than have importance are passed over.
    tokenizer: anything with `decode([id])`, for the texts; None shows ids.
    count: how many to return.   least: how often a token must come in the text.
    """
    heads = np.asarray(importance, np.float64).reshape(-1, np.shape(importance)[-1])
    tokens = np.asarray(tokens)[: heads.shape[-1]]
    require_shape("tokens", tokens, (heads.shape[-1],), "[T]")
    count, least = require_int("count", count, 1), require_int("least", least, 1)
    known = np.isfinite(heads).all(0)
    heads, tokens = heads[:, known], tokens[known]
    spread = heads.std(1, keepdims=True)
    scaled = ((heads - heads.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)).mean(0)
    ids, inverse, times = np.unique(tokens, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=scaled, minlength=len(ids)) / np.maximum(times, 1)
    order = [i for i in np.argsort(-means, kind="stable") if times[i] >= least][:count]
    return [TokenWeight(int(ids[i]), _text(tokenizer, int(ids[i])), int(times[i]), float(means[i])) for i in order]


def _text(tokenizer: Any, token: int) -> str:
    """A token as one can read it: spaces and line ends are shown, and what has no text is its number."""
    text = "" if tokenizer is None else tokenizer.decode([token])
    if not text or "\ufffd" in text:  # a part of a character
        return f"<{token}>"
    return repr(text)[1:-1].replace(" ", "\u2423")
