"""Checkpoints both ways: every tensor in its place, bit for bit, and clear words where a folder is not right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folders import CONFIG, GOLDEN, LONGROPE, assert_same, edit_config, edit_tensors, make_model, read_tensors
from safetensors.numpy import load_file, save_file

from nosa_jax.attention.layer import by_kv_head
from nosa_jax.config import AttentionConfig
from nosa_jax.hf import from_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved `nosa` checkpoint."""
    save_pretrained(make_model(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def strip_importance(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.endswith(("self_attn.A", "self_attn.delta.weight"))]:
        del tensors[name]


@pytest.mark.parametrize(("name", "dtype"), [("tiny_g4", jnp.float32), ("tiny_g16", jnp.bfloat16)])
def test_every_tensor_lies_where_the_layout_says(name, dtype):
    model = from_pretrained(GOLDEN / name, dtype=dtype)
    tensors = read_tensors(GOLDEN / name)
    layers, attention = model.layers, model.layers.attention

    def check(ours, theirs, dtype=dtype):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.astype(np.float32))

    check(model.embed[...], tensors["model.embed_tokens.weight"])
    check(model.norm[...], tensors["model.norm.weight"])
    check(model.lm_head[...], tensors["lm_head.weight"].T)
    for i in range(model.config.num_layers):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in tensors.items() if f"layers.{i}." in k}
        q, k, v, o = (layer[f"self_attn.{letter}_proj.weight"].T for letter in "qkvo")
        gate, up, down = (layer[f"mlp.{word}_proj.weight"].T for word in ("gate", "up", "down"))
        q, k, v = (x.reshape(len(x), -1, model.config.head_dim) for x in (q, k, v))
        check(attention.qkv[i], np.asarray(by_kv_head(*(jnp.asarray(x) for x in (q, k, v)))))
        check(attention.output[i], o)
        check(attention.importance.A[i], layer["self_attn.A"], jnp.float32)
        delta = attention.importance.delta[i]
        check(delta.reshape(-1, delta.shape[-1]), layer["self_attn.delta.weight"].T, jnp.float32)
        check(layers.mlp.gate_up[i], np.stack([gate, up], axis=1))
        check(layers.mlp.down[i], down)
        check(layers.attention_norm[i], layer["input_layernorm.weight"])
        check(layers.mlp_norm[i], layer["post_attention_layernorm.weight"])


@pytest.mark.parametrize("max_shard_bytes", [2**30, 500_000])
@pytest.mark.parametrize(("name", "dtype"), [("tiny_g4", jnp.float32), ("tiny_g16", jnp.bfloat16)])
def test_saving_what_was_loaded_gives_the_same_tensors(tmp_path, name, dtype, max_shard_bytes):
    model = from_pretrained(GOLDEN / name, dtype=dtype)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    before, after = read_tensors(GOLDEN / name), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and tensor.shape == after[key].shape
        assert tensor.tobytes() == after[key].tobytes(), key
    assert_same(from_pretrained(tmp_path / "out", dtype=dtype), model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"rope": LONGROPE},
        {"rope": dataclasses.replace(LONGROPE, attention_factor=1.25), "rms_norm_eps": 1e-6},
        {"attention": AttentionConfig(variant="full")},
        {"attention": AttentionConfig(variant="infllmv2", block_size=32, num_local_blocks=3)},
        {"attention": AttentionConfig(variant="dma")},
    ],
    ids=["nosa", "tied", "longrope", "attention_factor", "full", "infllmv2", "dma"],
)
def test_load_inverts_save(tmp_path, changes, dtype):
    model = make_model(dataclasses.replace(CONFIG, **changes), dtype)
    save_pretrained(model, tmp_path / "out")
    assert_same(from_pretrained(tmp_path / "out", dtype=dtype), model)


