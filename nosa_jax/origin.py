"""What the folder that a model was loaded from says beside the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nosa_jax._json import parse_object
from pallas_kernels.checks import bad_value

GENERATION_NAME = "generation_config.json"
CONFIG_NAME = "config.json"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Origin:
    """Kept on a model, so that saving it carries everything along; a part of its structure, no leaf.

    config: the keys of config.json that we do not use.
    model_type: what config.json calls the architecture; None for a model that came from nowhere.
    files: contents of generation_config.json and of the tokenizer's files, by name.

    All origins are equal: models of one configuration have one tree structure and share compiled functions, wherever
    they come from. (So a jitted function that returns a model gives it the origin that the first one traced had.)
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    model_type: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def __repr__(self) -> str:
        return f"Origin({', '.join([*self.config, *self.files])})"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The end-of-text ids of generation_config.json or, where it names none, of config.json."""
        generation = parse_object(GENERATION_NAME, self.files.get(GENERATION_NAME, b"{}"))
        return end_of_text(generation, self.config)


def end_of_text(generation: Mapping[str, Any], config: Mapping[str, Any], folder: Path = Path()) -> tuple[int, ...]:
    """The end-of-text ids of a generation_config.json or, where it names none, of a config.json; empty without any.

    folder: where the two lie, for messages. Raises ValueError where something else than token ids is named.
    """
    return _end_of_text(folder / GENERATION_NAME, generation) or _end_of_text(folder / CONFIG_NAME, config)


def _end_of_text(source: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    stored = raw.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        rule = "must be a token id or a list of them"
        raise bad_value(f"{source}: eos_token_id", rule, f"{stored!r:.60}", "Correct or remove it.")
    return tuple(ids)
