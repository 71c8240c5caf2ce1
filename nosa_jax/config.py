"""What a model is: frozen dataclasses, checked when they are built."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from nosa_jax.policy import Policy
from pallas_kernels.blocks import MAX_SIZE, MAX_STRIDE
from pallas_kernels.checks import (
    bad_type,
    bad_value,
    require_bool,
    require_int,
    require_number,
    require_one_of,
    require_size,
    require_type,
)

Variant = Literal["full", "infllmv2", "dma", "nosa"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
RopeKind = Literal["plain", "linear", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)
_POSITIVE = (1e-38, 1e38)  # what float32 holds above 0


def _set(config: Any, **checked: Any) -> None:
    """Keeps checked values, numbers of Python by now, in a frozen configuration."""
    for name, value in checked.items():
        object.__setattr__(config, name, value)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Which blocks a query attends to (paper section 3; defaults are those of the released models).

    variant: `nosa` (query-aware and query-agnostic picks, bias), `infllmv2` (query-aware picks, no bias),
        `dma` (query-agnostic picks, bias), `full` (dense, no bias).
    block_size: tokens per KV block, P.
    pooling_window, pooling_stride: tokens per mean-pooled key and the step between two of them.
    num_selected_blocks: the whole budget per query token and KV head, J, forced blocks included.
    num_sink_blocks: first blocks, always selected.
    num_local_blocks: the query's own block and those right before it, always selected.
    num_query_blocks: picked by the query-aware score beside the forced ones; importance fills the rest.

    Raises ValueError or TypeError when a rule between the fields is broken.
    """

    variant: Variant = "nosa"
    block_size: int = 64
    pooling_window: int = 32
    pooling_stride: int = 16
    num_selected_blocks: int = 64
    num_sink_blocks: int = 1
    num_local_blocks: int = 17
    num_query_blocks: int = 15

    def __post_init__(self) -> None:
        require_one_of("AttentionConfig.variant", self.variant, VARIANTS)
        for name, minimum in (
            ("block_size", 1),
            ("pooling_window", 2),
            ("pooling_stride", 1),
            ("num_selected_blocks", 1),
            ("num_sink_blocks", 0),
            ("num_local_blocks", 1),
            ("num_query_blocks", 0),
        ):
            most = MAX_STRIDE if name == "pooling_stride" else MAX_SIZE  # as kernels take them
            _set(self, **{name: require_size(f"AttentionConfig.{name}", getattr(self, name), minimum, most)})
        if self.pooling_window != 2 * self.pooling_stride:
            raise bad_value(
                "AttentionConfig.pooling_window",
                "must be 2 * pooling_stride",
                f"window {self.pooling_window} and stride {self.pooling_stride}",
                f"Use pooling_window={2 * self.pooling_stride}.",
            )
        if self.block_size % self.pooling_stride:
            raise bad_value(
                "AttentionConfig.block_size",
                "must be a multiple of pooling_stride",
                f"block size {self.block_size} and stride {self.pooling_stride}",
                "Change one of the two.",
            )
        # Otherwise an unforced block could still gain a pooled window, and decode would not select as prefill does.
        overhang = self.pooling_window - self.pooling_stride - 1
        if self.block_size * (self.num_local_blocks - 1) < overhang:
            raise bad_value(
                "AttentionConfig.num_local_blocks",
                f"must satisfy block_size * (num_local_blocks - 1) >= pooling_window - pooling_stride - 1 = {overhang}",
                f"{self.num_local_blocks} with block size {self.block_size}",
                "Use at least 2 local blocks.",
            )
        needed = self.num_sink_blocks + self.num_local_blocks + self.num_query_blocks
        if needed > self.num_selected_blocks:
            raise bad_value(
                "AttentionConfig.num_selected_blocks",
                "must be >= num_sink_blocks + num_local_blocks + num_query_blocks",
                f"{self.num_selected_blocks} < {self.num_sink_blocks} + {self.num_local_blocks} "
                f"+ {self.num_query_blocks} = {needed}",
                f"Raise it to {needed} or ask for fewer blocks.",
            )

    @property
    def is_sparse(self) -> bool:
        return self.variant != "full"

    @property
    def uses_importance(self) -> bool:
        """Whether importance takes part, in the selection and as the bias of attention."""
        return self.variant in ("nosa", "dma")

    @property
    def uses_query_scores(self) -> bool:
        return self.variant in ("nosa", "infllmv2")


