"""What a running batch will cost, before it runs: bytes in host and device memory, bytes per token, and a speed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from nosa_jax.cache import memory
from nosa_jax.cache.pages import as_row_limits
from nosa_jax.cache.state import policy_bytes, policy_sizes
from nosa_jax.cache.step_costs import expected_misses, parameter_bytes, step_bytes, weights_of
from nosa_jax.cache.working_set import Limits, Reading, as_limits, plan_reading, rounded, rounded_room
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.policy import Policy, Sizes
from pallas_kernels import blocks
from pallas_kernels.checks import (
    IntegersLike,
    as_float_dtype,
    bad_value,
    require_int,
    require_number,
    require_size,
    require_type,
)
from pallas_kernels.device import RATES, Rates, current_device

GB = 10**9


class CacheTooLargeError(MemoryError, ValueError):
    """A cache would not fit; the message says what is needed, what there is and what to change."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by part, and what one decode step moves. `str(plan)` is a table.

    max_length: the most that any row may hold. pages: of the host store, one per block of a row. host_bytes: KV cache
    in host memory. device: bytes by part, weights included; "prefill" is what reading the prompts
    holds beside the rest, and free again while decoding. reading: how they are read. pcie_bytes_per_token: expected,
    blocks fetched and written back. hbm_bytes_per_token: read per generated token, the weights shared by the batch.
    tokens_per_second: of the whole batch, if a step took its HBM time plus its PCIe time: a bound, not a promise.
    """

    batch: int
    max_length: int
    slots: int | None
    num_blocks: int
    block_bytes: int
    pages: int
    host_bytes: int
    device: dict[str, int]
    reading: Reading
    misses_per_step: float
    pcie_bytes_per_token: float
    hbm_bytes_per_token: float
    link_bytes_per_second: float
    hbm_bytes_per_second: float
    policy: Policy | None = None

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def seconds_per_step(self) -> float:
        hbm = self.batch * self.hbm_bytes_per_token / self.hbm_bytes_per_second
        return hbm + self.batch * self.pcie_bytes_per_token / self.link_bytes_per_second

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds_per_step

    def with_pages(self, pages: int) -> Plan:
        """The same with another number of pages in the host store, if there is one."""
        if self.pages == 0:
            return self
        return dataclasses.replace(self, pages=pages, host_bytes=self.host_bytes // self.pages * pages)

    def require_memory(self, allocated: tuple[str, ...] = (), devices: int = 1) -> None:
        """Raises CacheTooLargeError unless host and device bytes fit.

        allocated: device parts that exist already; they count where it is not known what is free, but what there is.
        devices: how many run such a batch each, over one host memory.
        """
        rows = f"batch ({devices * self.batch})"
        tokens = f"max_length ({self.max_length}, prompt and new tokens with their padding)"
        host = memory.host_limit()
        needed = devices * self.host_bytes
        if needed > host.size:
            raise CacheTooLargeError(
                f"cache: the host store must fit in host memory, got {needed / GB:.2f} GB needed and "
                f"{host.size / GB:.2f} GB available ({host.source}). Lower {rows} or {tokens}."
            )
        remedy = f"Lower {rows}, {tokens} or slots ({self.slots})"
        if self.policy is not None and self.slots is not None:
            remedy = f"Lower {rows}, {tokens} or the budget of {type(self.policy).__name__}"
        if self.slots is None:
            remedy = f"Lower {rows} or {tokens}, or offload the cache"
        remedy += ", or lower working_set" if self.reading.rows > 1 or self.reading.chunk is None else ""
        device = memory.device_limit()
        parts = {part: size for part, size in self.device.items() if not (device.is_free and part in allocated)}
        available, source = device.size, device.source
        if source == host.source:  # one memory is both
            available, source = host.size - needed, f"{source}, less the host store"
            parts = {part: devices * size for part, size in parts.items()}
        needed = sum(parts.values())
        if needed > available:
            if "records" in parts:
                remedy += ", or record less"
            sizes = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items())
            raise CacheTooLargeError(
                f"cache: the device pool must fit in device memory, got {needed / GB:.2f} GB needed and "
                f"{available / GB:.2f} GB available ({source}). {remedy}. By part, in GB: {sizes}."
            )

    def to_dict(self) -> dict[str, Any]:
        derived = ("device_bytes", "seconds_per_step", "tokens_per_second")
        parts = dataclasses.asdict(self) | {
            "reading": self.reading._asdict(),
            "policy": self.policy and repr(self.policy),
        }
        return parts | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        unit_name = "blocks" if self.policy is None else "units"
        where = (
            "all on the device"
            if self.slots is None
            else f"{self.slots} of {self.num_blocks} {unit_name} on the device"
        )
        alike = self.pages in (0, self.batch * self.num_blocks)
        unit, symbol = (GB, "GB") if self.host_bytes + self.device_bytes >= GB else (10**6, "MB")
        size = lambda count: f"{count / unit:.3f} {symbol}"
        rows = [
            ("batch x context", f"{self.batch} x {'' if alike else 'at most '}{self.max_length} tokens, {where}"),
            ("host memory", size(self.host_bytes)),
            *((f"device: {part}", size(count)) for part, count in self.device.items()),
            ("device memory", size(self.device_bytes)),
            (f"fetched {unit_name}", f"{self.misses_per_step:.2f} per step, layer, KV head and row (expected)"),
            ("PCIe per token", f"{self.pcie_bytes_per_token / 2**20:.3f} MiB"),
            ("HBM per token", f"{self.hbm_bytes_per_token / 2**20:.3f} MiB"),
            ("at most", f"{self.tokens_per_second:,.0f} tokens/s"),
        ]
        return "\n".join(f"{name:<24}{value}" for name, value in rows)


def plan(
    config: ModelConfig,
    batch: int,
    max_length: float | IntegersLike,
    cache: CacheConfig = CacheConfig(),
    *,
    dtype: Any = jnp.bfloat16,
    prompt: int | None = None,
    chunk: int | None = None,
    working_set: int | None = None,
    misses: float | None = None,
    link_bytes_per_second: float | None = None,
    hbm_bytes_per_second: float | None = None,
    new: int | None = None,
) -> Plan:
    """Counts bytes for `batch` rows that may grow to `max_length` tokens, one number for all or one per row.

    config: of the model.
    batch: rows that decode together.
    max_length: tokens that each may hold, prompt and new ones: an int, or one per row [batch]; host memory is counted
        by row, device memory by the largest.
    cache: where the KV cache lives, and its slots. With a policy, blocks are its units: chunks or pages.
    dtype: of weights and cache; importance is float32 in any.
    prompt: tokens of the longest prompt; None for the largest `max_length`.
    chunk, working_set: how prompts are read, see `prefill`. (`generate` gives rows room for their prompt and for
        `max_new_tokens`, each padded as `nosa_jax.decode.room_for` says.)
    misses: blocks fetched per step, layer, KV head and row; None takes published measurements by slots, and with a
        policy what was measured here, see `Policy.fetch_share`.
    link_bytes_per_second, hbm_bytes_per_second: rates of the link and of device memory; None takes what was measured
        on the card that JAX uses, if it is a known one (H100 or H200), else on an H200. Planning alone makes JAX use
        no device, so that `set_host_memory_limit` can follow it: before the first use it is an H200's, too.
    new: with a policy, the most tokens that any row generates; None for what the prompt leaves of `max_length`.
    Raises ValueError for sizes below 1, slots that cannot work, a working set too small for one row and more misses
    than a step wants.
    """
    require_type("config", config, ModelConfig, "Pass presets.nosa_8b() or model.config.")
    require_type("cache", cache, CacheConfig, "Pass CacheConfig(...).")
    batch = _count("batch", batch)
    row_limits = as_row_limits(max_length, batch)
    max_length = _count("max_length", max_length) if row_limits is None else int(row_limits.max())
    dtype = as_float_dtype("dtype", dtype)
    rates = default_rates()
    link = rates.link if link_bytes_per_second is None else link_bytes_per_second
    memory_rate = rates.memory if hbm_bytes_per_second is None else hbm_bytes_per_second
    for name, rate in (("link_bytes_per_second", link), ("hbm_bytes_per_second", memory_rate)):
        if require_number(name, rate, 0.0) == 0:
            raise bad_value(name, "must be above 0", rate, "Pass bytes per second.")
    limits = as_limits(chunk, working_set)
    if misses is not None:
        misses = require_number("misses", misses, 0.0, _most_misses(config, cache))
    if cache.policy is not None:
        width = max_length if prompt is None else rounded(require_size("prompt", prompt, 1, max_length))
        room = rounded_room(max_length - width if new is None else require_size("new", new, 0, max_length))
        sizes = policy_sizes(config, batch, max_length, width, room)
        require_policy(config, cache.policy, sizes, chunk)
        if misses is None:
            fits = blocks.num_blocks(max_length, cache.policy.unit) <= cache.policy.num_slots
            misses = 0.0 if fits else cache.policy.fetch_share * cache.policy.num_wanted
        return _plan_policy(config, sizes, cache, dtype, limits, misses, link, memory_rate)
    attention, itemsize = config.attention, jnp.dtype(dtype).itemsize
    m = blocks.num_blocks(max_length, attention.block_size)
    slots = cache.resolve_slots(attention, m)
    tables = config.num_layers * batch * config.num_kv_heads  # one per layer, row and KV head
    block_bytes = blocks.block_bytes(attention.block_size, config.head_dim, itemsize)
    windows = blocks.num_windows(m * attention.block_size, attention.pooling_stride)

    device = {
        "weights": parameter_bytes(config, dtype),
        "pool": tables * (m if slots is None else slots) * block_bytes,
    }
    if attention.uses_query_scores:
        device["pooled keys"] = tables * config.head_dim * (windows * itemsize + 2 * 4)
    if attention.uses_importance:
        device["importance"] = tables * 4 * (m * attention.block_size + windows + 2)
    if slots is not None:
        device["slot tables"] = tables * slots * 2 * 4 + batch * m * 4  # and the pages
    of_row = (sum(device.values()) - device["weights"]) // batch + 8  # and its length and limit
    width = max_length
    if prompt is not None:
        width = rounded(require_size("prompt", prompt, 1, max_length))
    reading = plan_reading(
        config, batch, width, m, dtype=dtype, row_bytes=of_row, fresh=True, offloaded=slots is not None, limits=limits
    )
    device["prefill"] = reading.bytes

    if slots is None or slots >= m:
        misses = 0.0
    elif misses is None:
        misses = expected_misses(config, slots)
    held = [m] if row_limits is None else [blocks.num_blocks(int(limit), attention.block_size) for limit in row_limits]
    full_rows = [count * attention.block_size for count in held]
    moved = step_bytes(config, full_rows, dtype=dtype, fetched=misses, offloaded=slots is not None)
    shared = weights_of(config, dtype).read
    pages = batch * m if row_limits is None else sum(held)
    return Plan(
        batch=batch,
        max_length=max_length,
        slots=slots,
        num_blocks=m,
        block_bytes=block_bytes,
        pages=0 if slots is None else pages,
        host_bytes=0 if slots is None else config.num_layers * config.num_kv_heads * pages * block_bytes,
        device=device,
        reading=reading,
        misses_per_step=misses,
        pcie_bytes_per_token=moved.link / len(held),
        hbm_bytes_per_token=(shared + batch * (moved.device - shared) // len(held)) / batch,
        link_bytes_per_second=link,
        hbm_bytes_per_second=memory_rate,
    )


def require_policy(config: ModelConfig, policy: Policy, sizes: Sizes, chunk: int | None) -> None:
    """Raises ValueError unless a model of this configuration can decode by the policy."""
    name = type(policy).__name__
    if policy.refusal is not None:
        remedy = "Run it over the arrays of a layer with baselines.replay, or take ShadowKV or ArkVale."
        raise bad_value("CacheConfig.policy", "must be one that the engine runs", f"{name}: {policy.refusal}", remedy)
    if config.attention.is_sparse:
        rule = "must go with a model of variant 'full', whose attention it replaces"
        remedy = "Use nosa_jax.with_attention(model, variant='full'), or policy=None."
        raise bad_value("CacheConfig.policy", rule, f"{name} with {config.attention.variant!r}", remedy)
    if chunk is not None:
        remedy = "Use chunk=None; working_set says how many rows are read at once."
        raise bad_value("chunk", "must be None with a policy, which reads whole prompts", chunk, remedy)
    policy.check(sizes)


def _most_misses(config: ModelConfig, cache: CacheConfig) -> float:
    """Blocks or units that a step may want."""
    if cache.policy is not None:
        return float(cache.policy.num_wanted)
    return float(config.attention.num_selected_blocks) if config.attention.is_sparse else math.inf


def _plan_policy(
    config: ModelConfig, sizes: Sizes, cache: CacheConfig, dtype: Any, limits: Limits, misses: float, link: float,
    memory_rate: float,
) -> Plan:  # fmt: skip
    """`plan` of a cache with a policy."""
    policy, batch = cache.policy, sizes.rows
    assert policy is not None
    parts, host_bytes, read = policy_bytes(sizes, cache, jnp.dtype(dtype))
    units, weights = policy.num_units(sizes), weights_of(config, jnp.dtype(dtype))
    unit_bytes = policy.parts * policy.unit * sizes.dim * jnp.dtype(dtype).itemsize
    reading = plan_reading(
        config, batch, sizes.prompt, units, dtype=dtype, row_bytes=sum(parts.values()) // batch, fresh=True,
        offloaded=cache.offload, limits=limits, whole_rows=True,
    )  # fmt: skip
    misses = misses if cache.offload else 0.0
    return Plan(
        batch=batch,
        max_length=sizes.max_length,
        slots=policy.num_slots if cache.offload else None,
        num_blocks=units,
        block_bytes=unit_bytes,
        pages=batch * units if cache.offload else 0,
        host_bytes=host_bytes,
        device={"weights": weights.all, **parts, "prefill": reading.bytes},
        reading=reading,
        misses_per_step=misses,
        pcie_bytes_per_token=config.num_layers * config.num_kv_heads * misses * unit_bytes,
        hbm_bytes_per_token=(weights.read + read) / batch,
        link_bytes_per_second=link,
        hbm_bytes_per_second=memory_rate,
        policy=policy,
    )


def _count(name: str, value: Any) -> int:
    """A whole number above 0; 1e6 is one, too."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    count = require_int(name, value, 1, "must be a whole number >= 1")
    if count >= 2**62:
        raise bad_value(name, "must be below 2**62", "more", "Lower it.")
    return count


def default_rates() -> Rates:
    """What was measured on the card that JAX uses; on an H200 for an unknown card and before JAX uses any."""
    kind = current_device().kind if memory.has_device() else ""
    return RATES.get(kind, RATES["NVIDIA H200"])
