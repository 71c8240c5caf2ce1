"""Native and offloadable sparse attention (NOSA, arXiv 2510.13602) in JAX."""

import importlib
from typing import TYPE_CHECKING

from nosa_jax import baselines, locality, ops, presets
from nosa_jax.cache.memory import set_host_memory_limit
from nosa_jax.cache.plan import CacheTooLargeError, Plan, plan
from nosa_jax.cache.state import DecodeState
from nosa_jax.config import AttentionConfig, CacheConfig, ModelConfig, RopeConfig
from nosa_jax.convert import cast, num_parameters, with_attention
from nosa_jax.decode import (
    COMPILER_OPTIONS,
    Generation,
    Sampling,
    Step,
    decode_step,
    extend,
    generate,
    jit_decode_step,
    jit_extend,
    prefill,
    stream,
)
from nosa_jax.hf import from_pretrained, load_importance, save_importance, save_pretrained
from nosa_jax.locality import Selections
from nosa_jax.model import ForwardOutput, NosaLM, forward
from pallas_kernels import KernelUnsupportedError

if TYPE_CHECKING:
    from nosa_jax import evals, plots, train
else:

    def __getattr__(name):
        """Rooms that need extras come when asked for: `nosa_jax.train`, `nosa_jax.evals`, `nosa_jax.plots`."""
        if name in ("evals", "plots", "train"):
            return importlib.import_module(f"nosa_jax.{name}")
        raise AttributeError(f"module 'nosa_jax' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "COMPILER_OPTIONS",
    "AttentionConfig",
    "CacheConfig",
    "CacheTooLargeError",
    "DecodeState",
    "ForwardOutput",
    "Generation",
    "KernelUnsupportedError",
    "ModelConfig",
    "NosaLM",
    "Plan",
    "RopeConfig",
    "Sampling",
    "Selections",
    "Step",
    "baselines",
    "cast",
    "decode_step",
    "evals",
    "extend",
    "forward",
    "from_pretrained",
    "generate",
    "jit_decode_step",
    "jit_extend",
    "load_importance",
    "locality",
    "num_parameters",
    "ops",
    "plan",
    "plots",
    "prefill",
    "presets",
    "save_importance",
    "save_pretrained",
    "set_host_memory_limit",
    "stream",
    "train",
    "with_attention",
]