def test_importance_is_stored_in_full_precision_where_it_needs_it(tmp_path):
    model = make_model(dtype=jnp.bfloat16)
    model.layers.attention.importance.A.set_value(jnp.array([[0.5, 2.0], [1 / 3, 1.0]], jnp.float32))
    save_pretrained(model, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    assert tensors["model.layers.0.self_attn.A"].dtype == ml_dtypes.bfloat16
    assert tensors["model.layers.1.self_attn.A"].dtype == np.float32


def test_dtype_of_the_files_can_be_chosen(tmp_path):
    save_pretrained(make_model(), tmp_path / "out", dtype=jnp.bfloat16)
    tensors = read_tensors(tmp_path / "out")
    assert tensors["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saving_a_variant_that_ignores_importance_keeps_it_where_the_model_has_it(tmp_path):
    from nosa_jax.convert import with_attention

    save_pretrained(with_attention(make_model(), variant="infllmv2"), tmp_path / "out")
    assert from_pretrained(tmp_path / "out").config.attention.variant == "infllmv2"
    assert_same(from_pretrained(tmp_path / "out", variant="nosa"), make_model())


@pytest.mark.parametrize(
    ("importance", "own_key", "asked", "expected"),
    [
        (True, False, None, "nosa"),
        (False, False, None, "full"),
        (True, False, "full", "full"),
        (True, False, "infllmv2", "infllmv2"),
        (True, False, "dma", "dma"),
        (False, False, "nosa", "nosa"),
        (False, False, "dma", "dma"),
        (True, True, None, "nosa"),
        (True, True, "full", "full"),
        (False, True, None, None),
        (False, True, "nosa", None),
        (False, True, "dma", None),
        (False, True, "infllmv2", "infllmv2"),
    ],
)
def test_which_variant_a_folder_becomes(folder, importance, own_key, asked, expected):
    if not importance:
        edit_tensors(folder, strip_importance)
    if not own_key:  # as the official ones
        edit_config(folder, nosa_attention="absent", model_type="llama", max_position_embeddings=8192)
    if expected is None:  # the importance that it had is lost
        with pytest.raises(ValueError, match=r"missing +model\.layers\.0\.self_attn\.A"):
            from_pretrained(folder, variant=asked)
        return
    model = from_pretrained(folder, variant=asked)
    assert model.config.attention.variant == expected
    head = model.layers.attention.importance
    assert (head is None) == (expected in ("full", "infllmv2"))
    if head is not None and importance:
        assert_same(model, make_model(model.config))
    elif head is not None:
        assert not jnp.any(head.A[...]) and jnp.all(head.delta[...] != 0)
        again = from_pretrained(folder, variant=asked)
        assert_same(model, again)


def test_only_what_never_had_importance_gets_a_new_one(folder, tmp_path):
    infllmv2 = make_model(dataclasses.replace(CONFIG, attention=AttentionConfig("infllmv2")))
    save_pretrained(infllmv2, tmp_path / "infllmv2")
    assert not jnp.any(from_pretrained(tmp_path / "infllmv2", variant="nosa").layers.attention.importance.A[...])
    edit_tensors(folder, strip_importance)
    edit_config(folder, nosa_attention="absent", max_position_embeddings=8192)  # but it still says that it is sparse
    with pytest.raises(ValueError, match=r"missing +model\.layers\.0\.self_attn\.A"):
        from_pretrained(folder, variant="nosa")


def test_attention_overrides(folder):
    model = from_pretrained(folder, attention={"variant": "dma", "num_selected_blocks": 40})
    assert model.config.attention == AttentionConfig(variant="dma", num_selected_blocks=40)
    with pytest.raises(ValueError, match=r"(?s)attention: keys must be among.*num_blocks"):
        from_pretrained(folder, attention={"num_blocks": 3})
    with pytest.raises(ValueError, match="variant: must agree with attention="):
        from_pretrained(folder, variant="nosa", attention={"variant": "dma"})


def test_all_tensors_that_do_not_fit_are_listed_at_once(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.layers.0.self_attn.A"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
        tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((40, 24), np.float32)
        tensors["model.norm.weight"] = np.zeros(24, np.int8)

    edit_tensors(folder, change)
    with pytest.raises(ValueError) as error:
        from_pretrained(folder)
    lines = str(error.value).splitlines()[1:-1]
    assert sorted(line.strip() for line in lines) == [
        "misfit      model.layers.0.self_attn.o_proj.weight: expected (24, 40), found (40, 24) F32",
        "misfit      model.norm.weight: expected (24,), found (24,) I8",
        "missing     model.layers.0.self_attn.A: expected (2,)",
        "missing     model.layers.1.mlp.up_proj.weight: expected (40, 24)",
        "unexpected  model.layers.2.mlp.up_proj.weight: found (40, 24)",
    ]


def test_tensors_that_carry_nothing_are_passed_over(folder):
    def change(tensors):
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    edit_tensors(folder, change)
    assert_same(from_pretrained(folder), make_model())


def test_a_tied_checkpoint_may_store_its_head_if_it_is_the_embedding(tmp_path):
    model = make_model(dataclasses.replace(CONFIG, tie_embeddings=True))
    folder = tmp_path / "out"
    save_pretrained(model, folder)
    assert "lm_head.weight" not in read_tensors(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same(from_pretrained(folder), model)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((48, 24), np.float32)}))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        from_pretrained(folder)


@pytest.mark.parametrize("keep", [5, 300, -4])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: must be a whole safetensors file.*download it again"):
        from_pretrained(folder)


def test_an_index_must_fit_its_folder(tmp_path):
    folder = tmp_path / "out"
    save_pretrained(make_model(), folder, max_shard_bytes=8000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 8000 or len(load_file(file)) == 1 for file in shards)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert index["weight_map"].keys() == read_tensors(folder).keys()

    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"{shards[1].name}.*do not"):
        from_pretrained(folder)
    for content in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index_file.write_text(content)
        with pytest.raises(ValueError, match="weight_map"):
            from_pretrained(folder)
    index_file.write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="own folder"):
        from_pretrained(folder)


