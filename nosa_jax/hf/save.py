"""A model becomes a local Hugging Face folder."""

from __future__ import annotations

import fnmatch
import json
import math
import operator
import os
import shutil
import uuid
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from nosa_jax._extras import import_extra
from nosa_jax.hf.config_json import CONFIG_NAME, render_config
from nosa_jax.hf.files import INDEX_NAME, SINGLE_NAME
from nosa_jax.hf.keymap import Piece, model_pieces
from nosa_jax.hf.load import check_dtype
from nosa_jax.model import NosaLM
from pallas_kernels.checks import bad_type, bad_value


def save_pretrained(
    model: NosaLM,
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes `model` to the folder `path`: a Hugging Face Llama config.json and safetensors.

    dtype: of the weights in the files; None keeps the model's. Importance (A and delta) is written in that dtype where
        this loses nothing, else in float32.
    max_shard_bytes: larger models are split into files of at most this size (a larger tensor gets a file of its own).

    `path` may be new, an empty folder, or a folder with a Llama checkpoint, whose config and safetensors are then
    replaced while its other files (a tokenizer, say) stay. Anything else is refused. All files are written beside
    `path` first and moved there at the end, so a failure leaves `path` as it was.

    Raises FileExistsError for a `path` that is refused, ImportError without the extra `hf`, TypeError and ValueError
    for bad arguments.
    """
    if not isinstance(model, NosaLM):
        raise bad_type("model", "must be a NosaLM", type(model).__name__, "Pass the model itself, not its state.")
    if max_shard_bytes < 1:
        raise bad_value("max_shard_bytes", "must be >= 1", max_shard_bytes, "The default is 5 GiB.")
    weights_dtype = check_dtype(model.embed[...].dtype if dtype is None else dtype)
    folder = Path(path).resolve()
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        _write(model, partial, weights_dtype, max_shard_bytes)
        _swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where `save_pretrained` would refuse `path`, before there is anything to lose."""
    _refuse_foreign(Path(path).expanduser().resolve())


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"] == "llama"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"path: must be new, empty, or a folder with a Llama checkpoint to replace, got {folder}. "
            "Choose another path or empty that folder."
        )


def _write(model: NosaLM, folder: Path, dtype: np.dtype, max_shard_bytes: int) -> None:
    config_file = folder / CONFIG_NAME
    config_file.write_text(json.dumps(render_config(model.config, dtype.name), indent=2) + "\n", encoding="utf-8")
    importance = model.layers.attention.importance is not None
    dtypes = {
        piece: _importance_dtype(model, piece, dtype) if piece.is_importance else dtype
        for piece in model_pieces(model.config, importance=importance)
    }
    shards = _split(dtypes, max_shard_bytes)
    total = sum(_num_bytes(piece, dtype) for piece, dtype in dtypes.items())
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(model, folder / name, {piece: dtypes[piece] for piece in shard})
        # safetensors makes its files private to the user.
        (folder / name).chmod(config_file.stat().st_mode)
        weight_map |= {piece.name: name for piece in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(model: NosaLM, file: Path, dtypes: dict[Piece, np.dtype]) -> None:
    tensors = {piece.name: _tensor(model, piece, dtype) for piece, dtype in dtypes.items()}
    # Transformers refuses files without this note; the bytes are the same for every framework.
    import_extra("safetensors.numpy").save_file(tensors, file, metadata={"format": "pt"})


def _tensor(model: NosaLM, piece: Piece, dtype: np.dtype) -> np.ndarray:
    # Cut on the device, so that the host never holds more than one shard.
    part = piece.view(operator.attrgetter(piece.target)(model)[...])
    return np.ascontiguousarray(jax.device_get(part).astype(dtype, copy=False)).reshape(piece.shape)


def _importance_dtype(model: NosaLM, piece: Piece, dtype: np.dtype) -> np.dtype:
    values = _tensor(model, piece, np.dtype(np.float32))
    exact = np.array_equal(values.astype(dtype).astype(np.float32), values)
    return dtype if exact else values.dtype


def _num_bytes(piece: Piece, dtype: np.dtype) -> int:
    return math.prod(piece.shape) * dtype.itemsize


def _split(dtypes: dict[Piece, np.dtype], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece, dtype in dtypes.items():
        if shards[-1] and size + _num_bytes(piece, dtype) > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += _num_bytes(piece, dtype)
    return shards


def _swap_in(partial: Path, folder: Path) -> None:
    """Puts `partial` in the place of `folder`, taking over the files of `folder` that are not weights."""
    if not folder.exists():
        partial.rename(folder)
        return
    shutil.copytree(folder, partial, dirs_exist_ok=True, symlinks=True, ignore=_replaced, copy_function=_link)
    old = partial.with_name(f"{partial.name}.old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaced(directory: str, names: list[str]) -> set[str]:
    patterns = (CONFIG_NAME, SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors")
    return {name for name in names for pattern in patterns if fnmatch.fnmatch(name, pattern)}


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)
