"""Whether a decode state is one that a model could have made, and lies where it belongs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from nosa_jax.cache.state import DecodeState, empty_state, fields_of, policy_shapes, policy_sizes
from nosa_jax.config import CacheConfig, ModelConfig
from pallas_kernels.checks import bad_value, is_concrete, require_int


def require_fitting(state: DecodeState, config: ModelConfig, dtype: Any) -> None:
    """Raises ValueError or TypeError unless a model of this configuration and dtype could have made the state.

    Each array must also lie in the memory where it belongs, as those of a restored state do not.
    """
    remedy = "Prefill with this model: a state fits no other layers, heads, attention or dtype."
    max_length = require_int("state.max_length", state.max_length, 1)
    for name, axes in (("pool", 7), ("host", 6), ("page_table", 2), ("lengths", 1), ("limits", 1)):
        value = getattr(state, name)
        if getattr(value, "ndim", None) != axes and not (name in ("host", "page_table") and value is None):
            raise bad_value(
                "state", f"{name} must be an array of {axes} axes", f"{_names(value) or value!r:.200}", remedy
            )
    slots, offload = state.num_slots, state.host is not None
    if state.policy is not None:
        if config.attention.is_sparse:
            rule = f"made with a policy, {type(state.policy).__name__}, must go with a model of variant 'full'"
            remedy = "Take the full model that made it, or prefill with this one and no policy."
            raise bad_value("state", rule, f"variant {config.attention.variant!r}", remedy)
        _require_fields(state, _fitting_policy_state(state, config, dtype), remedy)
        return
    selected = config.attention.num_selected_blocks
    if offload and slots < min(selected, state.num_blocks):
        raise bad_value("state", f"must hold one selection of the model, {selected} blocks", f"{slots} slots", remedy)
    cache = CacheConfig(offload=False)
    if offload and config.attention.is_sparse:
        cache = CacheConfig(slots=max(slots, selected))  # slots of all blocks may be fewer
    pages = state.host.shape[1] if offload else None  # any number of them
    _require_fields(state, _fitting_shapes(config, state.lengths.shape[0], max_length, cache, dtype, pages), remedy)


def _require_fields(state: DecodeState, fitting: dict[str, Any], remedy: str) -> None:
    """Raises ValueError unless the arrays are those of `fitting`, each where it belongs."""
    for name, value in fields_of(state).items():
        if _names(value) != _names(fitting[name]):
            rule = f"must go with the model, whose {name} has {_names(fitting[name])}"
            raise bad_value("state", rule, f"{_names(value)!s:.200}", remedy)
        if isinstance(fitting[name], tuple) and type(value) is not type(fitting[name]):
            rule = f"must hold a {type(fitting[name]).__name__} as {name}"
            restore = "Restore into the tree of a state: jax.tree.unflatten(jax.tree.structure(state), leaves)."
            raise bad_value("state", rule, type(value).__name__, restore)
        _require_at_hand(name, value)


def _require_at_hand(name: str, value: Any) -> None:
    """Raises ValueError unless the arrays of a field are there, in the memory where it belongs."""
    wanted = jax.memory.Space.Host if name == "host" else jax.memory.Space.Device
    for x in jax.tree.leaves(value):
        if isinstance(x, jax.Array) and is_concrete(x) and x.is_deleted():
            remedy = "A state that was donated is gone: go on with the one returned."
            raise bad_value("state", "must still hold its arrays", f"a deleted one in {name}", remedy)
        if jax.typeof(x).memory_space != wanted:
            put = f"jax.device_put(state.{name}, jax.memory.Space.{wanted.name})"
            remedy = f"Put it there: dataclasses.replace(state, {name}={put})."
            rule = f"{name} must lie in {wanted.name.lower()} memory"
            raise bad_value("state", rule, "a restored state, which has it elsewhere", remedy)


def _names(value: Any) -> list[str]:
    """Names the arrays in a field, each by dtype and shape."""
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return [f"{x.dtype}{list(x.shape)}" if is_array(x) else f"{x!r:.60}" for x in jax.tree.leaves(value)]


@functools.lru_cache(maxsize=32)
def _fitting_shapes(
    config: ModelConfig, batch: int, max_length: int, cache: CacheConfig, dtype: Any, pages: int | None
) -> dict[str, Any]:
    return fields_of(jax.eval_shape(lambda: empty_state(config, batch, max_length, cache, dtype, pages=pages)))


def _fitting_policy_state(state: DecodeState, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """What a policy's state of this model has; what only the state can tell is taken from it."""
    assert state.policy is not None
    own = state.policy.sizes_of(state.kept)
    sizes = policy_sizes(config, state.lengths.shape[0], state.max_length, own.get("prompt", 0), own.get("new", 0))
    cache = CacheConfig(offload=state.host is not None, policy=state.policy)
    return policy_shapes(sizes, cache, dtype)
