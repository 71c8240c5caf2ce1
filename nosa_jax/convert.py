"""The weights of a model under another attention or in another dtype."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from nosa_jax.attention.importance import Importance
from nosa_jax.model import NosaLM
from pallas_kernels.checks import as_float_dtype, require_type


def with_attention(model: NosaLM, **overrides: Any) -> NosaLM:
    """The same weights under another AttentionConfig, e.g. `variant="infllmv2"`; parameters are shared, not copied.

    A variant that needs importance the model does not have gets a fresh one with A = 0.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    changed = _shallow_copy(model)
    changed.config = model.config.with_attention(**overrides)
    config = changed.config
    if config.attention.uses_importance and changed.layers.attention.importance is None:
        changed.layers.attention.importance = nnx.data(
            Importance(config.num_layers, config.num_kv_heads, config.head_dim, rngs=nnx.Rngs(0))
        )
    return changed


def cast(model: NosaLM, dtype: Any) -> NosaLM:
    """The model in another dtype for parameters and computation; importance stays float32."""
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    dtype = as_float_dtype("dtype", dtype)
    changed = jax.tree.map(lambda x: x.astype(dtype), model)
    if model.layers.attention.importance is not None:
        changed.layers.attention.importance = model.layers.attention.importance
    return changed


def num_parameters(model: NosaLM) -> int:
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    return sum(x.size for x in jax.tree.leaves(model))


def _shallow_copy(model: NosaLM) -> NosaLM:
    leaves, structure = jax.tree.flatten(model)
    return jax.tree.unflatten(structure, leaves)
