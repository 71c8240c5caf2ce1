"""The safetensors files of a checkpoint folder: what is in them, and reading it tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from nosa_jax._extras import import_extra
from pallas_kernels.checks import bad_value

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """shape and dtype (safetensors' name, e.g. BF16) of a stored tensor and the file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class CheckpointFiles:
    """The tensors of a folder, in one file or in several with an index.

    infos: what is stored, by tensor name.

    Raises FileNotFoundError for absent files, ValueError for unreadable ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.infos: dict[str, TensorInfo] = {}
        for file in _file_names(folder):
            with _open(folder / file) as handle:
                for name in list(handle.keys()):
                    part = handle.get_slice(name)
                    self.infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)

    def read(self, name: str) -> np.ndarray:
        """A host copy of the tensor `name`, in its stored dtype."""
        # Opened anew each time: a file kept open stays mapped, and what was read of it counts as memory in use.
        with _open(self._folder / self.infos[name].file) as handle:
            return handle.get_tensor(name)


def _open(path: Path) -> Any:
    safetensors = import_extra("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise bad_value(
            str(path),
            "must be a whole safetensors file",
            f"({error})",
            "It is damaged or cut short: copy or download it again.",
        ) from error


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        other = sorted(p.name for p in folder.glob("*.bin"))
        raise FileNotFoundError(
            f"path: must hold {SINGLE_NAME} or {INDEX_NAME}, got {folder} with {other or 'neither'}. "
            "Only safetensors checkpoints are read; convert others with save_pretrained of transformers."
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_value(
            str(index), "must be JSON with an object 'weight_map'", f"({error!r})", "Copy or download it again."
        ) from error
    if outside:
        raise bad_value(str(index), "must name files of its own folder", outside, "Copy or download it again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index}: every file it names must lie beside it, {absent} do not. "
            "The download or copy is incomplete: fetch the missing files."
        )
    return names
