"""Which parameters: glob patterns over their dotted names, and models cut in two by them.

    from nosa_jax.train import merge, split

    trainable, frozen = split(model, ("*importance*",))
    loss = lambda part: merge(part, frozen)(tokens).logits.mean()
    grads = jax.grad(loss)(trainable)  # of the importance head alone

A part is the model's own pytree with None in place of the other part's arrays: gradients, moments and sharding rules by
name are of what there is in it, and nothing else is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from nosa_jax._pytree import by_name, name_of
from pallas_kernels.checks import bad_type, bad_value, require_number

# What a command line may say instead.
WORDS = {"everything": "*", "importance": "*importance*"}

# A glob pattern and the number for the parameters whose names it matches; the first pattern that matches counts.
Rules = tuple[tuple[str, float], ...]


def as_patterns(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """`value`, one pattern or several, as a tuple in which `WORDS` are written out.

    Raises TypeError unless all are texts, ValueError for none or an empty one.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise bad_type(argument, "must be glob patterns", f"{value!r:.60}", "Pass ('*importance*',), for example.")
    if not patterns or not all(patterns):
        raise bad_value(argument, "must hold patterns, none of them empty", repr(value), "Pass ('*',) for everything.")
    return tuple(_in_full(pattern) for pattern in patterns)


def _in_full(pattern: str) -> str:
    return WORDS.get(pattern, pattern)


def as_rules(argument: str, value: Any, low: float, high: float) -> Rules:
    """`value`, pairs of a pattern and a number in [low, high] or a mapping of them, as a tuple of pairs.

    Raises TypeError or ValueError for anything else.
    """
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    is_pair = lambda pair: isinstance(pair, list | tuple) and len(pair) == 2
    if not isinstance(pairs, list | tuple) or not all(map(is_pair, pairs)):
        remedy = "Pass (('*importance*', 50.0),), for example."
        raise bad_type(argument, "must be pairs of a glob pattern and a number", f"{value!r:.60}", remedy)
    rules = []
    for pattern, number in pairs:
        (written,) = as_patterns(argument, pattern)
        rules.append((written, float(require_number(f"{argument}[{pattern!r}]", number, low, high))))
    return tuple(rules)


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the glob patterns matches the whole dotted name; `*` goes over dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def first_match[T](rules: Iterable[tuple[str, T]], name: str, default: T) -> T:
    """What the first rule says whose pattern matches `name`, `default` where none does."""
    return next((value for pattern, value in rules if fnmatchcase(name, pattern)), default)


def require_matches(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises ValueError for a pattern that matches none of `names`; it lists them."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            rule = "must match names of parameters"
            raise bad_value(argument, rule, f"{pattern!r}, which matches none", f"There are: {', '.join(names)}.")


def split(model: Any, patterns: str | Sequence[str], *, argument: str = "trainable") -> tuple[Any, Any]:
    """Cuts a model, or any pytree of arrays by name, in two: what some pattern matches, and the rest.

    model: the pytree; nothing is copied.
    patterns: glob patterns over dotted names, or words of `WORDS`.
    argument: what messages call `patterns`.

    Returns (trainable, frozen), each of the model's type with None for the other's arrays. Raises ValueError for a
    pattern that matches nothing, TypeError for what is no pattern.
    """
    patterns = as_patterns(argument, patterns)
    require_matches(argument, patterns, by_name(model))
    part = lambda wanted: jax.tree.map_with_path(
        lambda path, leaf: leaf if matches(patterns, name_of(path)) == wanted else None, model
    )
    return part(True), part(False)


def merge(trainable: Any, frozen: Any) -> Any:
    """The model that `split` cut, from its two parts; differentiable in both."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)
