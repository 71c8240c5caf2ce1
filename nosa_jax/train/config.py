"""What a training run is."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from typing import Any, Literal

from nosa_jax._json import parse_object
from nosa_jax._paths import replacing, user_path
from nosa_jax.config import ModelConfig
from nosa_jax.model import Remat, as_remat
from nosa_jax.train.fields import from_fields
from nosa_jax.train.optim import OptimizerConfig
from nosa_jax.train.patterns import as_patterns
from nosa_jax.train.profile import as_profile_steps
from pallas_kernels.checks import bad_type, bad_value, require_bool, require_int, require_number
from pallas_kernels.device import current_device


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    model: what is trained, e.g. `presets.tiny(variant="infllmv2")`.
    steps: how many the whole run takes, which is the horizon of the learning rate schedule.
    batch_size, length: windows per step and target tokens per window.
    accumulate: parts a batch is split into to save memory; divides `batch_size`.
    remat: recompute each layer in the backward pass, slower in less memory; "offload" keeps what enters each layer in
        host memory, for less still.
    compute_dtype: dtype of the forward and backward pass; "auto" is float32 on a CPU and bfloat16 elsewhere.
    seed: seed of the initial weights and of the order of the data.
    log_every: steps between two log records (the first and the last step are always logged).
    eval_every, checkpoint_every: steps between two of them; 0 leaves only the one at the end.
    eval_batches: held-out batches per evaluation, at most.
    eval_selection: whether evaluations of sparse variants measure the selection, too: gamma, misses and bias.
    keep_checkpoints: how many of the newest stay on disk.
    keep_every: checkpoints of steps that this divides stay, too; 0 for none.
    trainable: glob patterns over the dotted names of parameters, e.g. `("*importance*", "*norm")`; what none matches
        stays as it is and needs no gradients and no moments. "importance" and "everything" are short for two of them.
    loss_chunk: positions of each row whose logits are made at a time, see `chunked_loss`; None decides by memory.
    max_skipped: a run ends after so many steps in a row whose loss or gradient is not finite; these change nothing.
    profile_steps: first and last step of a trace for TensorBoard's profiler, in `profile/` of the run's folder.
    z_loss: weight of the squared logarithm of the softmax's denominator in what is minimised; 0 is without.

    Raises TypeError or ValueError when a field is out of range.
    """

    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 500
    batch_size: int = 2
    length: int = 512
    accumulate: int = 1
    remat: Remat = False
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 32
    eval_selection: bool = True
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_every: int = 0
    trainable: str | tuple[str, ...] = ("*",)
    loss_chunk: int | None = None
    z_loss: float = 0.0
    max_skipped: int = 10
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise bad_type("TrainConfig.model", "must be a ModelConfig", type(self.model).__name__, "See presets.")
        for name in (
            "steps",
            "batch_size",
            "length",
            "accumulate",
            "log_every",
            "eval_batches",
            "keep_checkpoints",
            "max_skipped",
        ):
            object.__setattr__(self, name, require_int(f"TrainConfig.{name}", getattr(self, name), 1))
        for name in ("seed", "eval_every", "checkpoint_every", "keep_every"):
            object.__setattr__(self, name, require_int(f"TrainConfig.{name}", getattr(self, name), 0))
        object.__setattr__(self, "remat", as_remat("TrainConfig.remat", self.remat))
        object.__setattr__(self, "eval_selection", require_bool("TrainConfig.eval_selection", self.eval_selection))
        object.__setattr__(self, "profile_steps", as_profile_steps("TrainConfig.profile_steps", self.profile_steps))
        object.__setattr__(self, "trainable", as_patterns("TrainConfig.trainable", self.trainable))
        object.__setattr__(self, "z_loss", require_number("TrainConfig.z_loss", self.z_loss, 0.0, 1.0))
        if self.loss_chunk is not None:
            object.__setattr__(self, "loss_chunk", require_int("TrainConfig.loss_chunk", self.loss_chunk, 1))
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

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, the model and the optimizer as dictionaries of their own."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. What is not given has its default; `model` must be given.

        Raises ValueError or TypeError for unknown fields, missing ones and values out of range, by name.
        """
        return from_fields(cls, fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file that `load` reads; one of the same name is replaced."""
        with replacing(user_path("path", path)) as file:
            file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """The run that a file describes: TOML where its name ends in .toml, else JSON.

        Raises ValueError or TypeError for a file of another form, and as `from_dict` does.
        """
        path = user_path("path", path)
        data = path.read_bytes()
        if path.suffix != ".toml":
            return cls.from_dict(parse_object(str(path), data))
        try:
            return cls.from_dict(tomllib.loads(data.decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise bad_value(str(path), "must be valid TOML", f"({error})", "Correct the file.") from error
