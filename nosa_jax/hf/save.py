"""A model becomes a local Hugging Face folder."""

from __future__ import annotations

import json
import math
import operator
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from nosa_jax import parallel, processes
from nosa_jax._extras import import_extra
from nosa_jax._json import parse_object
from nosa_jax._paths import user_path
from nosa_jax.hf.architectures import MODEL_TYPES
from nosa_jax.hf.carried import carried
from nosa_jax.hf.config_json import render_config
from nosa_jax.hf.folder import (
    INDEX_NAME,
    PARTIAL,
    SINGLE_NAME,
    locked,
    partial_folder,
    swap_in,
    tidy,
)
from nosa_jax.hf.keymap import Piece, model_pieces
from nosa_jax.hf.load import check_dtype
from nosa_jax.hf.tokenizer import ByteTokenizer, FileTokenizer
from nosa_jax.model import NosaLM
from nosa_jax.origin import CONFIG_NAME
from pallas_kernels.checks import bad_type, require_int


def save_pretrained(
    model: NosaLM,
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer: ByteTokenizer | FileTokenizer | None = None,
) -> None:
    """Writes `model` to the folder `path`: a Hugging Face config.json and safetensors.

    dtype: of the weights in the files; None keeps the model's. Importance (A and delta) is written in that dtype where
        this loses nothing, else in float32.
    max_shard_bytes: larger models are split into files of at most this size (a larger tensor gets a file of its own).
    tokenizer: is written as tokenizer.json, so that the folder says what its tokens are. Files of another tokenizer are
        not carried along and do not stay, nor do end-of-text ids that were ids of another one.

    A `full` model goes out as the architecture that it was loaded as, a new one as the one that its biases and norms
    make it (Llama, Qwen2 or Qwen3). The others, and a `full` one that is none of these, are of the type `nosa_llama`,
    which libraries that do not know it refuse: as a Llama they would compute something else.

    What the folder that `model` was loaded from says beyond the model (end-of-text ids and other keys of config.json,
    generation_config.json, the tokenizer's files) is written too.

    `path` may be new, an empty folder, or a folder with a checkpoint of a type that `from_pretrained` reads, whose
    config and safetensors are then replaced while its other files (a tokenizer, say) stay; a generation_config.json
    goes too where the vocabulary has another size. Anything else is refused. All files are written to a hidden folder
    first, inside `path` or, where that is new, beside it, and moved at the end: a failure leaves `path` as it was
    (where it was killed while it moved files, the next call does), and of two who write at once the last one wins
    whole.

    A model on a mesh is written whole. Of several processes, all of which must call, the first one writes.

    Raises FileExistsError for a `path` that is refused, ImportError without the extra `hf`, TypeError and ValueError
    for bad arguments. Warns where a tokenizer in `path` differs from the model's.
    """
    if not isinstance(model, NosaLM):
        raise bad_type("model", "must be a NosaLM", type(model).__name__, "Pass the model itself, not its state.")
    require_int("max_shard_bytes", max_shard_bytes, 1)
    if not isinstance(tokenizer, ByteTokenizer | FileTokenizer | None):
        raise bad_type("tokenizer", "must be a tokenizer of nosa_jax.hf", f"{tokenizer!r:.60}", "Use ByteTokenizer().")
    weights_dtype = check_dtype(model.embed[...].dtype if dtype is None else dtype)
    if parallel.concrete_mesh(model) is not None:
        model = processes.whole(model)
    with processes.writing("writing the folder") as writes:
        if writes:
            _save(model, path, weights_dtype, max_shard_bytes, tokenizer)


def _save(model: NosaLM, path: Any, weights_dtype: np.dtype, max_shard_bytes: int, tokenizer: Any) -> None:
    folder = user_path("path", path).resolve()
    replaced = _replaced_config(folder)
    beside, leaving = carried(model, folder, replaced, tokenizer)
    config = render_config(model.config, weights_dtype.name, dict(beside.config), model.origin.model_type)
    with partial_folder(folder) as partial:
        _write(model, partial, weights_dtype, max_shard_bytes, config)
        for name, data in beside.files.items():
            (partial / name).write_bytes(data)
        swap_in(partial, folder, leaving)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where `save_pretrained` would refuse `path`, before there is anything to lose."""
    _replaced_config(user_path("path", path).resolve())


def _replaced_config(folder: Path) -> dict[str, Any]:
    """The config.json that is replaced, empty without one. Raises FileExistsError for a folder of something else."""
    if not folder.exists():
        return {}
    try:
        tidy(folder)  # the checkpoint may lie where a killed writer had moved it to
        with locked(folder, shared=True):  # never while another writer moves its files in
            if all(name.startswith(PARTIAL) for name in os.listdir(folder)):
                return {}
            raw = parse_object(CONFIG_NAME, (folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        raw = {}
    if raw.get("model_type") not in MODEL_TYPES:
        raise FileExistsError(
            f"path: must be new, empty, or a folder with a Llama, Qwen, Mistral or NOSA checkpoint, got {folder}. "
            "Choose another path or empty that folder."
        )
    return raw


def _write(model: NosaLM, folder: Path, dtype: np.dtype, max_shard_bytes: int, config: dict[str, Any]) -> None:
    config_file = folder / CONFIG_NAME
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
