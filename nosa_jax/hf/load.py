"""A local Hugging Face folder becomes a model."""

from __future__ import annotations

import operator
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nosa_jax import parallel
from nosa_jax._paths import user_path
from nosa_jax._pytree import by_name
from nosa_jax.attention.importance import Importance
from nosa_jax.config import ModelConfig, Variant
from nosa_jax.hf.config_json import (
    ATTENTION_KEY,
    may_lack_importance,
    parse_config,
    read_config_json,
    unused,
)
from nosa_jax.hf.files import CheckpointFiles, TensorInfo
from nosa_jax.hf.folder import read_texts, read_whole
from nosa_jax.hf.keymap import Piece, model_pieces
from nosa_jax.model import NosaLM
from nosa_jax.origin import Origin
from pallas_kernels.checks import bad_type, bad_value

DTYPES = ("float32", "bfloat16", "float16")
_STORED_DTYPES = ("F32", "BF16", "F16", "F64")
_ROWS_PER_COPY = 256


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    variant: Variant | None = None,
    attention: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> NosaLM:
    """Loads a local checkpoint folder: config.json with model.safetensors, whole or sharded with an index.

    Llama, Qwen2, Qwen3 and Mistral are read, with every RoPE of `RopeConfig`, and what `save_pretrained` writes. Layers
    with a sliding window shorter than the context are refused.

    dtype: of the weights: float32, bfloat16 or float16. Importance (A and delta) is float32 always.
    variant: None takes what config.json says under `nosa_attention`; without that key it is `nosa` if the checkpoint
        has importance tensors, else `full`. A dense or `infllmv2` checkpoint asked for as `nosa` or `dma` starts
        with A = 0 and a small random delta that is the same every time. `full` and `infllmv2` ignore stored importance.
    attention: fields of AttentionConfig to change, e.g. `{"num_selected_blocks": 32}`. The released NOSA checkpoints
        do not store theirs: the defaults of AttentionConfig are theirs.

    mesh: devices that share the parameters, as `parallel.shard` does; no device holds a whole one meanwhile.

    The model remembers what else the folder says (`model.origin`; `model.stop_tokens` are its end-of-text ids), and
    save_pretrained writes it. The host holds one parameter at a time beside what is already on the device. A folder
    that a writer replaces meanwhile is read again: the model is of one state of it.

    Raises FileNotFoundError where files are missing, ImportError without the extra `hf`, ValueError for an unreadable
    file, for a config.json that asks for other maths, and for tensors that do not fit (all of them are listed), and
    TypeError for arguments of other types. Warns where a context is too short for anything to be sparse, unless the
    folder was saved as a sparse one.
    """
    folder = user_path("path", path)
    want = check_dtype(dtype)
    overrides = _overrides(variant, attention)
    return read_whole(folder, lambda: _load(folder, want, overrides, mesh))


def _overrides(variant: Variant | None, attention: Any) -> dict[str, Any]:
    """The fields of AttentionConfig that beat those of the folder."""
    if not isinstance(attention, dict | None):
        raise bad_type("attention", "must be a dict of fields of AttentionConfig", f"{attention!r:.60}", "Pass a dict.")
    overrides = dict(attention or {})
    if variant is not None:
        if overrides.get("variant", variant) != variant:
            raise bad_value("variant", f"must agree with attention={overrides}", repr(variant), "Give it once.")
        overrides["variant"] = variant
    return overrides


def outline(path: str | os.PathLike[str], variant: Variant | None = None, attention: Any = None) -> NosaLM:
    """What `from_pretrained` would load, as shapes (`jax.ShapeDtypeStruct`): its configuration and its origin.

    No weights are read. Arguments and errors are those of `from_pretrained`, but for weights that cannot be read.
    """
    folder = user_path("path", path)
    overrides = _overrides(variant, attention)
    return read_whole(folder, lambda: _outline(folder, np.dtype("float32"), overrides).model)


class _Outline(NamedTuple):
    """model: of shapes. pieces, files: what its weights are made of. fresh: whether its importance is in no file."""

    model: NosaLM
    pieces: list[Piece]
    files: CheckpointFiles
    fresh: bool
    is_dense: bool


def _outline(folder: Path, dtype: np.dtype, overrides: dict[str, Any]) -> _Outline:
    raw = read_config_json(folder)
    files = CheckpointFiles(folder)
    has_importance = any(name.endswith(("self_attn.A", "self_attn.delta.weight")) for name in files.infos)
    config = parse_config(raw, overrides=overrides, has_importance=has_importance)
    if config.num_layers > len(files.infos):  # before a list of all that they would hold
        rule = f"must fit the {len(files.infos)} tensors of {folder}"
        remedy = "Check that config.json and the weights belong together."
        raise bad_value("config.json: num_hidden_layers", rule, config.num_layers, remedy)
    fresh = config.attention.uses_importance and not has_importance and may_lack_importance(raw)
    pieces = model_pieces(config, importance=config.attention.uses_importance and not fresh)
    _check_tensors(folder, config, pieces, files)
    model = nnx.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    model.origin = _origin(raw, folder)
    is_dense = (raw.get(ATTENTION_KEY) or {"variant": "full"}).get("variant") == "full"
    return _Outline(model, pieces, files, fresh, is_dense)


