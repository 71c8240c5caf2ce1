"""The dense model that every arm begins with.

    python -m experiments.study.dense --model models/smollm2-135m --output runs/study/dense

trains the downloaded model on, with dense attention, on the text of the study: its weights were of 4 bits, and its text
another one. Arms that all began with it would first repair that, each in its own way.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax

from experiments.study.arms import SIZES, Size, completed
from experiments.study.held import study_text
from nosa_jax import ModelConfig, NosaLM, from_pretrained, parallel, presets, save_pretrained, train
from nosa_jax.hf import load_tokenizer
from nosa_jax.train import OptimizerConfig, TrainConfig

SEED = 100  # no arm has it


def small_dense(size: Size, source: train.Source) -> NosaLM:
    """A dense model for a CPU, trained here on the text that the arms are continued on. Raises KeyboardInterrupt where
    that was ended."""
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", weight_decay=0.0)
    return completed(_run(presets.tiny(variant="full"), optimizer, size), source).model


def trained_on(model: NosaLM, size: Size, source: train.Source) -> NosaLM:
    """The model after the dense stage, on all devices that share the batch evenly. Raises KeyboardInterrupt where that
    was ended."""
    optimizer = OptimizerConfig(
        learning_rate=size.learning_rate, final_learning_rate=size.learning_rate / 10, schedule="cosine",
        weight_decay=0.0,
    )  # fmt: skip
    run = _run(model.config, optimizer, size)
    devices = math.gcd(size.batch_size, jax.device_count())
    mesh = parallel.make_mesh(data=devices, devices=jax.devices()[:devices]) if devices > 1 else None
    return completed(run, source, model=model, mesh=mesh).model


def _run(config: ModelConfig, optimizer: OptimizerConfig, size: Size) -> TrainConfig:
    return TrainConfig(
        config, optimizer, steps=size.dense_steps, batch_size=size.batch_size, length=size.length, seed=SEED,
        eval_every=0, eval_batches=1, checkpoint_every=0,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the dense model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model after the stage")
    args = parser.parse_args(arguments)
    size = SIZES["gpu"]
    model = from_pretrained(args.model, variant="full")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    held = study_text(size, tokenizer, args.output.parent / "text.pickle")
    save_pretrained(trained_on(model, size, held.source), args.output)


if __name__ == "__main__":
    main()
