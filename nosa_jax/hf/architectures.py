"""The values of `model_type` that we read: one decoder, which differs in biases, norms of heads and absent keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from nosa_jax.config import ModelConfig
from nosa_jax.hf.values import boolean

# What runs a sparse model as one of the others computes something else, so its folder has another name.
OWN, OWN_CLASS = "nosa_llama", "NosaForCausalLM"


class Extras(NamedTuple):
    """What attention may have beside its matrices, by the names of `ModelConfig`."""

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


# How a folder of our own type says the same, in the same order; earlier versions refuse these keys where they are true.
_OWN_KEYS = ("qkv_bias", "attention_out_bias", "qk_norm")


class Architecture(NamedTuple):
    """A dense architecture of transformers.

    plain, biased: what attention has without and with `attention_bias`; biased is None where the key is not read.
    max_context, num_kv_heads, head_dim: what absent keys stand for; None: as many KV heads as heads, hidden / heads.
    """

    class_name: str
    plain: Extras = Extras()
    biased: Extras | None = None
    max_context: int = 2048
    num_kv_heads: int | None = None
    head_dim: int | None = None


DENSE = {
    "llama": Architecture("LlamaForCausalLM", biased=Extras(qkv_bias=True, output_bias=True)),
    "qwen2": Architecture("Qwen2ForCausalLM", Extras(qkv_bias=True), max_context=32768, num_kv_heads=32),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        Extras(qk_norm=True),
        Extras(qkv_bias=True, output_bias=True, qk_norm=True),
        max_context=32768,
        num_kv_heads=32,
        head_dim=128,
    ),
    "mistral": Architecture("MistralForCausalLM", max_context=4096 * 32, num_kv_heads=8),
}
MODEL_TYPES = (*DENSE, OWN)


def architecture_of(raw: dict[str, Any]) -> Architecture:
    """That of a config.json with one of MODEL_TYPES; our own folders leave unsaid what a Llama does."""
    return DENSE["llama" if raw["model_type"] == OWN else raw["model_type"]]


def parse_extras(raw: dict[str, Any]) -> Extras:
    """Raises ValueError for a key that must be a boolean and is not."""
    if raw["model_type"] == OWN:
        return Extras(*(boolean(raw, key) for key in _OWN_KEYS))
    architecture = DENSE[raw["model_type"]]
    biased = boolean(raw, "attention_bias")
    return architecture.biased if biased and architecture.biased is not None else architecture.plain


def keys_of_extras(model_type: str) -> tuple[str, ...]:
    """The keys by which such a folder says what attention has; any value of theirs is understood."""
    if model_type == OWN:
        return _OWN_KEYS
    # A Qwen2 has its biases whatever the key says.
    return () if model_type == "mistral" else ("attention_bias",)


def render_architecture(config: ModelConfig, came_as: str | None) -> dict[str, Any]:
    """The keys of config.json that name the architecture of `config` and say what its attention has.

    A dense model becomes what it came as (`model_type`, None for nothing) where that has such attention, else the first
    architecture that has. The others, and all sparse models, get our own type.
    """
    extras = Extras(config.qkv_bias, config.output_bias, config.qk_norm)
    candidates = [] if config.attention.is_sparse else sorted(DENSE, key=lambda name: name != came_as)
    for model_type in candidates:
        architecture = DENSE[model_type]
        if extras in (architecture.plain, architecture.biased):
            raw: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": model_type}
            if architecture.biased is not None:
                raw["attention_bias"] = extras == architecture.biased
            if model_type != "llama":  # where an absent window is one of 4096 tokens
                raw |= {"sliding_window": None}
            return raw
    said = {key: True for key, has in zip(_OWN_KEYS, extras, strict=True) if has}
    return {"architectures": [OWN_CLASS], "model_type": OWN, "attention_bias": False, **said}
