"""Training: local text in, a NosaLM out.

    from nosa_jax import presets, train

    corpus = train.load_corpus(train.stdlib_files())
    config = train.TrainConfig(presets.tiny(), steps=20, length=128, eval_batches=4)
    result = train.train(config, corpus, "runs/tiny")
    model = train.load_model("runs/tiny/checkpoints")

Needs the extra `train`: pip install ".[train]" in a checkout.
"""

from nosa_jax.environment import environment
from nosa_jax.train.accumulate import accumulate
from nosa_jax.train.checkpoint import Checkpoints, load_model
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import (
    Batch,
    Batches,
    Corpus,
    Source,
    chat,
    check_vocabulary,
    find_files,
    jsonl,
    load_corpus,
    mixture,
    read_text,
    stdlib_files,
    text,
    tokens,
)
from nosa_jax.train.evaluation import Evaluation, evaluate, evaluate_batches
from nosa_jax.train.fields import model_config_from_dict
from nosa_jax.train.finite import Skipped, keep_if_finite
from nosa_jax.train.flops import FlopsPerToken, count_documents, flops_per_token, mfu, peak_flops
from nosa_jax.train.importance import ImportanceFit, fit_importance
from nosa_jax.train.log import read_log, summary
from nosa_jax.train.loop import TrainResult, train
from nosa_jax.train.loss import LossParts, bits_per_byte, chunked_loss, length_mask, next_token_loss
from nosa_jax.train.metrics import global_norm, norms_by_group
from nosa_jax.train.optim import OptimizerConfig, as_optimizer, learning_rate_schedule, make_optimizer
from nosa_jax.train.patterns import merge, split
from nosa_jax.train.plots import plot_run
from nosa_jax.train.presets import continued, pretrain, sft
from nosa_jax.train.profile import Profiler
from nosa_jax.train.selection import SelectionMeasures, measure_selection
from nosa_jax.train.step import TrainState, batch_loss, init_state, jit_train_step, train_step
from nosa_jax.train.trackers import TensorBoard, Tracker, Trackers, WandB, as_trackers

__all__ = [
    "Batch",
    "Batches",
    "Checkpoints",
    "Corpus",
    "Evaluation",
    "FlopsPerToken",
    "ImportanceFit",
    "LossParts",
    "OptimizerConfig",
    "Profiler",
    "SelectionMeasures",
    "Skipped",
    "Source",
    "TensorBoard",
    "Tracker",
    "Trackers",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "WandB",
    "accumulate",
    "as_optimizer",
    "as_trackers",
    "batch_loss",
    "bits_per_byte",
    "chat",
    "check_vocabulary",
    "chunked_loss",
    "continued",
    "count_documents",
    "environment",
    "evaluate",
    "evaluate_batches",
    "find_files",
    "fit_importance",
    "flops_per_token",
    "global_norm",
    "init_state",
    "jit_train_step",
    "jsonl",
    "keep_if_finite",
    "learning_rate_schedule",
    "length_mask",
    "load_corpus",
    "load_model",
    "make_optimizer",
    "measure_selection",
    "merge",
    "mfu",
    "mixture",
    "model_config_from_dict",
    "next_token_loss",
    "norms_by_group",
    "peak_flops",
    "plot_run",
    "pretrain",
    "read_log",
    "read_text",
    "sft",
    "split",
    "stdlib_files",
    "summary",
    "text",
    "tokens",
    "train",
    "train_step",
]
