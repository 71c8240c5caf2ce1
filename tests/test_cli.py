"""The command `nosa`: every subcommand through `main`, and what it says to a mistaken use of a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_checks import fails
from flax import nnx

import nosa_jax
from nosa_jax._extras import EXTRAS
from nosa_jax.cli import main
from nosa_jax.cli.demo import _lines, _window, same_bits
from nosa_jax.cli.eval import Eval
from nosa_jax.cli.terminal import duration, size
from nosa_jax.cli.train import Train
from nosa_jax.hf import ByteTokenizer
from nosa_jax.locality import record
from nosa_jax.train import OptimizerConfig, TrainConfig, read_log
from pallas_kernels import OPS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def small():
    """A smaller `tiny`."""
    tiny = nosa_jax.presets.tiny
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 8, "max_context": 192}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nosa_jax.presets, "tiny", lambda variant="nosa": dataclasses.replace(tiny(variant), **sizes))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with text to train on."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"The quick brown fox {i} jumps over the lazy dog.\n" * 40, encoding="utf-8")
    return folder


def train_arguments(text: Path, out: Path) -> list[str]:
    sizes = ["--steps=2", "--batch-size=1", "--length=32", "--eval-batches=1", "--eval-every=0", "--no-eval-selection"]
    return ["train", "--files", str(text), "--heldout-fraction", "0.2", "--out", str(out), *sizes]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    """The folder of a run of two steps that was then resumed, with nothing left to do."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(train_arguments(text, out)) == 0
    assert main([*train_arguments(text, out), "--resume"]) == 0
    return out


# --- train, generate, locality ------------------------------------------------------------------------------------


def test_compiled_programs_are_kept_for_the_next_command(tmp_path, monkeypatch, capsys):
    """By the command, not by calls from Python; where the user says otherwise, there."""
    named = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["nosa", "--version"])
    try:
        for before, after in ((None, str(tmp_path / "nosa-jax" / "programs")), ("elsewhere", "elsewhere")):
            jax.config.update("jax_compilation_cache_dir", before)
            main(["--version"])
            assert jax.config.jax_compilation_cache_dir == before
            main()
            assert jax.config.jax_compilation_cache_dir == after
        assert (tmp_path / "nosa-jax" / "programs").is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", named)


def test_train_saves_checkpoints_log_and_model(trained):
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2"]
    assert [record["step"] for record in read_log(trained / "log.jsonl") if record["kind"] == "train"][-1] == 2
    model = nosa_jax.from_pretrained(trained / "model")
    assert model.config == nosa_jax.presets.tiny()
    loaded = nosa_jax.train.load_model(trained / "checkpoints")
    assert same_bits(model.embed[...], loaded.embed[...])


def test_any_checkpoint_of_a_run_is_exported(trained, tmp_path, capsys):
    """As the folder that the run wrote itself, and its importance alone."""
    assert main(["export", str(trained), str(tmp_path / "model"), "--step", "2"]) == 0
    names = sorted(path.name for path in (trained / "model").iterdir())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    theirs = nosa_jax.from_pretrained(trained / "model")
    for model in (
        nosa_jax.from_pretrained(tmp_path / "model"),
        nosa_jax.load_importance(theirs, exported_importance(trained, tmp_path)),
    ):
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(theirs), strict=True):
            assert same_bits(a, b)
    capsys.readouterr()
    assert fails(["export", str(trained), str(tmp_path / "other"), "--step", "1"], capsys).startswith("--step: must be")
    assert not (tmp_path / "other").exists()


def exported_importance(trained: Path, folder: Path) -> Path:
    file = folder / "importance.safetensors"
    assert main(["export", str(trained), str(file), "--importance-only"]) == 0
    return file


