"""Training: local text in, a NosaLM out.

    from nosa_jax import presets, train

    corpus = train.load_corpus(train.stdlib_files())
    config = train.TrainConfig(presets.tiny(), steps=20, length=128, eval_batches=4)
    result = train.train(config, corpus, "runs/tiny")
    model = train.load_model("runs/tiny/checkpoints")

Needs the extra `train`: pip install ".[train]" in a checkout.
"""

from nosa_jax.environment import environment
from nosa_jax.train.checkpoint import Checkpoints, load_model, model_config_from_dict
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import (
    Batch,
    Batches,
    Corpus,
    Source,
    chat,
    check_vocabulary,
    find_files,
    heldout_batches,
    jsonl,
    load_corpus,
    mixture,
    read_text,
    stdlib_files,
    text,
    tokens,
    train_batches,
)
from nosa_jax.train.evaluation import Evaluation, evaluate
from nosa_jax.train.log import read_log
from nosa_jax.train.loop import TrainResult, train
from nosa_jax.train.loss import bits_per_byte, length_mask, next_token_loss
from nosa_jax.train.optim import OptimizerConfig, learning_rate_schedule, make_optimizer
from nosa_jax.train.step import TrainState, batch_loss, init_state, jit_train_step, train_step

__all__ = [
    "Batch",
    "Batches",
    "Checkpoints",
    "Corpus",
    "Evaluation",
    "OptimizerConfig",
    "Source",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "batch_loss",
    "bits_per_byte",
    "chat",
    "check_vocabulary",
    "environment",
    "evaluate",
    "find_files",
    "heldout_batches",
    "init_state",
    "jit_train_step",
    "jsonl",
    "learning_rate_schedule",
    "length_mask",
    "load_corpus",
    "load_model",
    "make_optimizer",
    "mixture",
    "model_config_from_dict",
    "next_token_loss",
    "read_log",
    "read_text",
    "stdlib_files",
    "text",
    "tokens",
    "train",
    "train_batches",
    "train_step",
]
