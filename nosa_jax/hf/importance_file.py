"""The importance of a model alone, in one small safetensors file: what may be all that was trained."""

from __future__ import annotations

import json
import operator
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from nosa_jax import processes
from nosa_jax._extras import import_extra
from nosa_jax._paths import replacing, user_path
from nosa_jax.attention.importance import Importance
from nosa_jax.config import ModelConfig
from nosa_jax.convert import with_attention
from nosa_jax.hf.files import open_safetensors
from nosa_jax.hf.keymap import Piece, model_pieces
from nosa_jax.model import NosaLM
from pallas_kernels.checks import bad_value, require_type

_SIZES_KEY = "nosa_importance"  # of the metadata; one key, as several have no order in the file
_SIZES = ("num_layers", "num_kv_heads", "head_dim")


def save_importance(model: NosaLM, path: str | os.PathLike[str]) -> None:
    """Writes the importance of `model` to the file `path`: float32, a few hundred KiB at 8B.

    The tensors have the names of a NOSA folder, `model.layers.N.self_attn.A` [K] and `.delta.weight` [K, K D]; the
    metadata says the sizes of the model. A file that is there is replaced at the end, or not at all.

    Raises ValueError for a model without importance, OSError where there is no such folder or `path` is one,
    ImportError without the extra `hf`, TypeError for arguments of other types.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    if model.layers.attention.importance is None:
        got = f"none, as {model.config.attention.variant!r} needs none"
        remedy = "nosa_jax.with_attention(model, variant='nosa') gives it a new one."
        raise bad_value("model", "must have importance", got, remedy)
    tensors = {}
    for piece in _pieces(model.config):
        values = piece.view(operator.attrgetter(piece.target)(model)[...])
        tensors[piece.name] = np.ascontiguousarray(processes.whole(values)).reshape(piece.shape)
    metadata = {_SIZES_KEY: json.dumps({name: getattr(model.config, name) for name in _SIZES})}
    data = import_extra("safetensors.numpy").save(tensors, metadata=metadata)
    with processes.writing("writing importance") as writes:
        if writes:
            with replacing(user_path("path", path)) as file:
                file.write_bytes(data)


def load_importance(model: NosaLM, path: str | os.PathLike[str]) -> NosaLM:
    """`model` with the importance of a file that `save_importance` wrote; the other parameters are shared, not copied.

    Raises ValueError where the variant of `model` uses no importance, for a file of a model of other sizes and for what
    is no such file, FileNotFoundError where there is none, ImportError without the extra `hf`, TypeError for arguments
    of other types.
    """
    require_type("model", model, NosaLM, "Build one with NosaLM(...) or from_pretrained(...).")
    if not model.config.attention.uses_importance:
        remedy = "Load it into nosa_jax.with_attention(model, variant='nosa')."
        raise bad_value("model", "must be of a variant that uses importance", model.config.attention.variant, remedy)
    file = user_path("path", path)
    if not file.is_file():
        what = "which is a folder" if file.is_dir() else "no such file"
        raise FileNotFoundError(f"path: must be a file of save_importance, got {file} ({what}). Check the path.")
    with open_safetensors(file) as handle:
        _check_sizes(file, handle.metadata() or {}, model.config)
        pieces = _pieces(model.config)
        parts = {name: handle.get_slice(name) for name in list(handle.keys())}
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        if found != {piece.name: (piece.shape, "F32") for piece in pieces}:
            rule = "must hold A and delta of every layer in float32, and nothing else"
            raise bad_value(str(file), rule, f"{found!r:.200}", "It is damaged: copy or write it again.")
        tensors = {piece.name: handle.get_tensor(piece.name) for piece in pieces}
    changed = with_attention(model)
    old = model.layers.attention.importance
    new = nnx.eval_shape(lambda: Importance(*(getattr(model.config, name) for name in _SIZES), rngs=nnx.Rngs(0)))
    for name in ("A", "delta"):
        buffer = np.empty(getattr(new, name).shape, np.float32)
        for piece in pieces:
            if piece.target.endswith(f".{name}"):
                part = piece.view(buffer)
                part[...] = tensors[piece.name].reshape(part.shape)
        getattr(new, name).set_value(jax.device_put(buffer, getattr(old, name)[...].sharding))
    changed.layers.attention.importance = nnx.data(new)
    return changed


def _pieces(config: ModelConfig) -> list[Piece]:
    return [piece for piece in model_pieces(config, importance=True) if piece.is_importance]


def _check_sizes(file: Any, metadata: dict[str, str], config: ModelConfig) -> None:
    if _SIZES_KEY not in metadata:
        remedy = "from_pretrained loads whole checkpoints."
        raise bad_value(str(file), "must be a file of save_importance", "another safetensors file", remedy)
    try:
        sizes = json.loads(metadata[_SIZES_KEY])
    except ValueError:
        sizes = None
    expected = {name: getattr(config, name) for name in _SIZES}
    if sizes != expected:
        rule = f"must be of a model with {_said(expected)}"
        got = _said(sizes) if isinstance(sizes, dict) else repr(sizes)
        raise bad_value(str(file), rule, got, "Load it into the model that it was trained with.")


def _said(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
