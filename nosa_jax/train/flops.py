"""Floating-point operations of training, and how much of a card they take.

    from nosa_jax import presets
    from nosa_jax.train import flops_per_token, mfu, peak_flops

    flops = flops_per_token(presets.nosa_1b(), length=16384)
    share = mfu(28_000, presets.nosa_1b(), 16384, peak=peak_flops("NVIDIA H200"))

What is counted is what the model needs, not what a program does: `flops_per_token` states the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from nosa_jax.config import ModelConfig
from pallas_kernels.checks import bad_value, require_int, require_number, require_type

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
    keys, to select blocks. Mean over the tokens of all documents."""

    matmul: float
    attention: float
    selection: float


def flops_per_token(config: ModelConfig, length: int | Mapping[int, int]) -> FlopsPerToken:
    """Floating-point operations that training needs per token, in documents of `length` tokens.

    config: the model.
    length: tokens of a document, of a row that is one; for packed rows how many documents there are by their tokens,
        {tokens: documents}, see `count_documents`. Padding is of none and is not counted.

    The rule: a product of matrices takes 2 per multiply and add; the backward pass takes twice the forward pass, so all
    is counted 3 times, and what is recomputed to save memory is not counted. Looking up embeddings, norms, RoPE and
    softmax are not counted. Attention counts the keys that a query sees: all up to itself for `full`, and those of
    `num_selected_blocks` blocks at most, its own up to itself, for the others. Scores of pooled keys are only computed
    forward: once.
    """
    require_type("config", config, ModelConfig, "See presets.")
    lengths = _lengths(length)
    tokens = sum(size * count for size, count in lengths.items())
    attention, heads, dim = config.attention, config.num_heads, config.head_dim
    weights = config.hidden_size * config.num_kv_heads * (config.group_size + 2) * dim
    weights += heads * dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    if attention.uses_importance:
        weights += config.num_kv_heads * dim * config.num_kv_heads
    matmul = 2 * (config.num_layers * weights + config.hidden_size * config.vocab_size)

    per_key = 2 * config.num_layers * heads * dim
    budget = attention.num_selected_blocks if attention.is_sparse else None
    seen = sum(count * _keys_seen(size, attention.block_size, budget) for size, count in lengths.items())
    scored = 0
    if attention.uses_query_scores:
        window, stride = attention.pooling_window, attention.pooling_stride
        scored = sum(count * _pooled_keys_seen(size, window, stride) for size, count in lengths.items())
    return FlopsPerToken(3.0 * matmul, 3.0 * 2 * per_key * seen / tokens, float(per_key * scored / tokens))


def count_documents(segment_ids: Any) -> Counter[int]:
    """How many documents rows hold by their tokens: runs of one id, of those that are not negative, as padding is.

    segment_ids: ints [B, T] on the host, as in `Batch`.
    """
    ids = np.asarray(segment_ids)
    begins = np.ones(ids.shape, bool)  # a row goes on in no other one
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(starts, ids.size))[ids.ravel()[starts] >= 0]
    return Counter(sizes.tolist())


def _lengths(length: int | Mapping[int, int]) -> Mapping[int, int]:
    if not isinstance(length, Mapping):
        return {require_int("length", length, 1): 1}
    if not length:
        raise bad_value("length", "must hold at least one document", "{}", "Pass {tokens: documents}.")
    for size, count in length.items():
        require_int("length: tokens of a document", size, 1)
        require_int(f"length[{size}]", count, 1)
    return length


def peak_flops(device_kind: str) -> float | None:
    """Dense 16-bit floating-point operations per second of a card, None where it is not known.

    device_kind: the name of the card, `jax.devices()[0].device_kind`.
    """
    return next((peak for pattern, peak in _PEAKS if fnmatchcase(device_kind, pattern)), None)


def mfu(
    tokens_per_second: int | float,
    config: ModelConfig,
    length: int | Mapping[int, int],
    *,
    peak: float | None,
    devices: int = 1,
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that matrices and attention take; None without a peak.

    tokens_per_second: of all devices together, padding left out.
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
