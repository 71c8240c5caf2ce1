"""Rotary position embedding in a config.json: the forms found in the wild, and nothing that we would misread."""

from __future__ import annotations

import math
from typing import Any

from nosa_jax.config import RopeConfig
from nosa_jax.hf.values import as_number, integer
from nosa_jax.origin import CONFIG_NAME
from nosa_jax.rope import yarn_attention_factor
from pallas_kernels.checks import bad_value

# Keys of config.json itself that belong here; `rope_parameters` is the form of transformers 5.
_ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL)
_PLAIN = ("default", "plain", None)
_NAMES = ("rope_type", "type")
_OF_ALL = (*_NAMES, "rope_theta", "partial_rotary_factor", _ORIGINAL)
# By kind, the settings that it needs and those that it may have beside those of all.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
# Those that would change the maths of plain rope if it had them; of 1 they would not.
_STRETCHING = ("factor", "short_factor", "long_factor", "attention_factor")
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
    kind = _kind(where, rope)
    if rope.get("rope_theta") is not None and as_number(f"{key}.rope_theta", rope["rope_theta"], low=0.0) != theta:
        raise bad_value(where, "rope_theta must be the same everywhere", rope["rope_theta"], "Correct it.")
    needed, optional = _SETTINGS[kind]
    said = {name: value for name, value in rope.items() if value is not None or name == "truncate"}
    allowed = {*_OF_ALL, *needed, *optional}
    if kind == "default":
        # A length of training changes nothing by itself; a factor does, and nobody says how.
        named = any(rope.get(name) is not None for name in _NAMES)
        stretching = [name for name in _STRETCHING if said.get(name) not in (1, None)]
        if stretching:
            rule = "plain rope has no factors" if named else f"a rope type must stand beside {stretching}"
            raise bad_value(where, rule, f"{rope!r:.200}", _REMEDY)
        allowed |= {*_STRETCHING}
    if not said.keys() <= allowed or said.get("partial_rotary_factor") not in (1, None):
        rule = f"settings of a {kind} rope must be among {sorted(allowed)} with partial_rotary_factor 1"
        raise bad_value(where, rule, f"{rope!r:.200}", _REMEDY)
    missing = [name for name in needed if name not in (rope if kind == "yarn" else said)]
    if missing:
        raise bad_value(where, f"{kind} needs {missing}", f"keys {sorted(rope)}", "Restore the file.")
    if kind == "default":
        return RopeConfig(theta=theta)
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    fields: dict[str, Any] = {name: as_number(f"{key}.{name}", said[name], low=0.0) for name in numbers if name in said}
    if kind != "linear":
        fields["original_max_context"] = _original(where, rope, raw, max_context)
    if kind == "yarn":
        _finish_yarn(key, said, fields, max_context)
    if kind == "longrope":
        _finish_longrope(key, said, fields, max_context, has_own_ratio=raw.get(_ORIGINAL) is not None)
    try:
        return RopeConfig(theta=theta, kind=kind, **fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _kind(where: str, rope: dict[str, Any]) -> Any:
    kinds = [rope[name] for name in _NAMES if rope.get(name) is not None] or [None]
    kinds = ["default" if kind in _PLAIN else kind for kind in kinds]
    if any(kind not in [*_SETTINGS] for kind in kinds):
        odd = next(kind for kind in kinds if kind not in [*_SETTINGS])
        raise bad_value(where, f"the rope type must be one of {[*_SETTINGS]}", f"{odd!r:.60}", _REMEDY)
    if len(set(kinds)) > 1:
        raise bad_value(where, "rope_type and type must say the same", kinds, "Remove the one that is wrong.")
    return kinds[0]


def _finish_yarn(key: str, said: dict[str, Any], fields: dict[str, Any], max_context: int) -> None:
    """Adds to the fields of a RopeConfig what is not simply a number of that name."""
    if "factor" not in fields:  # null
        fields["factor"] = max_context / fields["original_max_context"]
    scales = [
        as_number(f"{key}.{name}", said[name], low=-1e30) if name in said else 0.0
        for name in ("mscale", "mscale_all_dim")
    ]
    if "attention_factor" not in fields and all(scales):  # one without the other says nothing
        whole, part = (yarn_attention_factor(fields["factor"], scale) for scale in scales)
        fields["attention_factor"] = as_number(f"{key}.mscale / mscale_all_dim", whole / part, low=0.0)
    if "truncate" in said:
        if type(said["truncate"]) is not bool:  # as null it would be false, absent it is true
            got = f"{said['truncate']!r:.60}"
            raise bad_value(f"{CONFIG_NAME}: {key}.truncate", "rope: must be true or false", got, "Correct it.")
        fields["truncate"] = said["truncate"]


def _finish_longrope(
    key: str, said: dict[str, Any], fields: dict[str, Any], max_context: int, *, has_own_ratio: bool
) -> None:
    """The same; has_own_ratio: whether the original context stands beside the settings, where it beats `factor`."""
    for name in ("short_factor", "long_factor"):
        fields[name] = _factors(key, name, said)
    factor, original = fields.pop("factor", None), fields["original_max_context"]
    if "attention_factor" not in fields and factor not in (None, max_context / original) and not has_own_ratio:
        # A stated stretch beats the ratio of the two lengths, which is what None stands for.
        fields["attention_factor"] = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original(where: str, rope: dict[str, Any], raw: dict[str, Any], max_context: int) -> int:
    given = {integer(source, _ORIGINAL) for source in (rope, raw) if source.get(_ORIGINAL) is not None}
    if len(given) > 1:
        raise bad_value(where, f"{_ORIGINAL} must be the same here and beside it", sorted(given), "Correct it (rope).")
    original = given.pop() if given else max_context
    if original < 2:
        raise bad_value(where, f"rope needs a {_ORIGINAL} of at least 2", original, "Restore the file.")
    return original


def _factors(key: str, name: str, rope: dict[str, Any]) -> tuple[float, ...]:
    if not isinstance(rope[name], list):
        raise bad_value(f"{CONFIG_NAME}: {key}.{name}", "must be a list", f"{rope[name]!r:.60}", "Restore the file.")
    return tuple(as_number(f"{key}.{name}[{i}]", factor, low=0.0) for i, factor in enumerate(rope[name]))


def render_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys of config.json that `parse_rope` reads as `rope`."""
    if rope.kind == "plain":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    needed, optional = _SETTINGS[rope.kind]
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for name in (*needed, *optional):
        value = getattr(rope, name, None)
        if value is not None:
            scaling[name] = list(value) if isinstance(value, tuple) else value
    raw = {"rope_theta": rope.theta, "rope_scaling": scaling}
    if rope.original_max_context is not None:
        scaling[_ORIGINAL] = rope.original_max_context
    if rope.kind == "longrope":  # transformers before 5 looks for it here only
        raw[_ORIGINAL] = rope.original_max_context
    return raw
