"""`nosa train`: local text in, checkpoints and a Hugging Face folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import nosa_jax
from nosa_jax import train
from nosa_jax._extras import require_extras
from nosa_jax.cli.plan import PresetName, preset
from nosa_jax.cli.terminal import facts, heading, working
from nosa_jax.config import Variant
from nosa_jax.hf import ByteTokenizer
from nosa_jax.hf.save import check_folder
from nosa_jax.model import Remat
from nosa_jax.train import Corpus, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on the bytes of local text, with checkpoints, and save it as a Hugging Face folder."""

    preset: PresetName = "tiny"
    """Shape of the model."""
    variant: Variant = "nosa"
    """How the model selects blocks."""
    files: tuple[str, ...] = ()
    """Files, folders or globs to read; default: the source of Python's standard library."""
    heldout_fraction: float = 0.05
    """Share of the text, in whole files where that comes close, that is not trained on but evaluated."""
    out: Path | None = None
    """Folder for checkpoints, log and model; default: runs/PRESET-VARIANT."""
    resume: bool = False
    """Continue from the newest checkpoint in the folder of --out."""

    steps: int = TrainConfig.steps
    """Steps of the whole run, the horizon of the learning rate."""
    batch_size: int = TrainConfig.batch_size
    """Windows of text per step."""
    length: int = TrainConfig.length
    """Tokens per window."""
    accumulate: int = TrainConfig.accumulate
    """Parts that a batch is split into to save memory."""
    remat: Remat = TrainConfig.remat
    """Recompute each layer in the backward pass: slower, in less memory."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = TrainConfig.compute_dtype
    """Dtype of the forward and backward pass; auto: float32 on a CPU, bfloat16 elsewhere."""
    seed: int = TrainConfig.seed
    """Seed of the initial weights and of the order of the text."""
    log_every: int = TrainConfig.log_every
    """Steps between two records of the log."""
    eval_every: int = TrainConfig.eval_every
    """Steps between two evaluations; 0: only at the end."""
    eval_batches: int = TrainConfig.eval_batches
    """Held-out batches per evaluation, at most."""
    checkpoint_every: int = TrainConfig.checkpoint_every
    """Steps between two checkpoints; 0: only at the end."""
    keep_checkpoints: int = TrainConfig.keep_checkpoints
    """How many of the newest checkpoints stay."""
    trainable: tuple[str, ...] = ("*",)
    """Glob patterns over the names of the parameters that train; or: everything, importance."""
    loss_chunk: int | None = TrainConfig.loss_chunk
    """Positions of each row whose logits are made at a time; default: by memory."""
    z_loss: float = TrainConfig.z_loss
    """Weight of the squared logarithm of the softmax's denominator in the loss."""

    learning_rate: float = OptimizerConfig.learning_rate
    """Learning rate of the stable phase of the schedule."""
    final_learning_rate: float = OptimizerConfig.final_learning_rate
    """Learning rate that the last step reaches."""
    warmup_fraction: float = OptimizerConfig.warmup_fraction
    """Share of the steps, the first ones, in which the learning rate rises."""
    decay_fraction: float = OptimizerConfig.decay_fraction
    """Share of the steps, the last ones, in which the learning rate falls."""
    beta1: float = OptimizerConfig.beta1
    """Adam's decay of the first moment."""
    beta2: float = OptimizerConfig.beta2
    """Adam's decay of the second moment."""
    epsilon: float = OptimizerConfig.epsilon
    """Adam's term against division by zero."""
    weight_decay: float = OptimizerConfig.weight_decay
    """Matrices are pulled towards 0 by this times the learning rate."""
    clip_norm: float = OptimizerConfig.clip_norm
    """Gradients with a larger norm are scaled down to it."""
    schedule: Literal["wsd", "cosine", "constant"] = OptimizerConfig.schedule
    """Course of the learning rate: warmup, stable and decay; half a cosine; or no decay."""
    moment_dtype: Literal["float32", "bfloat16"] = OptimizerConfig.moment_dtype
    """Dtype in which Adam's moments are kept."""
    learning_rate_multipliers: tuple[tuple[str, float], ...] = OptimizerConfig.learning_rate_multipliers
    """Patterns over names of parameters, each with a factor of the learning rate."""
    weight_decays: tuple[tuple[str, float], ...] = OptimizerConfig.weight_decays
    """Patterns over names of parameters, each with the weight decay of what it matches."""
    clip_norms: tuple[tuple[str, float], ...] = OptimizerConfig.clip_norms
    """Patterns over names of parameters, each with the norm that their gradients are scaled down to."""

    def config(self) -> TrainConfig:
        """The run that the flags describe."""
        optimizer = OptimizerConfig(**self._fields_of(OptimizerConfig))
        return TrainConfig(preset(self.preset, self.variant), optimizer, **self._fields_of(TrainConfig))

    def _fields_of(self, cls: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("model", "optimizer")]
        return {name: getattr(self, name) for name in names}

    def run(self) -> int:
        require_extras("train", "hf")
        config = self.config()
        out = Path("runs", f"{self.preset}-{self.variant}") if self.out is None else self.out
        check_folder(out / "model")
        corpus = read_corpus(self.files, self.heldout_fraction)
        heading(f"Training {self.preset} ({self.variant}) for {config.steps} steps")
        facts([("text", describe(corpus)), ("folder", out)])
        result = train.train(config, corpus, out, resume=self.resume)
        with working("writing the model"):
            nosa_jax.save_pretrained(result.model, out / "model", tokenizer=ByteTokenizer())
        heading(f"{'Interrupted' if result.interrupted else 'Done'} after step {result.step}")
        loss = f"{result.evaluations[-1]['bits_per_byte']:.4f} bits per byte" if result.evaluations else "not evaluated"
        facts(
            [
                ("held-out loss", loss),
                ("checkpoints", f"{out / 'checkpoints'} (the same command with --resume continues)"),
                ("log", out / "log.jsonl"),
                ("model", f'{out / "model"} (nosa generate {out / "model"} --prompt "...")'),
            ]
        )
        return 130 if result.interrupted else 0


def read_corpus(files: tuple[str, ...] = (), heldout_fraction: float = 0.05) -> Corpus:
    """The corpus of `files` (folders, globs), or of Python's standard library where there are none."""
    with working("reading the text"):
        found = train.find_files(*files) if files else train.stdlib_files()
        return train.load_corpus(found, heldout_fraction=heldout_fraction)


def describe(corpus: Corpus) -> str:
    """The size of a corpus in words."""
    return f"{len(corpus.train) / 1e6:.2f} MB to train on, {len(corpus.heldout) / 1e6:.2f} MB held out"
