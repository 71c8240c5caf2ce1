"""The three stages of the paper's pipeline as training runs.

    import dataclasses
    from nosa_jax import presets
    from nosa_jax.train import presets as recipes

    dense = recipes.pretrain(presets.nosa_1b(), tokens=20e9, batch_size=256)
    sparse = recipes.continued(
        presets.nosa_1b(), tokens=2e9, batch_size=64, learning_rate=1.5e-5, final_learning_rate=1.3e-5
    )
    chat = recipes.sft(sparse.model, tokens=2e8, batch_size=32)
    short = dataclasses.replace(chat, steps=100)

Published are the order of the stages, AdamW with warmup-stable-decay, the lengths of the first two, and of continued
pretraining the tokens and rates: 2.0e9 tokens and 1.5e-5 to 1.3e-5 for the 1B model, 5.0e9 and 3e-4 to 2e-4 for the
8B. Everything else is a choice of this library, made to be changed.
"""

from __future__ import annotations

import math
from typing import Any

from nosa_jax.config import ModelConfig, Variant
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.optim import OptimizerConfig
from pallas_kernels.checks import require_int, require_number


def pretrain(
    model: ModelConfig,
    *,
    tokens: int | float,
    batch_size: int,
    length: int = 4096,
    learning_rate: float = 3e-4,
    **settings: Any,
) -> TrainConfig:
    """The first stage: dense attention (`full`), from weights drawn at random.

    model: its shape; whatever its variant, the run is of `full`.
    tokens: to train on; the steps follow, rounded up.
    batch_size: rows per step.
    length: tokens per row, 4096 as published.
    learning_rate: of the stable phase; it falls to 0 in the last fifth.
    settings: further fields of TrainConfig.
    """
    optimizer = OptimizerConfig(learning_rate, warmup_fraction=0.02, decay_fraction=0.2)
    return _run(model.with_attention(variant="full"), optimizer, tokens, batch_size, length, settings)


def continued(
    model: ModelConfig,
    *,
    tokens: int | float,
    batch_size: int,
    length: int = 16384,
    variant: Variant = "nosa",
    learning_rate: float = 3e-4,
    final_learning_rate: float = 2e-4,
    **settings: Any,
) -> TrainConfig:
    """The second stage: the dense model goes on with the variant switched on, at a rate that falls a little.

    Start it from the dense weights: `train(config, ..., model=nosa_jax.with_attention(dense, variant="nosa"))`. The
    importance head is new then, with A = 0: the model begins as InfLLMv2 would.

    model: its shape; the run is of `variant`.
    tokens: to train on; the steps follow, rounded up.
    batch_size: rows per step.
    length: tokens per row, 16384 as published.
    variant: how blocks are selected from here on. The published comparison has all four from the same start.
    learning_rate, final_learning_rate: of the first and after the last step, in a line between; those of the 8B model
        unless given.
    settings: further fields of TrainConfig, e.g. `trainable="importance"` to leave the dense weights as they are.
    """
    optimizer = OptimizerConfig(learning_rate, final_learning_rate, warmup_fraction=0.0, decay_fraction=1.0)
    return _run(model.with_attention(variant=variant), optimizer, tokens, batch_size, length, settings)


def sft(
    model: ModelConfig,
    *,
    tokens: int | float,
    batch_size: int,
    length: int = 16384,
    learning_rate: float = 1e-5,
    **settings: Any,
) -> TrainConfig:
    """The third stage: supervised fine-tuning on conversations, the variant as it is.

    The loss is of answers alone where the data say so: batches whose mask is True for the tokens of answers.

    model: of the second stage.
    tokens: of the rows, questions and padding included; the steps follow, rounded up.
    batch_size: rows per step.
    length: tokens per row.
    learning_rate: reached after the first few steps; it falls to 0 by half a cosine.
    settings: further fields of TrainConfig.
    """
    optimizer = OptimizerConfig(learning_rate, warmup_fraction=0.03, schedule="cosine", weight_decay=0.0)
    return _run(model, optimizer, tokens, batch_size, length, settings)


def _run(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    tokens: int | float,
    batch_size: int,
    length: int,
    settings: dict[str, Any],
) -> TrainConfig:
    """`settings` have the last word."""
    require_number("tokens", tokens, 1.0)
    per_step = require_int("batch_size", batch_size, 1) * require_int("length", length, 1)
    defaults = {"optimizer": optimizer, "steps": math.ceil(tokens / per_step), "remat": True}
    return TrainConfig(model, batch_size=batch_size, length=length, **{**defaults, **settings})
