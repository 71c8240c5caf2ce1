"""Shapes of the presets, and the kernels that a function calls on an H200 that is not there."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
from targets import H200

from nosa_jax import AttentionConfig, ModelConfig, presets


class Shape(NamedTuple):
    kv_heads: int = 2
    group: int = 16
    dim: int = 128
    tokens: int = 8192
    dtype: str = "bfloat16"
    attention: AttentionConfig = AttentionConfig()


def of_preset(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> Shape:
    group = config.num_heads // config.num_kv_heads
    return Shape(config.num_kv_heads, group, config.head_dim, tokens, dtype, config.attention)


SHAPES = {
    "tiny": of_preset(presets.tiny(), 1024),
    "tiny_float32": of_preset(presets.tiny(), 1024, "float32"),
    "nosa_1b": of_preset(presets.nosa_1b(), 8192),
    "nosa_3b": of_preset(presets.nosa_3b(), 8192),
    "nosa_8b": of_preset(presets.nosa_8b(), 8192),
    "nosa_8b_long": of_preset(presets.nosa_8b(), 131072),
    "nosa_8b_float32": of_preset(presets.nosa_8b(), 8192, "float32"),
    "nosa_8b_float16": of_preset(presets.nosa_8b(), 8192, "float16"),
    **{f"group_of_{group}": Shape(group=group, dim=64) for group in (1, 3, 4, 8, 16)},
    "one_query": Shape(tokens=1),
    "not_whole_blocks": Shape(group=4, dim=64, tokens=4097),
}


def kernels(function, *arguments) -> list[str]:
    """The kernels that `function` calls when lowered for CUDA: Triton's by name, "mosaic", or cuDNN's by name."""
    with jax.sharding.use_abstract_mesh(H200):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    ours = "block|select|append|resolve|fetch|write|decode|update|rebuilt|keys|rms"
    names = re.findall(rf'custom_call @(mosaic)_gpu|custom_call @__(cudnn\$\w+)|name = "((?:{ours})_\w+)"', text)
    names = ["".join(name) for name in names]
    assert text.count("@__gpu$xla.gpu.triton") == sum(not name.startswith(("mosaic", "cudnn")) for name in names)
    return names
