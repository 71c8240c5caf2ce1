"""What the notebooks share: a model to look at, text to train on, and texts that are never trained on.

Jupyter and `python experiments/notebooks/NAME.py` start in, or look into, this folder: they find it as `common`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int32

import nosa_jax
from nosa_jax import ModelConfig, NosaLM, hf, presets, train
from pallas_kernels.checks import bad_value

# Modules of Python's standard library of 70 KB and more, on every machine.
HELD_OUT = ("argparse", "doctest", "inspect", "pydoc", "subprocess", "tarfile", "typing", "mailbox", "turtle")


def small(**attention: Any) -> ModelConfig:
    """The smallest model that still selects: two layers, bytes in, 8 blocks of 16. attention: fields to change."""
    config = dataclasses.replace(
        presets.tiny(), num_layers=2, hidden_size=96, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=24
    )
    return config.with_attention(**attention)


def training_text(tokenizer: Any, config: ModelConfig, length: int) -> train.Source:
    """Packed rows of `length` tokens: source code of Python's standard library, without the modules held out here.

    Nothing of it is held out from training: `heldout_texts` are what models are judged by.
    """
    files = [file for file in train.stdlib_files() if file.stem not in HELD_OUT]
    block_size = config.attention.block_size
    return train.text(files[:80], tokenizer, length=length, block_size=block_size, heldout_fraction=0.0, progress=False)


def heldout_texts(tokenizer: Any, count: int, length: int) -> Int32[np.ndarray, "count length"]:
    """The first `length` tokens of `count` modules that no notebook trains on.

    Raises ValueError where one of them has fewer tokens, or there are fewer of them.
    """
    files = {file.stem: file for file in train.stdlib_files() if file.parent.name != "idlelib"}
    if count > len(HELD_OUT):
        raise bad_value("count", f"must be at most {len(HELD_OUT)}", count, "Add modules to HELD_OUT.")
    rows = [tokenizer.encode(files[name].read_text(encoding="utf-8"))[:length] for name in HELD_OUT[:count]]
    shortest = min(len(row) for row in rows)
    if shortest < length:
        raise bad_value("length", f"must be at most {shortest}, the tokens of the shortest text", length, "Lower it.")
    return np.array(rows, np.int32)


def load_model(
    folder: str | None, attention: dict[str, Any] | None = None, *, variant: str | None = None, steps: int = 80
) -> tuple[NosaLM, Any]:
    """The model of a Hugging Face folder and its tokenizer; without a folder a small one, trained here on bytes.

    attention: fields of AttentionConfig to change, see `nosa_jax.from_pretrained`.
    variant: that it attends by; None takes that of the folder, `nosa` for the small one.
    steps: that the small one is trained for.
    """
    if folder is not None:
        model = nosa_jax.from_pretrained(folder, variant=variant, attention=attention)
        return model, hf.load_tokenizer(folder, model.config.vocab_size)
    config, tokenizer = small(variant=variant or "nosa", **(attention or {})), hf.ByteTokenizer()
    run = train.TrainConfig(config, steps=steps, batch_size=4, length=256)
    return train.train(run, training_text(tokenizer, config, run.length), progress=False).model, tokenizer
