"""Keys of config.json by which other architectures compute something else, and the values that leave it a Llama.

A reader that passes over such a key runs another model without a word. Absent and null are always neutral.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nosa_jax.config import ModelConfig
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
# By key, whether its value is neutral in a model of this form.
_BY_MODEL: dict[str, Callable[[Any, ModelConfig, dict[str, Any]], bool]] = {
    "sliding_window": lambda value, config, raw: value == 0 or raw.get("use_sliding_window") is False,
    "use_sliding_window": lambda value, config, raw: value is False or not raw.get("sliding_window"),
    "max_window_layers": lambda value, config, raw: True,
    "layer_types": lambda value, config, raw: set(value) <= {"full_attention"},
    "no_rope_layers": lambda value, config, raw: all(value),  # Llama 4 marks the layers that do have RoPE with 1
    "rotary_dim": lambda value, config, raw: value == config.head_dim,
    "dim_model_base": lambda value, config, raw: value == config.hidden_size,
    "scale_depth": lambda value, config, raw: math.isclose(value, math.sqrt(config.num_layers)),
    "attention_multiplier": lambda value, config, raw: math.isclose(value, config.head_dim**-0.5),
    "query_pre_attn_scalar": lambda value, config, raw: value == config.head_dim,
}
KEYS = frozenset(_NEUTRAL) | frozenset(_BY_MODEL)


def refuse_other_maths(raw: dict[str, Any], config: ModelConfig) -> None:
    """Raises ValueError that names every key of `raw` under which a model of the sizes of `config` is no Llama."""
    keys = [key for key in (*_NEUTRAL, *_BY_MODEL) if raw.get(key) is not None and not _is_neutral(raw, key, config)]
    if keys:
        known = [f"{key}={_NEUTRAL[key][0]!r}" for key in keys if key in _NEUTRAL]
        rule = "must describe a plain Llama" + (f" ({', '.join(known)})" if known else "")
        got = ", ".join(f"{key}={raw[key]!r:.60}" for key in keys)
        remedy = "This checkpoint cannot be loaded; where the weights are a plain Llama's, remove the key."
        raise bad_value("config.json", rule, got, remedy)


def _is_neutral(raw: dict[str, Any], key: str, config: ModelConfig) -> bool:
    if key in _NEUTRAL:
        return raw[key] in _NEUTRAL[key] or (not raw[key] and False in _NEUTRAL[key])
    try:
        return _BY_MODEL[key](raw[key], config, raw)
    except (TypeError, OverflowError):  # a number beyond all floats
        return False
