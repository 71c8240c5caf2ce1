"""`nosa plan`: bytes and speed of a running batch, before anything runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

from nosa_jax import ModelConfig, plan, presets
from nosa_jax.cli.policy import PolicyName, cache_of, variant_of
from nosa_jax.cli.terminal import note, show
from nosa_jax.config import Variant
from pallas_kernels.device import current_device

PresetName = Literal["tiny", "nosa_1b", "nosa_3b", "nosa_8b"]


def preset(name: PresetName, variant: Variant) -> ModelConfig:
    """The preset `name` with another way to select blocks."""
    return getattr(presets, name)(variant=variant)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a batch will cost: bytes on the host and on the device, bytes moved per token, and a bound on speed."""

    preset: PresetName = "nosa_8b"
    """Shape of the model."""
    variant: Variant | None = None
    """How the model selects blocks; default: nosa, or full with a policy."""
    batch: int = 1
    """Rows that run together."""
    max_length: int | None = None
    """Tokens a row may grow to, prompt included; default: the model's context."""
    prompt: int | None = None
    """Tokens of the longest prompt; default: all of --max-length."""
    new: int | None = None
    """With a policy, tokens that any row generates at most; default: what --prompt leaves of --max-length."""
    offload: bool = True
    """Whether the KV cache lives in host memory, with a pool of blocks on the device."""
    slots: int | None = None
    """Size of the pool on the device, in blocks; default: 5/4 of the blocks that a query selects."""
    policy: PolicyName | None = None
    """Another system's way to decode with a dense model (variant full), in place of attention to everything."""
    policy_settings: tuple[str, ...] = ()
    """Settings of the policy, as budget=1536 local_chunks=16; default: those of the comparison in the NOSA paper."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of weights and cache."""
    misses: float | None = None
    """Blocks fetched per step, layer, KV head and row, as measured by `nosa locality`; default: published figures."""
    link_bytes_per_second: float | None = None
    """Speed of the link to the host; default: as measured on the card at hand where it is known, else on an H200."""
    hbm_bytes_per_second: float | None = None
    """Speed of the device's memory; default: as measured on the card at hand where it is known, else on an H200."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        variant = variant_of(self.variant, self.policy) or "nosa"
        config = preset(self.preset, variant)
        current_device()  # `plan` looks for the card at hand only where JAX has one
        result = plan(
            config,
            self.batch,
            config.max_context if self.max_length is None else self.max_length,
            cache_of(self.offload, self.slots, self.policy, self.policy_settings),
            dtype=self.dtype,
            prompt=self.prompt,
            new=self.new,
            misses=self.misses,
            link_bytes_per_second=self.link_bytes_per_second,
            hbm_bytes_per_second=self.hbm_bytes_per_second,
        )
        if self.policy is not None and self.prompt is None:
            note("counted for prompts as long as rows may grow; where more is generated, say so by --prompt and --new")
        what = {"preset": self.preset, "variant": variant, "dtype": self.dtype}
        if self.json:
            show(json.dumps(what | result.to_dict(), indent=2))
        else:
            show(f"{'model':<24}{self.preset}, variant {variant}, {self.dtype}\n{result}")
        return 0
