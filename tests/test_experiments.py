"""Every experiment imports on a CPU and says what it is for; the command in its docstring is one that it takes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_selections import CONFIG, run

from experiments import decode_throughput, traces
from nosa_jax import NosaLM, Selections
from nosa_jax.locality import is_forced, reuse_distance
from pallas_kernels.device import Rates

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = {
    ".".join(file.relative_to(FOLDER.parent).with_suffix("").parts): file
    for file in sorted(FOLDER.rglob("*.py"))
    if file.name != "__init__.py"
}
# What runs when it is imported has a test of its own, test_notebooks.py.
IMPORTED = [module for module, file in FILES.items() if "\n# %%" not in file.read_text(encoding="utf-8")]
COMMANDS = [module for module, file in FILES.items() if "\ndef main(" in file.read_text(encoding="utf-8")]
# Nothing here may ask for these before it runs; drawing is what the figures' scripts are for.
OPTIONAL = ("torch", "fla", "triton", "transformers", "tyro", "grain", "tqdm", "safetensors", "tokenizers")
RESULTS = FOLDER / "README.md"


@pytest.mark.parametrize("module", IMPORTED)
def test_imports_without_optional_packages(module, monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)


@pytest.mark.parametrize("module", COMMANDS)
def test_shows_its_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    experiment = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        experiment.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert experiment.__doc__.splitlines()[0] in shown

    commands = re.findall(rf"python -m {re.escape(module)}\b(.*)", experiment.__doc__)
    assert commands, "its docstring shows how it is run"
    for flag in re.findall(r"--[\w-]+", " ".join(commands)):
        assert re.search(rf"{flag}\b", shown.split(experiment.__doc__.rstrip())[-1]), f"{flag} is not in its --help"


def test_a_module_that_needs_a_gpu_says_so_before_any_work(monkeypatch, capsys):
    from experiments.environment import gpu_arguments

    monkeypatch.setattr(sys, "argv", ["it"])
    with pytest.raises(SystemExit) as end:
        gpu_arguments(argparse.ArgumentParser())
    assert end.value.code == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


# What a model of two layers and KV heads selects in two rows, of which the second one stops early.
RECORDED = run([range(150, 240), [*range(150, 200), *[-1] * 40]])


def test_recorded_selections_are_replayed_by_a_larger_model():
    """Three rows, three layers and four heads, contexts of the recorded length and of up to seven blocks more."""
    larger = dataclasses.replace(CONFIG, num_layers=3, num_heads=4, num_kv_heads=4)
    lengths = np.array([150, 153 + 7 * 4, 154], np.int32)
    ids = traces.replayed(RECORDED, larger, lengths, 40)
    assert ids.shape == (40, 3, 2 * 4, 5) and ids.dtype == np.int32
    steps_last = np.moveaxis(decode_throughput.by_layer(ids, 4), 0, 3)  # [Z, B, K, steps, J]
    by_layer = np.asarray(decode_throughput.of_all_layers(steps_last, 3))
    positions = lengths[:, None] + np.arange(40, dtype=np.int32)
    mapped = Selections(by_layer, positions, larger.attention, larger.head_dim)  # which refuses what cannot be selected
    for layer, row, head in np.ndindex(3, 3, 4):
        start, shift = [(0, 0), (3, 7), (0, 1)][row]
        expected = RECORDED.block_ids[layer % 2, row % 2, head % 2, start : start + 40]
        expected = np.where(expected >= 1, expected + shift, expected)  # one sink block
        np.testing.assert_array_equal(mapped.block_ids[layer, row, head], expected)
    # Every pool fetches what it fetched where they were recorded.
    distance = reuse_distance(RECORDED.block_ids)[:, 0, :, :40]
    np.testing.assert_array_equal(reuse_distance(mapped.block_ids)[:2, 2, :2], distance)
    forced = is_forced(mapped.block_ids, mapped.positions[:, None], mapped.attention)
    assert (np.asarray(forced).sum(-1) == 3).all()  # the sink and the window are where the query is


@pytest.mark.slow
def test_the_timed_loop_fetches_what_was_recorded(tmp_path, monkeypatch, without_type_checker):
    RECORDED.save(tmp_path / "nosa.npz")
    model = NosaLM(dataclasses.replace(CONFIG, num_layers=3, num_heads=4, num_kv_heads=4), rngs=nnx.Rngs(0))
    monkeypatch.setattr(decode_throughput, "profile", lambda call: {})  # a CPU has no kernels to time
    run = decode_throughput.Run.parse(f"nosa:151-172:3:6:{tmp_path / 'nosa.npz'}")
    measured = decode_throughput.measure(model, run, steps=8, repeats=2, rates=Rates(1e12, 5e10), options={})
    assert measured["fetched_per_table"] == measured["replayed_per_table"] > 0
    assert measured["attention"] == dataclasses.asdict(CONFIG.attention)
    with pytest.raises(ValueError, match=r"--runs: must name the variant that .* records, 'nosa'"):
        other = dataclasses.replace(run, variant="dma")
        decode_throughput.measure(model, other, steps=8, repeats=2, rates=Rates(1e12, 5e10), options={})


@pytest.mark.parametrize(
    ("lengths", "steps", "message"),
    [
        ([150], 91, "trace: must hold 91 steps of row 0, 0 of them to stand at the same place in a block, got 90"),
        ([150, 151], 50, "trace: must hold 51 steps of row 1, 1 of them .*, got 50"),
        ([134], 4, "context: must not be shorter than the recorded row 0, which begins at token 150, got 134"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(lengths, steps, message):
    with pytest.raises(ValueError, match=message):
        traces.replayed(RECORDED, CONFIG, np.array(lengths, np.int32), steps)


def test_a_run_names_its_trace():
    parse = decode_throughput.Run.parse
    made, recorded = parse("nosa:8192:4:80:trace"), parse("nosa:8192:4:80:some:where/nosa.npz")
    assert (made.traced, made.trace_file) == (True, None)
    assert (recorded.traced, recorded.trace_file) == (True, "some:where/nosa.npz")
    assert not parse("full:8192:4:device").traced
    with pytest.raises(ValueError, match="--runs: must be variant:context:batch:slots"):
        parse("nosa:8192:4:80:traces")


@pytest.mark.parametrize("module", FILES)
def test_the_readme_lists_it(module):
    assert f"`{module.removeprefix('experiments.')}`" in RESULTS.read_text(), f"say in {RESULTS.name} what it is for"


def test_every_link_of_the_readme_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", RESULTS.read_text())
    for target in links:
        assert (FOLDER / target).exists(), target
    missing = {file.name for file in (FOLDER / "results").iterdir()} - {Path(target).name for target in links}
    assert not missing, "every result is linked"
