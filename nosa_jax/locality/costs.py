"""What a pool costs: bytes and time per token at the misses that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

from nosa_jax.cache.plan import GB, Plan, plan
from nosa_jax.config import CacheConfig, ModelConfig
from nosa_jax.locality.report import LocalityReport
from pallas_kernels.checks import bad_value, require_one_of, require_type

Policy = Literal["lru", "belady"]


def pool_costs(
    report: LocalityReport,
    config: ModelConfig,
    *,
    batch: int,
    max_length: int,
    policy: Policy = "lru",
    dtype: Any = jnp.bfloat16,
    link_bytes_per_second: float | None = None,
    hbm_bytes_per_second: float | None = None,
) -> dict[int, Plan]:
    """By size of the pool, what decoding would take with the misses of a report: `nosa_jax.plan` at each of its slots.

    report: measured with or without belady.
    config: of the model that decodes; another one than was measured, a larger one say, must select as that does.
    batch, max_length, dtype: rows that decode together, tokens that each may hold, dtype of weights and cache.
    policy: "lru" for the misses of the engine, "belady" for those of the offline optimum, the least there can be.
    link_bytes_per_second, hbm_bytes_per_second: rates of the link to the host and of device memory; None as `plan`.

    Of each Plan pcie_bytes_per_token, seconds_per_step, tokens_per_second and device["pool"] are the price: a bound,
    not a promise. A pool that holds all blocks of a row misses none.
    Raises ValueError for another attention, and for an optimum that was not measured.
    """
    require_type("report", report, LocalityReport, "Pass what Selections.report returns.")
    require_type("config", config, ModelConfig, "Pass model.config.")
    require_one_of("policy", policy, get_args(Policy))
    if config.attention != report.attention:
        got = f"{config.attention} for {report.attention}"
        raise bad_value("config", "must have the attention that the report measured", got, "Use config.with_attention.")
    measured = report.misses if policy == "lru" else report.optimal_misses
    if not measured:
        raise bad_value("report", "must have the misses of the offline optimum", "none", "Report with belady=True.")
    return {
        slots: plan(
            config,
            batch,
            max_length,
            CacheConfig(slots=slots),
            dtype=dtype,
            misses=float(misses.mean()),
            link_bytes_per_second=link_bytes_per_second,
            hbm_bytes_per_second=hbm_bytes_per_second,
        )
        for slots, misses in measured.items()
    }


def cost_table(costs: Mapping[str, Mapping[int, Plan]]) -> str:
    """Methods by name, each with its `pool_costs`: a line per method and pool."""
    head = ("", "slots", "pool, GB", "fetched", "MiB/token", "ms/step", "tokens/s")
    lines = [
        (
            name,
            f"{slots}",
            f"{cost.device['pool'] / GB:.3f}",
            f"{cost.misses_per_step:.2f}",
            f"{cost.pcie_bytes_per_token / 2**20:.3f}",
            f"{1e3 * cost.seconds_per_step:.3f}",
            f"{cost.tokens_per_second:,.0f}",
        )
        for name, plans in costs.items()
        for slots, cost in plans.items()
    ]
    first = max(len(line[0]) for line in (head, *lines))
    return "\n".join(line[0].ljust(first) + "".join(f"{cell:>12}" for cell in line[1:]) for line in (head, *lines))
