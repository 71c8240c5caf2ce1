"""Importance in a file of its own: what comes back, and which files are refused."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import CONFIG, GOLDEN, assert_same, make_model
from safetensors.numpy import load_file, save_file

import nosa_jax
from nosa_jax.config import AttentionConfig
from nosa_jax.convert import with_attention
from nosa_jax.hf import from_pretrained


@pytest.fixture
def file(tmp_path):
    """The importance of `make_model()`."""
    nosa_jax.save_importance(make_model(), tmp_path / "importance.safetensors")
    return tmp_path / "importance.safetensors"


def fresh(**changes):
    """A model of the same sizes whose importance is another one."""
    model = make_model(dataclasses.replace(CONFIG, **changes))
    return jax.tree.map(lambda x: 2 * x, model)


def test_load_inverts_save_and_leaves_the_rest_and_the_model_given(file):
    model = fresh()
    loaded = nosa_jax.load_importance(model, file)
    assert_same(model, fresh())
    expected = fresh()
    expected.layers.attention.importance = make_model().layers.attention.importance
    assert_same(loaded, expected)
    assert loaded.embed[...] is model.embed[...]


def test_names_and_values_are_those_of_an_official_folder(tmp_path):
    for name in ("tiny_g4", "tiny_g16"):
        nosa_jax.save_importance(from_pretrained(GOLDEN / name, jnp.bfloat16), tmp_path / name)
        ours, theirs = load_file(tmp_path / name), load_file(GOLDEN / name / "model.safetensors")
        assert ours.keys() == {key for key in theirs if key.endswith(("self_attn.A", "self_attn.delta.weight"))}
        for key, tensor in ours.items():
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor, theirs[key].astype(np.float32))


def test_it_goes_from_a_variant_to_another_with_the_weights_in_any_dtype(file):
    dense = nosa_jax.cast(make_model(dataclasses.replace(CONFIG, attention=AttentionConfig("full"))), jnp.bfloat16)
    loaded = nosa_jax.load_importance(with_attention(dense, variant="dma"), file)
    assert loaded.config.attention.variant == "dma" and loaded.embed.dtype == jnp.bfloat16
    assert loaded.layers.attention.importance.A.dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded.layers.attention.importance.delta[...], make_model().layers.attention.importance.delta[...]
    )


def test_variants_without_importance_are_told_how_to_get_it(file, tmp_path):
    kept = with_attention(make_model(), variant="infllmv2")  # which still has it
    with pytest.raises(
        ValueError, match=r"model: must be of a variant .*infllmv2.*with_attention\(model, variant='nosa'"
    ):
        nosa_jax.load_importance(kept, file)
    nosa_jax.save_importance(kept, tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match=r"model: must have importance.*'full'.*with_attention\(model, variant='nosa'"):
        nosa_jax.save_importance(make_model(dataclasses.replace(CONFIG, attention=AttentionConfig("full"))), file)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 1}, "num_layers 1, .*got num_layers 2"),
        ({"num_layers": 3}, "num_layers 3, .*got num_layers 2"),
        ({"num_kv_heads": 1}, "num_kv_heads 1, .*num_kv_heads 2"),
        ({"head_dim": 12}, "head_dim 12, got .*head_dim 10"),
    ],
)
def test_files_of_other_sizes_are_refused(file, changes, named):
    with pytest.raises(ValueError, match=named):
        nosa_jax.load_importance(fresh(**changes), file)


def test_other_files_are_refused(file, tmp_path):
    model, tensors = make_model(), load_file(file)
    with pytest.raises(ValueError, match="must be a file of save_importance, got another safetensors file"):
        nosa_jax.load_importance(model, GOLDEN / "tiny_g4" / "model.safetensors")
    sizes = '{"num_layers": 2, "num_kv_heads": 2, "head_dim": 10}'
    first = next(iter(tensors))
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != first},
        tensors | {"model.norm.weight": np.ones(24, np.float32)},
        tensors | {first: tensors[first][:1]},
        tensors | {first: tensors[first].astype(np.int32)},
    ):
        save_file(changed, tmp_path / "other", metadata={"nosa_importance": sizes})
        with pytest.raises(ValueError, match="other: must hold A and delta of every layer"):
            nosa_jax.load_importance(model, tmp_path / "other")
    for said in ("", "[1]", "{}"):
        save_file(tensors, tmp_path / "other", metadata={"nosa_importance": said})
        with pytest.raises(ValueError, match="other: must be of a model with num_layers 2"):
            nosa_jax.load_importance(model, tmp_path / "other")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        nosa_jax.load_importance(model, file)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="path: must be a file of save_importance"):
            nosa_jax.load_importance(model, path)


def test_a_failed_save_leaves_the_old_file(file, tmp_path, monkeypatch):
    before = file.read_bytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        nosa_jax.save_importance(fresh(), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
