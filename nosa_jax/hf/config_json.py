"""config.json of Llama, Qwen2, Qwen3 and Mistral, both ways; our AttentionConfig travels under one key of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nosa_jax._json import parse_object
from nosa_jax.config import AttentionConfig, ModelConfig, replace_attention
from nosa_jax.hf import maths
from nosa_jax.hf.architectures import (
    DENSE,
    MODEL_TYPES,
    OWN,
    architecture_of,
    parse_extras,
    render_architecture,
)
from nosa_jax.hf.folder import existing_folder
from nosa_jax.hf.rope_json import ROPE_KEYS, parse_rope, render_rope
from nosa_jax.hf.values import boolean, integer, number
from nosa_jax.origin import CONFIG_NAME
from pallas_kernels.checks import bad_value

ATTENTION_KEY = "nosa_attention"
# Keys that describe the folder they stand in: the dtype of the weights, and code that lies beside them.
_OF_THE_FOLDER = ("dtype", "torch_dtype", "auto_map")
_FORM = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act"),
    *("rms_norm_eps", "mlp_bias", "tie_word_embeddings"),
)
_TEXT = {"bos_token_id": None, "eos_token_id": None}  # written where nothing better is known


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; raises FileNotFoundError or ValueError where there is none to read."""
    path = existing_folder(folder) / CONFIG_NAME
    if not path.is_file():
        inner = next((p for p in sorted(folder.glob(f"*/{CONFIG_NAME}"))), None)
        remedy = "Pass the folder that holds config.json and *.safetensors; download it first if it is on a hub."
        raise FileNotFoundError(
            f"path: must be a local checkpoint folder with a {CONFIG_NAME}, got {folder} "
            f"(a folder with {sorted(p.name for p in folder.iterdir())[:8]}). "
            + (remedy if inner is None else f"Pass {inner.parent}, which has one.")
        )
    return parse_object(str(path), path.read_bytes())


def parse_config(raw: dict[str, Any], *, overrides: dict[str, Any], has_importance: bool) -> ModelConfig:
    """The model that a config.json describes.

    overrides: fields of AttentionConfig that beat those stored under `nosa_attention`.
    has_importance: whether the checkpoint has importance tensors; decides the variant where nothing else does.

    Raises ValueError for what we do not implement, for missing keys and for unknown attention fields.
    """
    if raw.get("model_type") not in MODEL_TYPES:
        raise bad_value(
            CONFIG_NAME,
            f"model_type must be one of {', '.join(map(repr, MODEL_TYPES))}",
            f"{raw.get('model_type')!r:.60}",
            "Other architectures compute something else: this checkpoint cannot be loaded.",
        )
    architecture = architecture_of(raw)
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    max_context = integer(raw, "max_position_embeddings", architecture.max_context)
    kv_heads = heads if "num_key_value_heads" in raw else architecture.num_kv_heads or heads
    if raw.get("head_dim") is None and architecture.head_dim is None and hidden % heads:
        rule = "hidden_size must be a multiple of num_attention_heads where there is no head_dim"
        raise bad_value(CONFIG_NAME, rule, f"{hidden} and {heads}", "Restore the file.")
    config = ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=integer(raw, "num_key_value_heads", kv_heads),
        head_dim=integer(raw, "head_dim", architecture.head_dim or hidden // heads),
        max_context=max_context,
        rms_norm_eps=number(raw, "rms_norm_eps", low=0.0) if "rms_norm_eps" in raw else 1e-6,
        tie_embeddings=boolean(raw, "tie_word_embeddings"),
        **parse_extras(raw)._asdict(),
        rope=parse_rope(raw, max_context),
        attention=_parse_attention(raw, overrides, has_importance),
    )
    maths.refuse_other_maths(raw, config)
    return config


def may_lack_importance(raw: dict[str, Any]) -> bool:
    """Whether a checkpoint with this config.json, which `parse_config` takes, is whole without importance tensors."""
    stored = raw.get(ATTENTION_KEY)
    return raw["model_type"] in DENSE if stored is None else not AttentionConfig(**stored).uses_importance


def unused(raw: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says that a model of ours does not hold and that does not describe its weights or its form."""
    ours = {*_FORM, *ROPE_KEYS, *maths.KEYS, *_OF_THE_FOLDER, ATTENTION_KEY}
    return {key: raw[key] for key in sorted(raw) if key not in ours and not (key in _TEXT and raw[key] is None)}


def render_config(
    config: ModelConfig, dtype: str, carried: dict[str, Any] | None = None, came_as: str | None = None
) -> dict[str, Any]:
    """The config.json of `config`; `parse_config` gives the same `config` back.

    dtype: name of the weights' dtype. carried: what `unused` found elsewhere, to be written too. came_as: the
    `model_type` that the model had where it was loaded.
    """
    raw: dict[str, Any] = {
        **render_architecture(config, came_as),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        **render_rope(config.rope),
        ATTENTION_KEY: dataclasses.asdict(config.attention),
    }
    return {**_TEXT, **(carried or {}), **raw}


def _parse_attention(raw: dict[str, Any], overrides: dict[str, Any], has_importance: bool) -> AttentionConfig:
    stored = raw.get(ATTENTION_KEY)
    where = f"{CONFIG_NAME}: {ATTENTION_KEY}"
    if stored is None:
        if raw["model_type"] == OWN and not has_importance and "variant" not in overrides:
            remedy = "Restore the key, or say how the model attends: from_pretrained(..., variant=...)."
            raise bad_value(where, f"must be there in a folder of {OWN!r} without importance", None, remedy)
        stored = {"variant": "nosa" if has_importance else "full"}
    known = [field.name for field in dataclasses.fields(AttentionConfig)]
    if not isinstance(stored, dict) or set(stored) - set(known):
        got = sorted(set(stored) - set(known)) if isinstance(stored, dict) else f"{stored!r:.60}"
        raise bad_value(where, f"must be an object with keys among {known}", got, "Remove or rename the unknown keys.")
    try:
        attention = AttentionConfig(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return replace_attention(attention, overrides)
