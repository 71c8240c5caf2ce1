"""Floating-point operations of training, and how much of a card they take.

    from nosa_jax import presets
    from nosa_jax.train import flops_per_token, mfu, peak_flops

    flops = flops_per_token(presets.nosa_1b(), length=16384)
    share = mfu(28_000, presets.nosa_1b(), 16384, peak=peak_flops("NVIDIA H200"))

What is counted is what the model needs, not what a program does: `flops_per_token` states the rule.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from nosa_jax.config import ModelConfig
from pallas_kernels.checks import require_int, require_number, require_type

# Dense 16-bit rates of whole cards by the name that JAX gives them, from the vendor's data sheets.
_PEAKS = (
    ("*MIG*", None),  # a part of a card
    ("*H100 PCIe*", 756e12),
    ("*H100 NVL*", 835e12),
    ("*H200 NVL*", 835e12),
    ("*H100*", 989e12),
    ("*H200*", 989e12),
    ("*A100*", 312e12),
)


class FlopsPerToken(NamedTuple):
    """matmul: of matrices of parameters. attention: of queries with keys and values. selection: of queries with pooled
    keys, to select blocks. Mean over the tokens of a row."""

    matmul: float
    attention: float
    selection: float


def flops_per_token(config: ModelConfig, length: int) -> FlopsPerToken:
    """Floating-point operations that training needs per token, in rows of `length` tokens.

    config: the model.
    length: tokens of a row, one document.

    The rule: a product of matrices takes 2 per multiply and add; the backward pass takes twice the forward pass, so all
    is counted 3 times, and what is recomputed to save memory is not counted. Looking up embeddings, norms, RoPE and
    softmax are not counted. Attention counts the keys that a query sees: all up to itself for `full`, and those of
    `num_selected_blocks` blocks at most, its own up to itself, for the others. Scores of pooled keys are only computed
    forward: once.
    """
    require_type("config", config, ModelConfig, "See presets.")
    require_int("length", length, 1)
    attention, heads, dim = config.attention, config.num_heads, config.head_dim
    weights = config.hidden_size * config.num_kv_heads * (config.group_size + 2) * dim
    weights += heads * dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    if attention.uses_importance:
        weights += config.num_kv_heads * dim * config.num_kv_heads
    matmul = 2 * (config.num_layers * weights + config.hidden_size * config.vocab_size)

    per_key = 2 * config.num_layers * heads * dim
    budget = attention.num_selected_blocks if attention.is_sparse else None
    seen = _keys_seen(length, attention.block_size, budget)
    scored = 0
    if attention.uses_query_scores:
        scored = _pooled_keys_seen(length, attention.pooling_window, attention.pooling_stride)
    return FlopsPerToken(3.0 * matmul, 3.0 * 2 * per_key * seen / length, float(per_key * scored / length))


def peak_flops(device_kind: str) -> float | None:
    """Dense 16-bit floating-point operations per second of a card, None where it is not known.

    device_kind: the name of the card, `jax.devices()[0].device_kind`.
    """
    return next((peak for pattern, peak in _PEAKS if fnmatchcase(device_kind, pattern)), None)


def mfu(
    tokens_per_second: int | float, config: ModelConfig, length: int, *, peak: float | None, devices: int = 1
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that matrices and attention take; None without a peak.

    tokens_per_second: of all devices together.
    config, length: as for `flops_per_token`. Selecting is not counted: it is a way to do with less attention.
    peak: operations per second of one device, see `peak_flops`.
    devices: how many there are.
    """
    require_number("tokens_per_second", tokens_per_second, 0.0)
    require_int("devices", devices, 1)
    if peak is None:
        return None
    require_number("peak", peak, 1.0)
    flops = flops_per_token(config, length)
    return tokens_per_second * (flops.matmul + flops.attention) / (peak * devices)


def _keys_seen(length: int, block_size: int, budget: int | None) -> int:
    """Keys seen by all queries of a row: t + 1 by that at t, less the whole blocks that are beyond the budget."""
    seen = length * (length + 1) // 2
    if budget is None:
        return seen
    # The query at t has t // block_size + 1 blocks at hand; those of one block of queries miss equally many.
    blocks, rest = divmod(length, block_size)
    beyond = max(blocks - budget, 0)  # full blocks of queries miss 1, 2, ..., beyond blocks
    missed = block_size * beyond * (beyond + 1) // 2 + rest * max(blocks + 1 - budget, 0)
    return seen - block_size * missed


def _pooled_keys_seen(length: int, window: int, stride: int) -> int:
    """Pooled keys that lie at or before their query, over all queries of a row."""
    # Window i ends at token i * stride + window - 1 and is seen by that token and those after it.
    count = max((length - window) // stride + 1, 0)
    return count * (length - window + 1) - stride * count * (count - 1) // 2
