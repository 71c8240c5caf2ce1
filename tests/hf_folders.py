"""Small checkpoints for the tests of folders, and hands to look into them and change them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from nosa_jax.config import ModelConfig, RopeConfig
from nosa_jax.hf import ByteTokenizer, save_pretrained
from nosa_jax.model import NosaLM

GOLDEN = Path(__file__).parent / "golden" / "models"
CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    max_context=512,
)
LONGROPE = RopeConfig(
    theta=5e4,
    kind="longrope",
    short_factor=(1.0, 1.1, 1.2, 1.3, 1.4),
    long_factor=(1.0, 2.0, 3.0, 4.0, 5.5),
    original_max_context=128,
)


def make_model(config: ModelConfig = CONFIG, dtype=jnp.float32) -> NosaLM:
    """Random everywhere, so that no two places can be confused (a new model has A = 0 and norms of 1)."""
    model = nnx.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=dtype))
    leaves, structure = jax.tree.flatten(model)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.asarray(random.normal(size=x.shape).astype(x.dtype)) for x in leaves])


def assert_same(a: NosaLM, b: NosaLM) -> None:
    assert a.config == b.config
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def edit_tensors(folder: Path, change) -> None:
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def raw_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def with_text(folder: Path) -> Path:
    """A checkpoint that says more than we use."""
    save_pretrained(make_model(), folder)
    edit_config(folder, eos_token_id=[2, 7], bos_token_id=1, pad_token_id=0, use_cache=True, note={"a": [1, None]})
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.7}', encoding="utf-8")
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    (folder / "tokenizer_config.json").write_bytes(b'{"chat_template": "\xc3\xa9"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
