"""Keys of config.json by which other architectures compute something else, and the values that leave the model ours.

A reader that passes over such a key runs another model without a word. Absent and null are always neutral.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nosa_jax.config import ModelConfig
from nosa_jax.hf.architectures import keys_of_extras
from pallas_kernels.checks import bad_value

# By key, the neutral values; False stands for 0 too, as in JSON files both are found.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Biases, and what the MLP does.
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    **dict.fromkeys(("qkv_bias", "use_qkv_bias", "attention_out_bias", "use_bias", "bias", "lm_head_bias"), (False,)),
    # Norms, and where they stand.
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm"), (False,)),
    **dict.fromkeys(("rms_norm_add_unit_offset", "use_post_norm", "sandwich_norm"), (False,)),
    **dict.fromkeys(("parallel_attn", "parallel_residual", "use_parallel_residual"), (False,)),
    # Positions.
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_ratio"), (1,)),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "rotary_interleaved"), (False,)),
    "position_embedding_type": ("rope", "rotary"),
    **dict.fromkeys(("alibi", "use_alibi", "no_rope_layer_interval", "nope_layer_interval"), (False,)),
    **dict.fromkeys(("rope_local_base_freq", "use_mrope", "mrope_section"), (False,)),
    # Which keys a query sees.
    **dict.fromkeys(("attention_chunk_size", "sliding_window_pattern", "sparse_config"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "attn_temperature_tuning"), (False,)),
    # Factors of embeddings, residuals and logits (MiniCPM, Granite, Cohere, Gemma, Grok).
    **dict.fromkeys(("scale_emb", "embedding_multiplier", "embedding_scale", "residual_multiplier"), (1,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale"), (1,)),
    **dict.fromkeys(("scale_embedding", "normalize_embeddings", "use_mup"), (False,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "clip_qkv"), (False,)),
    # Experts, low ranks, prediction of several tokens, quantized weights.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), (False,)),
    **dict.fromkeys(("moe_num_experts", "moe_intermediate_size", "num_experts_per_tok"), (False,)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "pruned_heads", "num_nextn_predict_layers"), (False,)),
    **dict.fromkeys(("quantization_config", "compression_config"), (None,)),
}
_SLIDING = "sliding_attention"
# By key, whether its value is neutral in a model of this form.
_BY_MODEL: dict[str, Callable[[Any, ModelConfig, dict[str, Any]], bool]] = {
    "layer_types": lambda value, config, raw: set(value) <= {"full_attention", _is_wide(raw, config) and _SLIDING},
    "no_rope_layers": lambda value, config, raw: all(value),  # Llama 4 marks the layers that do have RoPE with 1
    "rotary_dim": lambda value, config, raw: value == config.head_dim,
    "dim_model_base": lambda value, config, raw: value == config.hidden_size,
    "scale_depth": lambda value, config, raw: math.isclose(value, math.sqrt(config.num_layers)),
    "attention_multiplier": lambda value, config, raw: math.isclose(value, config.head_dim**-0.5),
    "query_pre_attn_scalar": lambda value, config, raw: value == config.head_dim,
}
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
KEYS = frozenset(_NEUTRAL) | frozenset(_BY_MODEL) | frozenset(_WINDOW_KEYS)


def refuse_other_maths(raw: dict[str, Any], config: ModelConfig) -> None:
    """Raises ValueError that names every key of `raw` under which a model of the sizes of `config` is not ours."""
    said = [key for key in (*_NEUTRAL, *_BY_MODEL) if raw.get(key) is not None]
    understood = keys_of_extras(raw["model_type"])
    keys = [key for key in said if key not in understood and not _is_neutral(raw, key, config)]
    if keys:
        known = [f"{key}={_NEUTRAL[key][0]!r}" for key in keys if key in _NEUTRAL]
        rule = f"must describe a plain {raw['model_type']}" + (f" ({', '.join(known)})" if known else "")
        got = ", ".join(f"{key}={raw[key]!r:.60}" for key in keys)
        remedy = "This checkpoint cannot be loaded; where the weights are such a model's, remove the key."
        raise bad_value("config.json", rule, got, remedy)
    if _has_window(raw, config) and not _is_wide(raw, config):
        got = f"sliding_window={_window(raw)!r:.60} in a context of {config.max_context}"
        remedy = (
            "Layers that see a window are not built. For texts no longer than the window set max_position_embeddings "
            "to it; sliding_window=null would show the layers more than they were trained with."
        )
        raise bad_value("config.json", "every layer must see the whole context", got, remedy)


def _window(raw: dict[str, Any]) -> Any:
    return raw.get("sliding_window", 4096 if raw["model_type"] in ("mistral", "qwen2", "qwen3") else None)


def _is_wide(raw: dict[str, Any], config: ModelConfig) -> bool:
    """Whether there is a window that hides nothing of the context."""
    return type(_window(raw)) is int and _window(raw) >= config.max_context


def _has_window(raw: dict[str, Any], config: ModelConfig) -> bool:
    """Whether a layer of it has a sliding window, as transformers decides it; where it passes over a key, as meant."""
    if not _window(raw):
        return False
    if raw["model_type"] == "mistral":  # all layers, whatever the other keys say
        return True
    if raw["model_type"] in ("qwen2", "qwen3"):
        if not raw.get("use_sliding_window") or raw.get("layer_types") is not None:  # of which none has a window
            return False
        first = raw.get("max_window_layers", 28)
        return type(first) is not int or first < config.num_layers
    return raw.get("use_sliding_window") is not False


def _is_neutral(raw: dict[str, Any], key: str, config: ModelConfig) -> bool:
    if key in _NEUTRAL:
        return raw[key] in _NEUTRAL[key] or (not raw[key] and False in _NEUTRAL[key])
    try:
        return _BY_MODEL[key](raw[key], config, raw)
    except (TypeError, OverflowError):  # a number beyond all floats
        return False
