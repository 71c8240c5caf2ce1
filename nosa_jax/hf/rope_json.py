"""Rotary position embedding in a config.json: the forms found in the wild, and nothing that we would misread."""

from __future__ import annotations

import math
from typing import Any

from nosa_jax.config import RopeConfig
from nosa_jax.hf.values import as_number, integer
from nosa_jax.origin import CONFIG_NAME
from pallas_kernels.checks import bad_value

# Keys of config.json itself that belong here; `rope_parameters` is the form of transformers 5.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
_PLAIN = ("default", "plain", None)
_KINDS = ("rope_type", "type")
_OF_ALL = (*_KINDS, "rope_theta", "partial_rotary_factor")
_OF_LONGROPE = ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor")
_REMEDY = "Other kinds are not implemented; this checkpoint cannot be loaded."


def parse_rope(raw: dict[str, Any], max_context: int) -> RopeConfig:
    """What `rope_scaling` or `rope_parameters` say; where both stand there, they must say the same.

    Raises ValueError for kinds and settings that are not implemented, and for values of the wrong kind.
    """
    given = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise bad_value(f"{CONFIG_NAME}: {key}", "must be an object or null", f"{rope!r:.60}", "Restore the file.")
    # An empty one says nothing. In `rope_parameters`, where theta belongs since transformers 5, it beats the one beside
    # them; in `rope_scaling`, where it never belonged, it must be the same as that: readers differ in what they take.
    places = (given.get("rope_parameters", {}), raw, given.get("rope_scaling", {}))
    theta = next((place["rope_theta"] for place in places if place.get("rope_theta") is not None), None)
    theta = 10000.0 if theta is None else as_number("rope_theta", theta, low=0.0)
    found = [_parse(key, rope, raw, theta, max_context) for key, rope in given.items() if rope]
    if len(found) == 2 and found[0] != found[1]:
        rule = "rope_scaling and rope_parameters must say the same"
        raise bad_value(CONFIG_NAME, rule, f"{found[0].kind} and {found[1].kind}", "Remove one of them.")
    return found[0] if found else RopeConfig(theta=theta)


def _parse(key: str, rope: dict[str, Any], raw: dict[str, Any], theta: float, max_context: int) -> RopeConfig:
    where = f"{CONFIG_NAME}: {key}"
    kinds = [rope[name] for name in _KINDS if rope.get(name) is not None] or [None]
    if any(kind not in (*_PLAIN, "longrope") for kind in kinds):
        raise bad_value(where, "the rope type must be 'default' or 'longrope'", f"{kinds[0]!r:.60}", _REMEDY)
    if len({"longrope" if kind == "longrope" else "default" for kind in kinds}) > 1:
        raise bad_value(where, "rope_type and type must say the same", kinds, "Remove the one that is wrong.")
    if rope.get("rope_theta") is not None and as_number(f"{key}.rope_theta", rope["rope_theta"], low=0.0) != theta:
        raise bad_value(where, "rope_theta must be the same everywhere", rope["rope_theta"], "Correct it.")
    long = kinds[0] == "longrope"
    unknown = sorted(name for name in rope if name not in (*_OF_ALL, *_OF_LONGROPE))
    if unknown or rope.get("partial_rotary_factor") not in (1, None):
        allowed = sorted({*_OF_ALL, *_OF_LONGROPE})
        rule = f"rope settings must be among {allowed} with partial_rotary_factor 1"
        raise bad_value(where, rule, f"{rope!r:.200}", _REMEDY)
    if not long:
        # A length of training changes nothing by itself; a factor does, and nobody says how.
        stretching = [name for name in _OF_LONGROPE[:3] + _OF_LONGROPE[4:] if rope.get(name) not in (1, None)]
        if stretching:
            rule = f"a rope type must stand beside {stretching}" if kinds[0] is None else "plain rope has no factors"
            raise bad_value(where, rule, f"{rope!r:.200}", _REMEDY)
        return RopeConfig(theta=theta)
    missing = [name for name in ("short_factor", "long_factor") if not rope.get(name)]
    if missing:
        raise bad_value(where, f"longrope needs {missing}", f"keys {sorted(rope)}", "Restore the file.")
    original, factor = _original(where, rope, raw, max_context), rope.get("factor")
    factor = None if factor is None else as_number(f"{key}.factor", factor, low=0.0)
    attention_factor = rope.get("attention_factor")
    if attention_factor is not None:
        attention_factor = as_number(f"{key}.attention_factor", attention_factor, low=0.0)
    elif factor not in (None, max_context / original) and raw.get("original_max_position_embeddings") is None:
        # A stated stretch beats the ratio of the two lengths, which is what None stands for.
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        kind="longrope",
        short_factor=_factors(key, "short_factor", rope),
        long_factor=_factors(key, "long_factor", rope),
        original_max_context=original,
        attention_factor=attention_factor,
    )


def _original(where: str, rope: dict[str, Any], raw: dict[str, Any], max_context: int) -> int:
    name = "original_max_position_embeddings"
    given = {integer(source, name) for source in (rope, raw) if source.get(name) is not None}
    if len(given) > 1:
        raise bad_value(where, f"{name} must be the same here and beside it", sorted(given), "Correct it (rope).")
    original = given.pop() if given else max_context
    if original < 2:
        raise bad_value(where, f"longrope needs a {name} of at least 2", original, "Restore the file.")
    return original


def _factors(key: str, name: str, rope: dict[str, Any]) -> tuple[float, ...]:
    if not isinstance(rope[name], list):
        raise bad_value(f"{CONFIG_NAME}: {key}.{name}", "must be a list", f"{rope[name]!r:.60}", "Restore the file.")
    return tuple(as_number(f"{key}.{name}[{i}]", factor, low=0.0) for i, factor in enumerate(rope[name]))


def render_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys of config.json that `parse_rope` reads as `rope`."""
    raw: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.kind == "longrope":
        assert rope.short_factor is not None and rope.long_factor is not None
        raw["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
            "original_max_position_embeddings": rope.original_max_context,
        }
        if rope.attention_factor is not None:
            raw["rope_scaling"]["attention_factor"] = rope.attention_factor
        # Transformers before 5 looks for it here only.
        raw["original_max_position_embeddings"] = rope.original_max_context
    return raw
