"""What a training run is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from nosa_jax.config import ModelConfig
from nosa_jax.train.optim import OptimizerConfig
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int
from pallas_kernels.device import current_device


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    model: what is trained, e.g. `presets.tiny(variant="infllmv2")`.
    steps: how many the whole run takes, which is the horizon of the learning rate schedule.
    batch_size, length: windows per step and target tokens per window.
    accumulate: parts a batch is split into to save memory; divides `batch_size`.
    remat: recompute each layer in the backward pass, slower in less memory.
    compute_dtype: dtype of the forward and backward pass; "auto" is float32 on a CPU and bfloat16 elsewhere.
    seed: seed of the initial weights and of the order of the data.
    log_every: steps between two log records (the first and the last step are always logged).
    eval_every, checkpoint_every: steps between two of them; 0 leaves only the one at the end.
    eval_batches: held-out batches per evaluation, at most.
    keep_checkpoints: how many of the newest stay on disk.

    Raises TypeError or ValueError when a field is out of range.
    """

    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 500
    batch_size: int = 2
    length: int = 512
    accumulate: int = 1
    remat: bool = False
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 32
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise bad_type("TrainConfig.model", "must be a ModelConfig", type(self.model).__name__, "See presets.")
        for name in ("steps", "batch_size", "length", "accumulate", "log_every", "eval_batches", "keep_checkpoints"):
            object.__setattr__(self, name, require_int(f"TrainConfig.{name}", getattr(self, name), 1))
        for name in ("seed", "eval_every", "checkpoint_every"):
            object.__setattr__(self, name, require_int(f"TrainConfig.{name}", getattr(self, name), 0))
        object.__setattr__(self, "remat", require_bool("TrainConfig.remat", self.remat))
        if self.batch_size % self.accumulate:
            raise bad_value(
                "TrainConfig.accumulate", f"must divide batch_size {self.batch_size}", self.accumulate, "Change one."
            )
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise bad_value(
                "TrainConfig.compute_dtype", "must be auto, float32 or bfloat16", repr(self.compute_dtype), "Pick one."
            )

    def resolved_dtype(self) -> str:
        """`compute_dtype` with "auto" decided for the device at hand."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "float32" if current_device().platform == "cpu" else "bfloat16"