def test_train_goes_on_from_a_folder_and_from_its_checkpoints(trained, text, tmp_path, undrawn):
    """As what began with the folder's weights, to the bit; the steps are those compiled for `trained`."""
    out = tmp_path / "run"
    arguments = [*train_arguments(text, out), "--checkpoint-every=1", "--init", str(trained / "model")]
    assert main(arguments) == 0
    first = lambda folder: next(r["loss"] for r in read_log(folder / "log.jsonl") if r["kind"] == "train")
    assert first(out) < first(trained)  # the same text, with what was learned before
    written = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
    shutil.rmtree(out / "checkpoints" / "2")
    shutil.rmtree(out / "model")
    assert main([*arguments, "--resume"]) == 0
    assert {path.name: path.read_bytes() for path in (out / "model").iterdir()} == written
    assert {"model.safetensors", "tokenizer.json"} <= written.keys()
    assert [record["step"] for record in read_log(out / "log.jsonl") if record["kind"] == "train"] == [1, 2]


def test_train_has_a_flag_for_every_setting():
    flags = Train()
    for cls in (TrainConfig, OptimizerConfig):
        for field in dataclasses.fields(cls):
            if field.name not in ("model", "optimizer"):
                assert getattr(flags, field.name) == field.default, field.name
    config = Train(variant="dma", steps=7, clip_norm=2.0).config()
    assert (config.model.attention.variant, config.steps, config.optimizer.clip_norm) == ("dma", 7, 2.0)


def test_train_refuses_a_folder_with_another_run(trained, text, capsys):
    said = fails(train_arguments(text, trained), capsys)
    assert said.startswith("--out: must not hold checkpoints yet") and "Pass --resume to continue it" in said


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--slots", "8"], ["--no-offload"]])
def test_generate_prints_what_the_library_streams(trained, where, capsys):
    prompt = "The quick brown fox jumps over the lazy dog. " * 4
    sampling = ["--temperature", "1.0", "--top-k", "50", "--seed", "3"]
    arguments = ["generate", str(trained / "model"), "--prompt", prompt, "--max-new-tokens", "9", *sampling, *where]
    assert main(arguments) == 0
    captured = capsys.readouterr()

    steps = nosa_jax.stream(
        nosa_jax.from_pretrained(trained / "model"),
        np.asarray([list(prompt.encode())], np.int32),
        max_new_tokens=9,
        cache=nosa_jax.CacheConfig(slots=8),
        sampling=nosa_jax.Sampling(1.0, 50),
        key=jax.random.key(3),
    )
    assert captured.out == prompt + ByteTokenizer().decode(np.concatenate(list(steps))) + "\n"
    assert re.search(r"speed +[\d,.]+ tokens/s over 8 steps", captured.err)
    assert ("blocks per step, layer and KV head" in captured.err) == (where[0] == "--slots")


