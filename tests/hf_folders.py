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