# By kind, the fields beside theta that must be given, and those that may be. (plain passes over what longrope takes.)
_LONGROPE = ("short_factor", "long_factor", "original_max_context")
_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), (*_LONGROPE, "attention_factor")),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_context"), ()),
    "yarn": (("factor", "original_max_context"), ("attention_factor", "beta_fast", "beta_slow", "truncate")),
    "longrope": (_LONGROPE, ("attention_factor",)),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: pair i of the D / 2 pairs of dimensions turns by theta ** (-2 i / D) per position.

    The kinds beside `plain` change these frequencies for contexts longer than the one that a model was trained on:

    linear: all of them divided by `factor`.
    llama3: those of wavelengths above original_max_context / low_freq_factor divided by `factor`, those of wavelengths
        below original_max_context / high_freq_factor as they are, the ones between in between.
    yarn: pairs that turn less than beta_slow times in original_max_context positions divided by `factor`, those that
        turn more than beta_fast times as they are, a linear ramp over the pairs between.
    longrope: divided by short_factor or long_factor, one number per pair (D/2): the long ones where
        `ModelConfig.max_context` exceeds `original_max_context`, else the short ones, for texts of any length.
        transformers decides by the length of each text: up to the original context it takes the short ones. To compute
        what it does there, set max_context to original_max_context, and attention_factor to the one of the longer
        context.

    attention_factor: multiplies cos and sin in yarn and longrope; None derives it: 1 + log(factor) / 10 for yarn, for
        longrope from the context lengths.
    truncate: yarn's ramp begins and ends at whole pairs.
    Raises ValueError or TypeError for numbers that are not above 0 in float32, for fields that a kind lacks or, but for
    those of longrope in plain, has no use for, and for bounds of llama3 and yarn in the wrong order.
    """

    theta: float = 10000.0
    kind: RopeKind = "plain"
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    original_max_context: int | None = None
    attention_factor: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        require_one_of("RopeConfig.kind", self.kind, ROPE_KINDS, "Other kinds are not built.")
        _set(self, theta=require_number("RopeConfig.theta", self.theta, *_POSITIVE))
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                _set(self, **{name: _factors(f"RopeConfig.{name}", getattr(self, name))})
        if self.original_max_context is not None:
            length = require_int("RopeConfig.original_max_context", self.original_max_context, 2)
            _set(self, original_max_context=length)
        optional = ("attention_factor", "factor", "low_freq_factor", "high_freq_factor")
        for name in ("beta_fast", "beta_slow", *(name for name in optional if getattr(self, name) is not None)):
            _set(self, **{name: require_number(f"RopeConfig.{name}", getattr(self, name), *_POSITIVE)})
        _set(self, truncate=require_bool("RopeConfig.truncate", self.truncate))
        self._check_kind()

    def _check_kind(self) -> None:
        needed, optional = _ROPE_FIELDS[self.kind]
        missing = [f"{name}=None" for name in needed if getattr(self, name) is None]
        if missing:
            rule = f"{self.kind} needs {', '.join(needed)}"
            raise bad_value("RopeConfig", rule, ", ".join(missing), "Copy them from the checkpoint's config.json.")
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name not in (*needed, *optional) and value != field.default:
                rule = f"has no meaning for kind {self.kind!r}"
                raise bad_value(f"RopeConfig.{field.name}", rule, f"{value!r:.60}", "Leave it out or change the kind.")
        if self.kind == "llama3":
            _require_order(self, "low_freq_factor", "high_freq_factor", strictly=True)
        if self.kind == "yarn":
            _require_order(self, "beta_slow", "beta_fast")
            if self.theta <= 1:  # its logarithm divides
                raise bad_value("RopeConfig.theta", "must be above 1 for kind 'yarn'", self.theta, "Use 10000.0.")


def _require_order(rope: RopeConfig, low: str, high: str, strictly: bool = False) -> None:
    first, second = getattr(rope, low), getattr(rope, high)
    if first > second or (strictly and first == second):
        rule = f"must be {'above' if strictly else 'at least'} {low}"
        raise bad_value(f"RopeConfig.{high}", rule, f"{second} and {first}", "Swap or correct them.")


def _factors(name: str, factors: Any) -> tuple[float, ...]:
    if not isinstance(factors, list | tuple) and getattr(factors, "ndim", None) != 1:
        got = f"{factors!r:.60}"
        raise bad_type(name, "must be a sequence of numbers", got, "Copy it from the checkpoint's config.json.")
    return tuple(require_number(f"{name}[{i}]", factor, *_POSITIVE) for i, factor in enumerate(factors))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder with NOSA attention (N = num_heads, K = num_kv_heads, D = head_dim).

    max_context: the length the model was configured for; it picks the longrope factors and bounds nothing.
    qkv_bias: queries, keys and values get a bias after their projection, as in Qwen2.
    qk_norm: each head of queries and keys is normalised (RMS, learned weights) before RoPE, as in Qwen3.
    output_bias: the output projection of attention has a bias too, as in a Llama with `attention_bias`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int = 16384
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = RopeConfig()
    attention: AttentionConfig = AttentionConfig()
    output_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name, minimum in (*((size, 1) for size in sizes), ("head_dim", 2), ("max_context", 1)):
            _set(self, **{name: require_int(f"ModelConfig.{name}", getattr(self, name), minimum)})
        _set(self, rms_norm_eps=require_number("ModelConfig.rms_norm_eps", self.rms_norm_eps, 0.0, 1.0))
        for name in ("tie_embeddings", "qkv_bias", "qk_norm", "output_bias"):
            _set(self, **{name: require_bool(f"ModelConfig.{name}", getattr(self, name))})
        require_type("ModelConfig.rope", self.rope, RopeConfig, "Pass RopeConfig(theta=10000.0), for example.")
        remedy = "Pass AttentionConfig(variant='nosa'), for example."
        require_type("ModelConfig.attention", self.attention, AttentionConfig, remedy)
        if self.num_heads % self.num_kv_heads:
            raise bad_value(
                "ModelConfig.num_heads",
                "must be a multiple of num_kv_heads",
                f"{self.num_heads} heads and {self.num_kv_heads} KV heads",
                "Change one of the two.",
            )
        if self.head_dim % 2:
            raise bad_value("ModelConfig.head_dim", "must be even (RoPE pairs dimensions)", self.head_dim, "Change it.")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise bad_value(
                    f"RopeConfig.{name}",
                    f"must hold head_dim / 2 = {self.head_dim // 2} factors",
                    len(factors),
                    "Copy them from the checkpoint's config.json.",
                )

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def with_attention(self, **overrides: Any) -> ModelConfig:
        """The same model with fields of its AttentionConfig replaced, e.g. `variant="infllmv2"`."""
        return dataclasses.replace(self, attention=replace_attention(self.attention, overrides))


def replace_attention(attention: AttentionConfig, overrides: dict[str, Any]) -> AttentionConfig:
    """Applies `overrides`; raises ValueError naming unknown keys."""
    known = [field.name for field in dataclasses.fields(AttentionConfig)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise bad_value("attention", f"keys must be among {known}", unknown, "Remove or rename the unknown keys.")
    return dataclasses.replace(attention, **overrides)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Where the KV cache lives while decoding.

    offload: keep it in host memory and only `slots` blocks per row, layer and KV head on the device.
        `full` attention reads every block at every step: its cache stays on the device whatever `offload` says.
    slots: size of the device pool in blocks; None means J + J/4; more than the number of blocks is clamped.
        More slots than J change no output, only how many blocks must be fetched.
    transport: how blocks cross to the device: "auto" or "device_put" (portable).
    policy: how a `full` model decodes instead of attending to everything: `baselines.ShadowKV(...)` or
        `baselines.ArkVale(...)`, which say what lies where. Its pool has the size that its settings give, so that
        `slots` has no meaning; with offload=False all that it would keep in host memory is on the device, and every
        output has the same bits. Records are of its units then: chunks of values alone (ShadowKV), pages (ArkVale).
    """

    offload: bool = True
    slots: int | None = None
    transport: Literal["auto", "device_put"] = "auto"
    policy: Policy | None = None

    def __post_init__(self) -> None:
        _set(self, offload=require_bool("CacheConfig.offload", self.offload))
        if self.slots is not None:
            if not self.offload:
                raise bad_value(
                    "CacheConfig.slots",
                    "has a meaning only with offload=True",
                    f"slots={self.slots} with offload=False",
                    "Drop slots or set offload=True.",
                )
            _set(self, slots=require_int("CacheConfig.slots", self.slots, 1))
        require_one_of("CacheConfig.transport", self.transport, ("auto", "device_put"), "Use transport='auto'.")
        if self.policy is not None:
            require_type("CacheConfig.policy", self.policy, Policy, "Pass baselines.ShadowKV(), for example.")
            if self.slots is not None:
                rule = "has no meaning with a policy, whose settings say how much is on the device"
                raise bad_value("CacheConfig.slots", rule, self.slots, "Use slots=None.")

    def resolve_slots(self, attention: AttentionConfig, num_blocks: int) -> int | None:
        """Blocks in the device pool, or None where the whole cache is on the device.

        Raises ValueError when `slots` cannot hold one selection, or is set for `full` attention.
        """
        selected = attention.num_selected_blocks
        if self.slots is not None and not attention.is_sparse:
            raise bad_value(
                "CacheConfig.slots",
                "has no meaning for variant 'full', which reads every block at every step",
                self.slots,
                "Use slots=None.",
            )
        if self.slots is not None and self.slots < selected:
            raise bad_value(
                "CacheConfig.slots",
                f"must hold one selection, num_selected_blocks = {selected}",
                self.slots,
                f"Use slots={selected} or more, or slots=None.",
            )
        if not self.offload or not attention.is_sparse:
            return None
        return min(num_blocks, selected + selected // 4 if self.slots is None else self.slots)
