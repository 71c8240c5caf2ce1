"""Folders that others read, write and move: what is carried along, who refuses what, and whole checkpoints only."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import CONFIG, GOLDEN, assert_same, edit_config, make_model, raw_config, with_text
from safetensors.numpy import load_file, save_file

from nosa_jax.config import AttentionConfig
from nosa_jax.convert import cast, with_attention
from nosa_jax.hf import ByteTokenizer, from_pretrained, load_tokenizer, save_pretrained, stop_tokens

FULL = dataclasses.replace(CONFIG, attention=AttentionConfig(variant="full"))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


# --- what a sparse folder says of itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "nosa", "infllmv2"])
def test_only_dense_folders_look_like_a_llama(tmp_path, variant):
    save_pretrained(make_model(dataclasses.replace(CONFIG, attention=AttentionConfig(variant))), tmp_path / "out")
    raw = raw_config(tmp_path / "out")
    plain = raw["model_type"] == "llama" and raw["architectures"] == ["LlamaForCausalLM"]
    known = raw["model_type"] == "llama" or "LlamaForCausalLM" in raw["architectures"]
    assert plain == known == (variant == "full")
    assert from_pretrained(tmp_path / "out").config.attention.variant == variant


def test_folders_of_earlier_versions_and_official_ones_load_and_may_be_replaced(tmp_path):
    folder = tmp_path / "out"
    save_pretrained(make_model(), folder)
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert_same(from_pretrained(folder), make_model())
    edit_config(folder, architectures=["SparseLlamaForCausalLM"], nosa_attention="absent")
    with pytest.warns(UserWarning, match="nothing is sparse"):  # which it does not say of itself
        assert_same(from_pretrained(folder), make_model())
    for _ in range(2):
        save_pretrained(make_model(), folder)
    assert_same(from_pretrained(folder), make_model())


def test_a_sparse_folder_that_lost_its_attention_is_not_read_as_dense(tmp_path):
    folder = tmp_path / "out"
    save_pretrained(make_model(dataclasses.replace(CONFIG, attention=AttentionConfig("infllmv2"))), folder)
    edit_config(folder, nosa_attention="absent", max_position_embeddings=8192)
    with pytest.raises(ValueError, match="nosa_attention"):
        from_pretrained(folder)
    assert from_pretrained(folder, attention={"variant": "infllmv2"}).config.attention.variant == "infllmv2"


# --- what is carried along ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_what_a_folder_says_and_we_do_not_use_is_carried_along(tmp_path, same):
    source = with_text(tmp_path / "in")
    before = {p.name: p.read_bytes() for p in source.iterdir()} | {"raw": raw_config(source)}
    model = jax.jit(lambda model: jax.tree.map(lambda x: x * 1, model))(from_pretrained(source))
    model = cast(with_attention(model, variant="infllmv2"), jnp.bfloat16)
    target = source if same else tmp_path / "new"
    save_pretrained(model, target)
    raw = raw_config(target)
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "note"):
        assert raw[key] == before["raw"][key]
    assert raw["torch_dtype"] == "bfloat16" and raw["nosa_attention"]["variant"] == "infllmv2"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == before[name]
    assert stop_tokens(target) == model.stop_tokens == (5,)
    again = from_pretrained(target, jnp.bfloat16)
    assert (again.origin.config, again.origin.files) == (model.origin.config, model.origin.files)


def test_the_origin_of_a_model_is_no_leaf_and_compiles_nothing_anew(tmp_path):
    loaded, plain = from_pretrained(with_text(tmp_path / "in")), make_model()
    assert jax.tree.structure(loaded) == jax.tree.structure(plain)
    assert plain.stop_tokens == () and loaded.stop_tokens == (5,)
    compiled = jax.jit(lambda model: model.norm[...] + 1)
    compiled(loaded), compiled(plain)
    assert compiled._cache_size() == 1
    assert len(repr(jax.tree.structure(loaded))) < 20_000


def test_a_new_model_over_a_checkpoint_keeps_its_end_of_text(tmp_path):
    source = with_text(tmp_path / "in")
    save_pretrained(make_model(), source)
    assert raw_config(source)["eos_token_id"] == [2, 7] and stop_tokens(source) == (5,)
    save_pretrained(make_model(dataclasses.replace(CONFIG, vocab_size=64)), source)  # its ids mean something else
    assert raw_config(source)["eos_token_id"] is None and stop_tokens(source) == ()
    assert (source / "tokenizer.json").is_file()  # its vocabulary may be the same, and padded


def test_a_model_with_another_vocabulary_brings_its_own_end_of_text(tmp_path):
    save_pretrained(make_model(dataclasses.replace(CONFIG, vocab_size=64)), tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 9}')
    target = with_text(tmp_path / "in")
    save_pretrained(from_pretrained(tmp_path / "other"), target)
    assert stop_tokens(target) == from_pretrained(target).stop_tokens == (9,)


def test_keys_that_describe_another_model_are_not_carried(tmp_path):
    save_pretrained(make_model(), tmp_path / "in")
    edit_config(tmp_path / "in", layer_types=["full_attention"] * 2, dtype="float32", auto_map={"AutoConfig": "x.X"})
    save_pretrained(from_pretrained(tmp_path / "in"), tmp_path / "out", dtype=jnp.bfloat16)
    assert not {"layer_types", "dtype", "auto_map"} & raw_config(tmp_path / "out").keys()


def test_a_tokenizer_is_not_replaced_by_another_without_a_word(tmp_path):
    model = from_pretrained(with_text(tmp_path / "in"))
    save_pretrained(make_model(), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("other")
    with pytest.warns(UserWarning, match="keeps its own tokenizer.json"):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "other"
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


def test_a_tokenizer_can_be_given(tmp_path):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=300))
    save_pretrained(model, tmp_path / "out", tokenizer=ByteTokenizer())
    assert load_tokenizer(tmp_path / "out", 300).encode("é") == [0xC3, 0xA9]
    with pytest.raises(TypeError, match="tokenizer: must be"):
        inspect.unwrap(save_pretrained)(model, tmp_path / "out", tokenizer="bytes")


# --- readers and writers --------------------------------------------------------------------------------------------


def test_a_reader_that_is_overtaken_reads_again(tmp_path, monkeypatch):
    from nosa_jax.hf.files import CheckpointFiles

    old, new = make_model(), jax.tree.map(lambda x: -x, make_model())
    read, saves = CheckpointFiles.read, iter([new])

    def overtaken(self, name):
        tensor = read(self, name)
        for model in saves:
            save_pretrained(model, tmp_path / "out")
        return tensor

    save_pretrained(old, tmp_path / "out")
    monkeypatch.setattr(CheckpointFiles, "read", overtaken)
    assert_same(from_pretrained(tmp_path / "out"), new)
    saves = iter(lambda: old, None)  # without end
    reads = iter(range(10**6))

    def always(self, name):
        if next(reads) % 7 == 0:
            save_pretrained(old, tmp_path / "out")
        return read(self, name)

    monkeypatch.setattr(CheckpointFiles, "read", always)
    with pytest.raises(ValueError, match="path: must stay as it is while it is read"):
        from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_readers_against_a_writer_see_whole_checkpoints(tmp_path):
    folder, script = tmp_path / "out", Path(__file__).with_name("hf_readers.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, script, folder], env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(ran.stdout)
    assert sum(found.values()) >= 500 and found["plus"] > 0 and found["minus"] > 0
    assert found["mixed"] == 0 and found["refused"] < 25
    save_pretrained(make_model(), folder)  # tidies up after the writer, which was killed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("exists", [True, False])
def test_writers_that_meet_leave_one_whole_checkpoint(tmp_path, exists):
    folder = tmp_path / "out"
    models = [jax.tree.map(functools.partial(jnp.multiply, n), make_model()) for n in range(1, 4)]
    if exists:
        save_pretrained(models[0], folder)
    barrier, errors = threading.Barrier(3), []

    def write(number: int) -> None:
        barrier.wait()
        try:
            for shard in (2**30, 9000):
                save_pretrained(models[number], folder, max_shard_bytes=shard)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    scale = np.asarray(from_pretrained(folder).norm[...])[0] / np.asarray(models[0].norm[...])[0]
    assert_same(from_pretrained(folder), models[round(float(scale)) - 1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *index["weight_map"].values(),
    }


def test_a_folder_is_filled_where_it_stands(tmp_path, monkeypatch):
    """It may be a mount, the working folder of somebody, or below a parent that cannot be written to."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    real = os.rename

    def busy(source, target, **rest):
        if Path(source).resolve() == folder or Path(target).resolve() == folder:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(source, target, **rest)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(Path, "rename", lambda self, target: busy(self, target))
    parent = tmp_path.stat().st_mtime_ns
    for path in (".", folder):
        inode = folder.stat().st_ino
        save_pretrained(make_model(), path)
        assert folder.stat().st_ino == inode and Path.cwd() == folder
        assert sorted(os.listdir(".")) == ["config.json", "model.safetensors"]
    assert tmp_path.stat().st_mtime_ns == parent
    assert_same(from_pretrained("."), make_model())


