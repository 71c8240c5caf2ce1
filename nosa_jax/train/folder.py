"""The folder of a run: what lies in it, and how it is told from other folders."""

from __future__ import annotations

import os
from pathlib import Path

from pallas_kernels.checks import bad_value

LOG_NAME = "log.jsonl"
CHECKPOINTS_NAME = "checkpoints"
PICTURE_NAME = "training.png"
PROFILE_NAME = "profile"
TENSORBOARD_NAME = "tensorboard"
MODEL_NAME = "model"  # a Hugging Face folder, which `nosa train` writes
NOT_FINITE = "not_finite-"  # how the files begin that hold what a step read whose loss was not finite

# Every run has these. The others are common names, which say nothing where both of these are missing.
_MARKS = (LOG_NAME, CHECKPOINTS_NAME)
_WRITTEN = (*_MARKS, PICTURE_NAME, PROFILE_NAME, TENSORBOARD_NAME, "wandb", MODEL_NAME)

# What Orbax writes into every checkpoint.
_CHECKPOINT = "_CHECKPOINT_METADATA"


def check_run_folder(argument: str, folder: Path) -> None:
    """Raises ValueError for a folder that holds something, but no run: a home folder, say."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and not set(_MARKS) & set(names):
        got = f"{folder} with {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        rule, remedy = "must be new, empty, or the folder of a run", f"Name a new one, {folder / 'run'} for example."
        raise bad_value(argument, rule, got, remedy)


def is_part_of_run(path: Path) -> bool:
    """Whether `path` is a checkpoint, or what else a run writes, which lies beside its log and checkpoints."""
    if os.path.exists(path / _CHECKPOINT):
        return True
    run = path.parent
    return (path.name in _WRITTEN or path.name.startswith(NOT_FINITE)) and (
        (run / CHECKPOINTS_NAME).is_dir() and (run / LOG_NAME).is_file()
    )
