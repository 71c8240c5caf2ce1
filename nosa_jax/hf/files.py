"""The safetensors files of a checkpoint folder: what is in them, and reading it tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nosa_jax._extras import import_extra
from nosa_jax._json import parse_object, refuse_pointer
from nosa_jax.hf.folder import INDEX_NAME, SINGLE_NAME
from pallas_kernels.checks import bad_value


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
        weight_map = _weight_map(folder)
        for file in [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values())):
            with open_safetensors(folder / file) as handle:
                for name in list(handle.keys()):
                    # A file may hold more than the index says of it; what the index passes over is not there.
                    if weight_map is None or weight_map.get(name) == file:
                        part = handle.get_slice(name)
                        self.infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)
        astray = [f"{name} in {file}" for name, file in (weight_map or {}).items() if name not in self.infos]
        if astray:
            remedy = "Copy or download the folder again."
            rule = "must name the file that a tensor lies in"
            raise bad_value(str(folder / INDEX_NAME), rule, f"{', '.join(astray[:5])} ({len(astray)} astray)", remedy)

    def read(self, name: str) -> np.ndarray:
        """A host copy of the tensor `name`, in its stored dtype."""
        # Opened anew each time: a file kept open stays mapped, and what was read of it counts as memory in use.
        with open_safetensors(self._folder / self.infos[name].file) as handle:
            return handle.get_tensor(name)


def open_safetensors(path: Path) -> Any:
    """The open file, as safetensors has it, for numpy. Raises ValueError that names a damaged one."""
    safetensors = import_extra("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        if path.is_file():
            with open(path, "rb") as file:
                refuse_pointer(str(path), file.read(64))
        raise bad_value(
            str(path),
            "must be a whole safetensors file",
            f"({error})",
            "It is damaged or cut short: copy or download it again.",
        ) from error


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file of `folder` holds which tensor, None where one file holds all of them."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return None
        other = sorted(p.name for p in folder.glob("*.bin"))
        raise FileNotFoundError(
            f"path: must hold {SINGLE_NAME} or {INDEX_NAME}, got {folder} with {other or 'neither'}. "
            "Only safetensors checkpoints are read; convert others with save_pretrained of transformers."
        )
    rule = "must be JSON with an object 'weight_map' from tensors to files"
    try:
        weight_map = parse_object(str(index), index.read_bytes()).get("weight_map")
    except ValueError as error:
        raise bad_value(str(index), rule, f"({error})", "Copy or download it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise bad_value(str(index), rule, f"{weight_map!r:.60}", "Copy or download it again.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise bad_value(str(index), "must name files of its own folder", outside, "Copy or download it again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index}: every file it names must lie beside it, {absent} do not. "
            "The download or copy is incomplete: fetch the missing files."
        )
    return weight_map