def test_a_place_that_cannot_be_written_to_is_said_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"path: a folder must be made in .*file.*Choose another path"):
        save_pretrained(make_model(), tmp_path / "file" / "out")
    monkeypatch.setattr("nosa_jax.hf.save._write", lambda *_: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_model(), tmp_path / "new" / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- folders that are not what they seem ----------------------------------------------------------------------------


def test_the_index_says_where_a_tensor_lies(tmp_path):
    folder = tmp_path / "out"
    save_pretrained(make_model(), folder, max_shard_bytes=8000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / file)
        name = "model.norm.weight"
        if index["weight_map"][name] != file:
            save_file({**tensors, name: np.full(24, 9, np.float32)}, folder / file)
    assert_same(from_pretrained(folder), make_model())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json.*lm_head\.weight"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    save_pretrained(make_model(), tmp_path / "out")
    (tmp_path / "out" / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: .*Git LFS.*git lfs pull"):
        from_pretrained(tmp_path / "out")


def test_a_byte_order_mark_is_passed_over(tmp_path):
    save_pretrained(make_model(), tmp_path / "out", max_shard_bytes=9000)
    for file in (tmp_path / "out").glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_same(from_pretrained(tmp_path / "out"), make_model())


def test_a_file_where_a_folder_belongs(tmp_path):
    save_pretrained(make_model(), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"path: must be a .*folder.*is a file"):
        from_pretrained(tmp_path / "out" / "model.safetensors")
    for call in (inspect.unwrap(from_pretrained), lambda path: inspect.unwrap(save_pretrained)(make_model(), path)):
        with pytest.raises(TypeError, match="path: must be a path"):
            call(3)
        with pytest.raises(ValueError, match="path: must "):
            call("")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6, "nosa_attention": {"variant": "full"}}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 2**31 - 1}, r"model\.embed_tokens\.weight"),
        ({"hidden_size": 2**31 - 1}, r"model\.embed_tokens\.weight"),
        ({"head_dim": 2**31 - 2}, r"q_proj"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, r"q_proj"),
    ],
)
def test_sizes_are_compared_with_the_files_before_anything_is_made(tmp_path, monkeypatch, changes, named):
    save_pretrained(make_model(), tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    monkeypatch.setattr("flax.nnx.eval_shape", lambda *_: pytest.fail("the model was made"))
    with pytest.raises(ValueError, match=named) as error:
        from_pretrained(tmp_path / "out")
    assert len(str(error.value)) < 10_000


def test_a_llama_too_short_to_be_sparse_is_said_so(tmp_path):
    save_pretrained(make_model(FULL), tmp_path / "out")
    edit_config(tmp_path / "out", nosa_attention="absent")
    with pytest.warns(UserWarning, match="nothing is sparse.*512.*4096"):
        from_pretrained(tmp_path / "out", variant="nosa")
    edit_config(tmp_path / "out", max_position_embeddings=4097)
    assert from_pretrained(tmp_path / "out", variant="nosa").config.attention.variant == "nosa"


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"dtype": "floot"}, (TypeError, ValueError), "dtype: must be one of"),
        ({"dtype": object()}, (TypeError, ValueError), "dtype: must be one of"),
        ({"attention": "nosa"}, TypeError, "attention: must be a dict"),
    ],
)
def test_bad_arguments_of_load(arguments, error, named):
    with pytest.raises(error, match=named):
        inspect.unwrap(from_pretrained)(GOLDEN / "tiny_g4", **arguments)


@pytest.mark.parametrize("value", ["5GB", 1.5, True])
def test_bad_sizes_of_shards(tmp_path, value):
    with pytest.raises(TypeError, match="max_shard_bytes: must be an int"):
        inspect.unwrap(save_pretrained)(make_model(), tmp_path / "out", max_shard_bytes=value)
