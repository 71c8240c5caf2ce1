"""What a decode step reads and moves: weights, blocks, and how many of these a pool is expected to miss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nosa_jax.config import ModelConfig
from nosa_jax.model import NosaLM
from pallas_kernels import blocks

# Blocks fetched per step, layer, KV head and row by a least-recently-used pool of `slots` blocks, as a share of the
# selection J, by slots / J. NOSA: 3.58, 1.20, 0.86 and 0.71 of 64 blocks at 64, 80, 96 and 128 slots (third-party
# measurement of NOSA-8B). InfLLMv2: its published mean overlap is 0.889 against NOSA's 0.944, scaled alike.
_MISS_SHARE = ((1.0, 3.58 / 64), (1.25, 1.20 / 64), (1.5, 0.86 / 64), (2.0, 0.71 / 64))
_MISS_FACTOR = {"nosa": 1.0, "dma": 1.0, "infllmv2": (1 - 0.889) / (1 - 0.944), "full": 0.0}


class StepBytes(NamedTuple):
    """Bytes that one decode step of a batch moves. device: read from device memory. link: between host and device."""

    device: int
    link: float


def step_bytes(
    config: ModelConfig, lengths: Iterable[int], *, dtype: Any = jnp.bfloat16, fetched: float | int, offloaded: bool
) -> StepBytes:
    """What a decode step of rows of `lengths` tokens must move.

    From device memory it reads the weights once, and for each row, layer and KV head the selected blocks with the bias
    of their tokens, and the pooled keys that are scored. Across the link go the blocks that are fetched, `fetched` per
    row, layer and KV head, and those that fill up and are written back, one every `block_size` steps.

    lengths: tokens in the cache of each row.   dtype: of weights and cache.   offloaded: whether the cache is in host
    memory; without, nothing crosses.
    """
    attention, itemsize = config.attention, jnp.dtype(dtype).itemsize
    block_bytes = blocks.block_bytes(attention.block_size, config.head_dim, itemsize)
    attended_bytes = block_bytes + (4 * attention.block_size if attention.uses_importance else 0)
    read, rows = 0, 0
    for length in lengths:
        held = blocks.num_blocks(int(length), attention.block_size)
        read += attended_bytes * (min(attention.num_selected_blocks, held) if attention.is_sparse else held)
        if attention.uses_query_scores:
            read += blocks.num_windows(int(length), attention.pooling_stride) * config.head_dim * itemsize
        rows += 1
    heads = config.num_layers * config.num_kv_heads
    crossing = heads * rows * (fetched + 1 / attention.block_size) * block_bytes if offloaded else 0.0
    return StepBytes(weights_of(config, jnp.dtype(dtype)).read + heads * read, crossing)


def parameter_bytes(config: ModelConfig, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of all parameters of a model of this configuration in `dtype`; importance is float32 in any."""
    return weights_of(config, jnp.dtype(dtype)).all


class Weights(NamedTuple):
    """Bytes of all parameters, and of those that a decode step reads."""

    all: int
    read: int


@functools.lru_cache(maxsize=64)
def weights_of(config: ModelConfig, dtype: np.dtype) -> Weights:
    model = nnx.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    size = lambda part: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
    # Of the input embedding a step reads a row per token; it counts where it is the output's, too.
    return Weights(size(model), size(model) - (0 if config.tie_embeddings else size(model.embed)))


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
