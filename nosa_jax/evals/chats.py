"""The chat template that prompts are wrapped in: one that is given, or that of a model's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nosa_jax._json import parse_object
from nosa_jax.train.data.template import ChatTemplate, read_template
from pallas_kernels.checks import bad_value

TemplateLike = str | Path | ChatTemplate | None
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_REMEDY = "Pass a Jinja source, or the folder of a model that was made for chat."


def as_template(template: TemplateLike, files: Mapping[str, bytes] | None = None) -> ChatTemplate:
    """The chat template that an argument `template` names.

    template: the source of a Jinja template, the folder of a model that comes with one, or a ChatTemplate; None for
        that among `files`, such as `model.origin.files`.

    Raises ValueError where there is none.
    """
    if isinstance(template, ChatTemplate):
        return template
    if isinstance(template, Path):
        return ChatTemplate.of_folder(template)
    if template is not None:
        return read_template(template, None)
    files = files or {}
    config = parse_object(_CONFIG, files.get(_CONFIG, b"{}"))
    stored: Any = files[_FILE].decode("utf-8") if _FILE in files else config.get("chat_template")
    if isinstance(stored, list):  # several, by name
        stored = next((entry.get("template") for entry in stored if entry.get("name") == "default"), None)
    if not isinstance(stored, str):
        raise bad_value("template", "must be given, as the model comes without a chat template", template, _REMEDY)
    return ChatTemplate(stored, special_texts(config), "chat_template")


def special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts that a tokenizer_config.json has under names such as `bos_token`."""
    entries = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
