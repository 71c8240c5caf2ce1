"""Ready configurations. Pass `variant=` for a rival of the same shape: `presets.tiny(variant="full")`."""

from __future__ import annotations

import dataclasses

from nosa_jax.config import AttentionConfig, ModelConfig, RopeConfig, Variant

# The released 1B, 3B and 8B differ in these alone; a checkpoint's config.json has the last word on eps and RoPE.
_RELEASED = ModelConfig(
    vocab_size=73448,
    hidden_size=4096,
    intermediate_size=16384,
    num_layers=32,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    max_context=16384,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
)


def tiny(variant: Variant = "nosa") -> ModelConfig:
    """Trains on a laptop: bytes in, 4 layers, context 1024, blocks of 16, 8 of up to 64 blocks selected."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_context=1024,
        tie_embeddings=True,
        attention=AttentionConfig(
            variant=variant,
            block_size=16,
            pooling_window=8,
            pooling_stride=4,
            num_selected_blocks=8,
            num_sink_blocks=1,
            num_local_blocks=3,
            num_query_blocks=2,
        ),
    )


def nosa_1b(variant: Variant = "nosa") -> ModelConfig:
    """NOSA-1B: 28 layers, hidden 2048, N/K/D = 16/2/128."""
    return dataclasses.replace(
        _RELEASED,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_heads=16,
        attention=AttentionConfig(variant=variant),
    )


def nosa_3b(variant: Variant = "nosa") -> ModelConfig:
    """NOSA-3B: 32 layers, hidden 2560, N/K/D = 32/2/128."""
    return dataclasses.replace(
        _RELEASED, hidden_size=2560, intermediate_size=10240, attention=AttentionConfig(variant=variant)
    )


def nosa_8b(variant: Variant = "nosa") -> ModelConfig:
    """NOSA-8B: 32 layers, hidden 4096, N/K/D = 32/2/128."""
    return dataclasses.replace(_RELEASED, attention=AttentionConfig(variant=variant))