@pytest.mark.slow
def test_locality_measures_and_writes_files(trained, text, tmp_path, capsys):
    # The sizes of the demo's test, whose programs are then compiled once for both.
    sizes = ["--prompt-length", "150", "--new-tokens", "4", "--slots", "8", "12", "--variants", "nosa"]
    out = tmp_path / "out"
    arguments = ["locality", str(trained / "model"), "--text", str(text / "0.txt"), *sizes, "--out", str(out)]
    assert main([*arguments, "--heatmaps", "--importance", "--save-selections", "--batch", "3"]) == 0
    table = capsys.readouterr().out
    assert "misses per step, 12 slots" in table and re.search(r"^ +nosa$", table, re.MULTILINE)
    assert "of the offline optimum, 12 slots" in table and "3 rows of 154 tokens" in table
    for name in ("locality.png", "selections-nosa.png", "heatmap-nosa.png", "importance-nosa.png", "tokens-nosa.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    results = json.loads((out / "locality.json").read_text(encoding="utf-8"))
    assert results["reports"]["nosa"]["steps"] == 3 and results["settings"]["prompt_length"] == 150
    assert set(results["reports"]["nosa"]["optimal_misses"]) == {"8", "12"}
    assert results["costs"]["nosa"]["8"]["batch"] == 3
    recorded = nosa_jax.Selections.load(out / "selections-nosa.npz")
    assert recorded.positions.tolist() == [[149, 150, 151, 152]] and recorded.importance.shape[-1] == 153


@pytest.mark.slow
def test_eval_prints_a_table_and_writes_files(trained, text, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--tasks", "niah_single", "mqar", "--lengths", "500", "--count", "2", "--slots", "8"]
    arguments = ["eval", str(trained / "model"), "--haystack", str(text / "0.txt"), *sizes, "--output", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  niah_single +500 +2 +recall +\d\.\d{3} ", printed, re.MULTILINE) and "evals.png" in printed
    table = nosa_jax.evals.Table.load(out / "evals.json")
    assert [row["task"] for row in table.rows] == ["niah_single", "mqar"] and table.label == "model"
    assert (out / "evals.png").read_bytes().startswith(b"\x89PNG")
    assert fails([*arguments, "--lengths", "90"], capsys).startswith("--lengths: must hold the smallest example of")


def test_eval_names_all_tasks():
    assert all(task in inspect.getsource(Eval) for task in nosa_jax.evals.TASKS)


def test_recording_is_forced_to_the_text_or_free():
    model = nosa_jax.NosaLM(nosa_jax.presets.tiny(), rngs=nnx.Rngs(0))
    tokens = np.arange(150, dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            "nosa_jax.locality.selections.generate",
            lambda *_, **options: seen.append(options) or fake_generation(model),
        )
        for forced in (tokens[:3], None):
            chosen = record(model, tokens, 3, forced)
            assert chosen.positions.tolist() == [[149, 150, 151]] and chosen.itemsize == 4
    assert seen[0]["forced_tokens"].tolist() == [[0, 1, 2]] and seen[1]["forced_tokens"] is None


def fake_generation(model) -> nosa_jax.Generation:
    config = model.config
    ids = np.broadcast_to(np.arange(8, dtype=np.int32), (config.num_layers, 1, config.num_kv_heads, 3, 8))
    return nosa_jax.Generation(tokens=np.zeros((1, 3), np.int32), lengths=np.asarray([3]), block_ids=ids)


# --- demo ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_runs_from_text_to_figures(tmp_path, capsys):
    out = tmp_path / "demo"
    sizes = ["--steps", "1", "--prompt-length", "150", "--new-tokens", "4", "--slots", "8", "--locality-tokens", "4"]
    assert main(["demo", "--out", str(out), *sizes]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "bit-identical: yes" in printed and "prompt |" in printed
    assert re.search(r"nosa +infllmv2", printed) and "with_attention" in printed
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["bit_identical"] and results["runs"][0]["slots"] == 8
    assert set(results["timings"]) == {"training", "generating", "comparing", "locality", "writing"}
    assert (out / "locality.png").is_file()
    assert nosa_jax.from_pretrained(out / "model").config == nosa_jax.presets.tiny()


def test_same_bits_sees_signs_of_zero_and_dtypes():
    zero = np.zeros(2, np.float32)
    assert same_bits(zero, zero.copy()) and same_bits(np.float32([np.nan]), np.float32([np.nan]))
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(np.int32)) and not same_bits(zero, zero[:1])


def test_window_ends_the_prompt_where_a_block_of_code_opens():
    text = np.frombuffer(b"import x\nif x:\n    pass\nelse:\n    y = 1\n", np.uint8)
    window = _window(text, 10, 4, 6)
    assert bytes(window.tolist()) == b"ass\nelse:\n    y "
    with pytest.raises(ValueError, match="must, with the 6 bytes after it, fit into the held-out text of 40 bytes"):
        _window(text, 40, 4, 6)


def test_lines_are_wrapped_and_harmless():
    assert _lines("a\tb\x1b[2J\n\n" + "x" * 100 + "\n") == ["a   b·[2J", "", "x" * 90, "x" * 10]


# --- plan and doctor ----------------------------------------------------------------------------------------------


def test_plan_prints_the_table_of_the_library(capsys):
    arguments = ["plan", "--preset", "nosa_8b", "--batch", "16", "--max-length", "16384", "--slots", "80"]
    expected = nosa_jax.plan(nosa_jax.presets.nosa_8b(), 16, 16384, nosa_jax.CacheConfig(slots=80))
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1:] == str(expected).splitlines()
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["device_bytes"] == expected.device_bytes and printed["preset"] == "nosa_8b"


def test_plan_takes_a_policy(capsys):
    arguments = ["plan", "--batch", "16", "--max-length", "16384", "--policy", "shadowkv", "--json"]
    assert main([*arguments, "--policy-settings", "budget=1536", "local_chunks=16"]) == 0
    printed = json.loads(capsys.readouterr().out)
    policy = nosa_jax.baselines.ShadowKV(budget=1536, local_chunks=16)
    config, cache = nosa_jax.presets.nosa_8b(variant="full"), nosa_jax.CacheConfig(policy=policy)
    planned = nosa_jax.plan(config, 16, 16384, cache)
    assert printed["device_bytes"] == planned.device_bytes
    assert planned.misses_per_step == policy.fetch_share * 1536 / 8 > 0
    assert nosa_jax.plan(config, 16, 16384, dataclasses.replace(cache, offload=False)).misses_per_step == 0
    assert (printed["variant"], printed["policy"]) == ("full", repr(policy))
    assert main([*arguments, "--prompt", "1024", "--new", "512"]) == 0
    captured = capsys.readouterr()
    cache = nosa_jax.CacheConfig(policy=nosa_jax.baselines.ShadowKV())
    planned = nosa_jax.plan(config, 16, 16384, cache, prompt=1024, new=512)
    assert json.loads(captured.out)["device_bytes"] == planned.device_bytes and "prompts as long" not in captured.err


def test_doctor_names_every_op_and_why(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for op in OPS.values():
        assert re.search(rf"^  {op.name} +xla +", printed, re.MULTILINE)
        for name in ("cudnn", "mosaic", "triton"):
            assert op.reason(name) in printed
    assert f"jax               {jax.__version__}" in printed
    assert "pinned_host" in printed and "host memory" in printed


def test_extras_are_those_of_the_package():
    with open(ROOT / "pyproject.toml", "rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"all", "notebooks", "test", "lint", "dev"}


def test_texts_too_long_or_too_short_are_noted(trained, capsys, monkeypatch):
    """Before anything is generated."""

    def nothing(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nosa_jax.stream", nothing)
    for room, said in ((191, False), (192, True)):
        assert main(["generate", str(trained / "model"), "--prompt", "x", "--max-new-tokens", str(room)]) == 130
        assert ("longer than the 192 that the model" in capsys.readouterr().err) == said
    settings = ["--policy-settings", "chunk=4", "budget=4", "local_chunks=1", "outlier_chunks=1", "rank=4"]
    for prompt, said in (("x" * 12, True), ("x" * 13, False)):
        arguments = ["generate", str(trained / "model"), "--prompt", prompt, "--policy", "shadowkv", *settings]
        assert main(arguments) == 130
        assert ("attends to 12 tokens as it is set, so to all" in capsys.readouterr().err) == said


def test_mistakes_that_need_a_checkpoint(trained, tmp_path, capsys):
    model = str(trained / "model")
    here = ["--out", str(tmp_path)]
    assert fails(["generate", model, "--prompt", ""], capsys).startswith("--prompt: must hold at least one token")
    assert (
        fails(["locality", model, "--text", "nowhere.txt", *here], capsys) == "nowhere.txt: No such file or directory"
    )
    assert fails(["locality", model, "--slots", "3", *here], capsys).startswith("--slots: must hold one")
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    assert fails(["locality", model, "--text", str(short), *here], capsys).startswith("--text: must have at least 1024")
    file = tmp_path / "file"
    file.touch()
    assert "File exists" in fails(["locality", model, "--out", str(file)], capsys)


def test_units():
    assert [duration(x) for x in (0.4, 59.6, 75.2)] == ["0 s", "1 min 0 s", "1 min 15 s"]
    assert [size(x) for x in (12, 2560, 3 * 2**20, 5 * 2**40)] == ["12 B", "2.50 KiB", "3.00 MiB", "5120.00 GiB"]