def test_what_is_not_a_checkpoint_is_said_so(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*Only safetensors"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match="valid JSON"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float64])
def test_odd_dtypes_are_refused(folder, dtype):
    with pytest.raises(ValueError, match="dtype: must be one of"):
        from_pretrained(folder, dtype=dtype)
    with pytest.raises(ValueError, match="dtype: must be one of"):
        save_pretrained(make_model(), folder, dtype=dtype)


def test_saving_over_a_checkpoint_replaces_weights_and_keeps_the_rest(folder):
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "logs").mkdir()
    (folder / "logs" / "loss.txt").write_text("3.2")
    bigger = make_model(dataclasses.replace(CONFIG, vocab_size=64))
    save_pretrained(bigger, folder, max_shard_bytes=8000)
    assert not (folder / "model.safetensors").exists()
    save_pretrained(bigger, str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "logs", "model.safetensors", "tokenizer.json"]
    assert (folder / "logs" / "loss.txt").read_text() == "3.2"
    assert_same(from_pretrained(folder), bigger)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_saving_refuses_what_is_not_its_own(tmp_path):
    work, file, empty = tmp_path / "work", tmp_path / "file", tmp_path / "empty"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for path in (work, file):
        with pytest.raises(FileExistsError, match="path: must be new, empty"):
            save_pretrained(make_model(), path)
    (work / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError):
        save_pretrained(make_model(), work)
    save_pretrained(make_model(), empty)
    save_pretrained(make_model(), tmp_path / "new" / "deep")
    assert_same(from_pretrained(empty), from_pretrained(tmp_path / "new" / "deep"))


def test_files_can_be_read_by_whoever_can_read_the_folder(folder):
    modes = {p.stat().st_mode for p in folder.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch, exists):
    folder = tmp_path / "out"
    if exists:
        save_pretrained(make_model(), folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(tensors, file, metadata):
        if "00002" in file.name:
            raise OSError("No space left on device")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_model(CONFIG, jnp.bfloat16), folder, max_shard_bytes=4000)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])
    if exists:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_bad_arguments_of_save(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes: must be >= 1"):
        save_pretrained(make_model(), tmp_path / "out", max_shard_bytes=0)
    assert not any(tmp_path.iterdir())


def test_loading_draws_no_random_numbers(monkeypatch):
    def normal(key, shape, dtype):
        assert isinstance(key, jax.core.Tracer), "a parameter was initialised for nothing"
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(jax.random, "normal", normal)
    from_pretrained(GOLDEN / "tiny_g4")
