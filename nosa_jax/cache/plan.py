"""What a running batch will cost, before it runs: bytes in host and device memory, bytes per token, and a speed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

from nosa_jax.cache import memory
from nosa_jax.config import CacheConfig, ModelConfig
from pallas_kernels import blocks
from pallas_kernels.checks import bad_value, require_type

GB = 10**9

# Blocks fetched per step, layer, KV head and row by a least-recently-used pool of `slots` blocks, as a share of the
# selection J, by slots / J. NOSA: 3.58, 1.20, 0.86 and 0.71 of 64 blocks at 64, 80, 96 and 128 slots (third-party
# measurement of NOSA-8B). InfLLMv2: its published mean overlap is 0.889 against NOSA's 0.944, scaled alike.
_MISS_SHARE = ((1.0, 3.58 / 64), (1.25, 1.20 / 64), (1.5, 0.86 / 64), (2.0, 0.71 / 64))
_MISS_FACTOR = {"nosa": 1.0, "dma": 1.0, "infllmv2": (1 - 0.889) / (1 - 0.944), "full": 0.0}


class CacheTooLargeError(MemoryError, ValueError):
    """A cache would not fit; the message says what is needed, what there is and what to change."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by part, and what one decode step moves. `str(plan)` is a table.

    host_bytes: KV cache in host memory. device: bytes by part, weights included. pcie_bytes_per_token: expected,
    blocks fetched and written back. hbm_bytes_per_token: read per generated token, the weights shared by the batch.
    tokens_per_second: of the whole batch, if a step took its HBM time plus its PCIe time: a bound, not a promise.
    """

    batch: int
    max_length: int
    slots: int | None
    num_blocks: int
    block_bytes: int
    host_bytes: int
    device: dict[str, int]
    misses_per_step: float
    pcie_bytes_per_token: float
    hbm_bytes_per_token: float
    link_bytes_per_second: float
    hbm_bytes_per_second: float

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

    def require_memory(self, allocated: tuple[str, ...] = (), devices: int = 1) -> None:
        """Raises CacheTooLargeError unless host and device bytes fit. `allocated`: device parts that exist already.

        devices: how many run such a batch each, over one host memory.
        """
        rows = f"batch ({devices * self.batch})"
        tokens = f"max_length ({self.max_length}, prompt and new tokens)"
        remedy = f"Lower {rows}, {tokens} or slots ({self.slots})"
        if self.slots is None:
            remedy = f"Lower {rows} or {tokens}, or offload the cache"
        host, host_source = memory.host_limit()
        needed = devices * self.host_bytes
        if needed > host:
            raise CacheTooLargeError(
                f"cache: the host store must fit in host memory, got {needed / GB:.2f} GB needed and "
                f"{host / GB:.2f} GB available ({host_source}). {remedy}."
            )
        needed = sum(size for part, size in self.device.items() if part not in allocated)
        device, device_source = memory.device_limit()
        if device_source == host_source:  # one memory is both
            device, device_source = host - devices * self.host_bytes, f"{host_source}, less the host store"
            needed *= devices
        if needed > device:
            raise CacheTooLargeError(
                f"cache: the device pool must fit in device memory, got {needed / GB:.2f} GB needed and "
                f"{device / GB:.2f} GB available ({device_source}). {remedy}."
            )

    def to_dict(self) -> dict[str, Any]:
        derived = ("device_bytes", "seconds_per_step", "tokens_per_second")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        where = "all on the device" if self.slots is None else f"{self.slots} of {self.num_blocks} blocks on the device"
        rows = [
            ("batch x context", f"{self.batch} x {self.max_length} tokens, {where}"),
            ("host memory", f"{self.host_bytes / GB:.3f} GB"),
            *((f"device: {part}", f"{size / GB:.3f} GB") for part, size in self.device.items()),
            ("device memory", f"{self.device_bytes / GB:.3f} GB"),
            ("fetched blocks", f"{self.misses_per_step:.2f} per step, layer, KV head and row (expected)"),
            ("PCIe per token", f"{self.pcie_bytes_per_token / 2**20:.3f} MiB"),
            ("HBM per token", f"{self.hbm_bytes_per_token / 2**20:.3f} MiB"),
            ("at most", f"{self.tokens_per_second:,.0f} tokens/s"),
        ]
        return "\n".join(f"{name:<24}{value}" for name, value in rows)


def plan(
    config: ModelConfig,
    batch: int,
    max_length: int,
    cache: CacheConfig = CacheConfig(),
    *,
    dtype: Any = jnp.bfloat16,
    misses: float | None = None,
    link_bytes_per_second: float = 53e9,
    hbm_bytes_per_second: float = 4.3e12,
) -> Plan:
    """Counts bytes for `batch` rows that may grow to `max_length` tokens.

    misses: blocks fetched per step, layer, KV head and row; default from published measurements by slots. The two rates
    default to what an H200 on PCIe 5 measures. Raises ValueError for sizes below 1 or slots that cannot work.
    """
    require_type("config", config, ModelConfig, "Pass presets.nosa_8b() or model.config.")
    for name, value in (("batch", batch), ("max_length", max_length)):
        if value < 1 or value != int(value):
            raise bad_value(name, "must be a whole number >= 1", value, "Raise it.")
    for name, rate in (
        ("link_bytes_per_second", link_bytes_per_second),
        ("hbm_bytes_per_second", hbm_bytes_per_second),
    ):
        if rate <= 0:
            raise bad_value(name, "must be above 0", rate, "Pass bytes per second.")
    if misses is not None and misses < 0:
        raise bad_value("misses", "must be >= 0", misses, "Pass blocks per step, layer, KV head and row.")
    attention = config.attention
    itemsize = jnp.dtype(dtype).itemsize
    m = blocks.num_blocks(max_length, attention.block_size)
    slots = cache.resolve_slots(attention, m)
    tables = config.num_layers * batch * config.num_kv_heads  # one per layer, row and KV head
    block_bytes = 2 * attention.block_size * config.head_dim * itemsize
    windows = blocks.num_windows(m * attention.block_size, attention.pooling_stride)

    device = {
        "weights": _weight_count(config) * itemsize,
        "pool": tables * (m if slots is None else slots) * block_bytes,
    }
    if attention.uses_query_scores:
        device["pooled keys"] = tables * config.head_dim * (windows * itemsize + 2 * 4)
    if attention.uses_importance:
        device["importance"] = tables * 4 * (m * attention.block_size + windows + 2)
    if slots is not None:
        device["slot tables"] = tables * slots * 2 * 4

    selected = min(attention.num_selected_blocks, m) if attention.is_sparse else m
    if slots is None or slots >= m:
        misses = 0.0
    elif misses is None:
        misses = expected_misses(config, slots)
    per_row = config.num_layers * config.num_kv_heads
    written = 0.0 if slots is None else 1 / attention.block_size
    read = selected * (block_bytes + (4 * attention.block_size if attention.uses_importance else 0))
    if attention.uses_query_scores:
        read += windows * config.head_dim * itemsize
    # Of the input embedding a step reads a row per token; it counts where it is the output's, too.
    unread = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * itemsize
    return Plan(
        batch=batch,
        max_length=max_length,
        slots=slots,
        num_blocks=m,
        block_bytes=block_bytes,
        host_bytes=0 if slots is None else tables * m * block_bytes,
        device=device,
        misses_per_step=misses,
        pcie_bytes_per_token=per_row * (misses + written) * block_bytes,
        hbm_bytes_per_token=(device["weights"] - unread) / batch + per_row * read,
        link_bytes_per_second=link_bytes_per_second,
        hbm_bytes_per_second=hbm_bytes_per_second,
    )


def expected_misses(config: ModelConfig, slots: int) -> float:
    """Blocks fetched per step, layer, KV head and row, from published figures; interpolated in slots / J."""
    selected = config.attention.num_selected_blocks
    ratio = slots / selected
    points = _MISS_SHARE
    share = points[-1][1]
    for (left, high), (right, low) in itertools.pairwise(points):
        if ratio <= right:
            share = high + (low - high) * (max(ratio, left) - left) / (right - left)
            break
    return share * selected * _MISS_FACTOR[config.attention.variant]


def _weight_count(config: ModelConfig) -> int:
    hidden, dim = config.hidden_size, config.head_dim
    attention = hidden * dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    embeddings = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    if config.attention.uses_importance:
        layer += config.num_kv_heads * (1 + config.num_kv_heads * dim)
    return config.num_layers * layer + embeddings + hidden
