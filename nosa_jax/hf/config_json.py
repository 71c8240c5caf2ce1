"""config.json in Hugging Face's Llama form, both ways; our AttentionConfig travels under one key of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nosa_jax.config import AttentionConfig, ModelConfig, RopeConfig, replace_attention
from pallas_kernels.checks import bad_value

CONFIG_NAME = "config.json"
ATTENTION_KEY = "nosa_attention"

# Keys that change what a Llama computes, with the values under which it computes what we do. Absent is fine too.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_PLAIN_ROPE = ("default", "plain", None)
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "partial_rotary_factor",
}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`; raises FileNotFoundError or ValueError where there is none to read."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        what = f"a folder with {sorted(p.name for p in folder.iterdir())[:8]}" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"path: must be a local checkpoint folder with a {CONFIG_NAME}, got {folder} ({what}). "
            "Pass the folder that holds config.json and *.safetensors; download it first if it is on a hub."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise bad_value(
            str(path), "must be valid JSON", f"({error})", "Restore the file or download it again."
        ) from error
    if not isinstance(raw, dict):
        raise bad_value(str(path), "must hold a JSON object", type(raw).__name__, "Restore the file.")
    return raw


def parse_config(raw: dict[str, Any], *, overrides: dict[str, Any], has_importance: bool) -> ModelConfig:
    """The model that a config.json describes.

    overrides: fields of AttentionConfig that beat those stored under `nosa_attention`.
    has_importance: whether the checkpoint has importance tensors; decides the variant where nothing else does.

    Raises ValueError for what we do not implement, for missing keys and for unknown attention fields.
    """
    _refuse_other_maths(raw)
    hidden, heads = _require(raw, "hidden_size"), _require(raw, "num_attention_heads")
    max_context = raw.get("max_position_embeddings") or 2048
    return ModelConfig(
        vocab_size=_require(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_require(raw, "intermediate_size"),
        num_layers=_require(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        max_context=max_context,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=_parse_rope(raw, max_context),
        attention=_parse_attention(raw, overrides, has_importance),
    )


def render_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of `config`; `parse_config` gives the same `config` back. dtype: name of the weights' dtype.

    Raises ValueError for a model that Llama's form cannot describe.
    """
    for name in ("qkv_bias", "qk_norm"):
        if getattr(config, name):
            remedy = "Keep such a model in checkpoints of nosa_jax.train."
            raise bad_value(f"model.config.{name}", "must be False in a folder of Llama's form", True, remedy)
    rope = config.rope
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
        ATTENTION_KEY: dataclasses.asdict(config.attention),
    }
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


def _require(raw: dict[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise bad_value(CONFIG_NAME, f"must have the key {key!r}", f"keys {sorted(raw)}", "Restore the file.")
    return raw[key]


def _refuse_other_maths(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "llama":
        raise bad_value(
            CONFIG_NAME,
            "model_type must be 'llama'",
            repr(raw.get("model_type")),
            "Other architectures compute something else; export the checkpoint in Llama form.",
        )
    wrong = [f"{key}={raw[key]!r}" for key, allowed in _ONLY.items() if key in raw and raw[key] not in allowed]
    if wrong:
        rules = ", ".join(f"{key}={allowed[0]!r}" for key, allowed in _ONLY.items())
        raise bad_value(
            CONFIG_NAME, f"only {rules} are implemented", ", ".join(wrong), "This checkpoint cannot be loaded."
        )


def _parse_rope(raw: dict[str, Any], max_context: int) -> RopeConfig:
    # `rope_parameters` is the form of transformers 5; it holds rope_theta too.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type"))
    theta = rope.get("rope_theta") or (raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta")
    theta = 10000.0 if theta is None else float(theta)
    if kind not in (*_PLAIN_ROPE, "longrope"):
        raise bad_value(
            CONFIG_NAME,
            "the rope type must be 'default' or 'longrope'",
            repr(kind),
            "Other kinds are not implemented; this checkpoint cannot be loaded.",
        )
    unknown = sorted(set(rope) - _ROPE_KEYS)
    if unknown or rope.get("partial_rotary_factor") not in (1, None):
        raise bad_value(
            CONFIG_NAME,
            f"its rope settings may hold {sorted(_ROPE_KEYS)} with partial_rotary_factor 1",
            rope,
            "Other settings are not implemented; this checkpoint cannot be loaded.",
        )
    if kind != "longrope":
        return RopeConfig(theta=theta)
    top_level = raw.get("original_max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or top_level or max_context
    attention_factor, factor = rope.get("attention_factor"), rope.get("factor")
    if attention_factor is None and factor is not None and top_level is None and factor * original != max_context:
        # A stated stretch beats the ratio of the two lengths, which is what None stands for.
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    missing = [name for name in ("short_factor", "long_factor") if not rope.get(name)]
    if missing:
        raise bad_value(CONFIG_NAME, f"longrope needs {missing}", f"keys {sorted(rope)}", "Restore the file.")
    return RopeConfig(
        theta=theta,
        kind="longrope",
        short_factor=tuple(float(x) for x in rope["short_factor"]),
        long_factor=tuple(float(x) for x in rope["long_factor"]),
        original_max_context=original,
        attention_factor=None if attention_factor is None else float(attention_factor),
    )


def _parse_attention(raw: dict[str, Any], overrides: dict[str, Any], has_importance: bool) -> AttentionConfig:
    stored = raw.get(ATTENTION_KEY)
    if stored is None:
        stored = {"variant": "nosa" if has_importance else "full"}
    known = [field.name for field in dataclasses.fields(AttentionConfig)]
    if not isinstance(stored, dict) or set(stored) - set(known):
        got = sorted(set(stored) - set(known)) if isinstance(stored, dict) else repr(stored)
        raise bad_value(
            f"{CONFIG_NAME}: {ATTENTION_KEY}",
            f"must be an object with keys among {known}",
            got,
            "Remove or rename the unknown keys.",
        )
    return replace_attention(AttentionConfig(**stored), overrides)