def _load(folder: Path, dtype: np.dtype, overrides: dict[str, Any], mesh: Mesh | None) -> NosaLM:
    model, pieces, files, fresh, is_dense = _outline(folder, dtype, overrides)
    config = model.config
    if is_dense:
        _warn_if_dense(config)
    shardings = None if mesh is None else by_name(parallel.shardings(model, mesh))
    for target, parts in _by_target(pieces).items():
        variable = operator.attrgetter(target)(model)
        buffer = np.empty(variable.shape, variable.dtype)
        for part in parts:
            _copy(part.view(buffer), files.read(part.name))
        # On a CPU this shares the memory of `buffer`, which nobody writes again.
        variable.set_value(
            jax.device_put(buffer) if shardings is None else parallel.from_host(buffer, shardings[target])
        )
    if fresh:
        model.layers.attention.importance = Importance(
            config.num_layers, config.num_kv_heads, config.head_dim, rngs=nnx.Rngs(0)
        )
    return parallel.shard(model, mesh) if fresh and mesh is not None else model


def origin_of(path: str | os.PathLike[str]) -> Origin:
    """What the folder `path` says beyond its model, as `from_pretrained` keeps it."""
    folder = user_path("path", path)
    return _origin(read_config_json(folder), folder)


def _origin(raw: dict[str, Any], folder: Path) -> Origin:
    return Origin(unused(raw), read_texts(folder), raw["model_type"])


def _warn_if_dense(config: ModelConfig) -> None:
    attention = config.attention
    reach = attention.num_selected_blocks * attention.block_size
    if attention.is_sparse and config.max_context <= reach:
        warnings.warn(
            f"variant: nothing is sparse: {attention.variant!r} selects {attention.num_selected_blocks} blocks of "
            f"{attention.block_size} tokens, and max_position_embeddings = {config.max_context} is at most their "
            f"{reach} tokens. Lower num_selected_blocks or block_size with attention={{...}}.",
            stacklevel=6,
        )


def check_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of weights; raises ValueError for one that weights cannot have, TypeError for what is none."""
    rule, remedy = f"must be one of {DTYPES}", "Use jnp.float32 or jnp.bfloat16."
    try:
        want = jnp.dtype(dtype)
    except TypeError:
        raise bad_type("dtype", rule, f"{dtype!r:.60}", remedy) from None
    if want.name not in DTYPES:
        raise bad_value("dtype", rule, want.name, remedy)
    return want


def _by_target(pieces: list[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.target, []).append(piece)
    return grouped


def _copy(into: np.ndarray, tensor: np.ndarray) -> None:
    """Fills `into`, whose axes may be finer than those of the tensor."""
    tensor = tensor.reshape(into.shape)
    # In bands of rows: a whole transposed copy of a large matrix is bound by cache misses.
    for at in np.ndindex(into.shape[:-2]):
        for start in range(0, len(into[at]), _ROWS_PER_COPY):
            into[at][start : start + _ROWS_PER_COPY] = tensor[at][start : start + _ROWS_PER_COPY]


def _check_tensors(folder: Path, config: ModelConfig, pieces: list[Piece], files: CheckpointFiles) -> None:
    expected = {piece.name: piece.shape for piece in pieces}
    known = expected.keys() | _ignored(config, files)
    lines = [
        *(f"  missing     {name}: expected {shape}" for name, shape in expected.items() if name not in files.infos),
        *(f"  unexpected  {name}: found {info.shape}" for name, info in files.infos.items() if name not in known),
        *(
            f"  misfit      {name}: expected {shape}, found {files.infos[name].shape} {files.infos[name].dtype}"
            for name, shape in expected.items()
            if name in files.infos and not _fits(shape, files.infos[name])
        ),
    ]
    if lines:
        raise ValueError(
            f"path: the tensors of {folder} must fit its config.json with variant {config.attention.variant!r} "
            f"(dtypes {', '.join(_STORED_DTYPES)}), got\n"
            + "\n".join(lines)
            + "\nCheck that config.json and the weights belong together, or ask for another variant."
        )


def _fits(shape: tuple[int, ...], info: TensorInfo) -> bool:
    return info.shape == shape and info.dtype in _STORED_DTYPES


def _ignored(config: ModelConfig, files: CheckpointFiles) -> set[str]:
    """Stored tensors that a model of `config` has no use for."""
    pieces = model_pieces(config, importance=True)
    ignored = {piece.name for piece in pieces if piece.is_importance and not config.attention.uses_importance}
    # Derived from config.json; written by old versions of transformers.
    ignored |= {name for name in files.infos if name.endswith("rotary_emb.inv_freq")}
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and head in files.infos and embed in files.infos:
        if not np.array_equal(files.read(head), files.read(embed)):
            raise bad_value(
                "config.json",
                "tie_word_embeddings=True needs lm_head.weight equal to model.embed_tokens.weight",
                "two different tensors",
                "Set tie_word_embeddings to false in config.json.",
            )
        ignored.add(head)
    return ignored
