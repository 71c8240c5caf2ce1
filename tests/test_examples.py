"""The scripts that newcomers start from run, small, and do what they say."""

from __future__ import annotations

import dataclasses
import json

import jax
import jaxtyping
import numpy as np
import pytest

import nosa_jax
from experiments.examples import decode_loop, locality_study, train_from_script
from nosa_jax import Selections, presets

pytestmark = pytest.mark.slow
TINY = dataclasses.replace(presets.tiny(), num_layers=2, hidden_size=64, intermediate_size=96, num_heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A smaller tiny model, compiled with little effort, on a user's terms: what the scripts do stays the same."""
    monkeypatch.setattr(presets, "tiny", lambda: TINY)
    jaxtyping.config.update("jaxtyping_disable", True)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jaxtyping.config.update("jaxtyping_disable", False)


def test_train_from_script(tmp_path, capsys):
    losses = train_from_script.main(f"--steps 20 --batch 2 --length 64 --out {tmp_path}/own".split())
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert nosa_jax.from_pretrained(tmp_path / "own").config.attention == TINY.attention
    assert "step 19: loss" in capsys.readouterr().out


def test_decode_loop(capsys):
    """It compares its own loop with `generate` itself."""
    tokens = decode_loop.main(["--new", "12", "--slots", "10"])
    assert tokens.shape == (2, 12)
    shown = capsys.readouterr().out
    assert "tokens in the cache: [311, 222] of at most 352" in shown
    assert float(shown.split("reading all again: ")[1].split()[0]) < 1e-5


def test_locality_study(tmp_path, capsys, monkeypatch):
    real = locality_study.train.TrainConfig
    small = lambda model, steps, **fields: real(model, steps=steps, batch_size=1, length=64)
    monkeypatch.setattr(locality_study.train, "TrainConfig", small)
    reports = locality_study.main(f"--train-steps 2 --prompt 200 --new 24 --slots 8 10 --out {tmp_path}".split())
    assert list(reports) == ["nosa", "infllmv2"]
    assert "misses per step, 10 slots" in capsys.readouterr().out
    for variant, report in reports.items():
        again = Selections.load(tmp_path / f"{variant}.npz").report((8, 10))
        np.testing.assert_array_equal(again.gamma, report.gamma)
        assert again.steps == 23
    assert json.loads((tmp_path / "reports.json").read_text())["nosa"]["label"] == "nosa"
    figures = {"comparison.png", "difference.png", "nosa.png", "infllmv2.png"}
    assert figures <= {file.name for file in tmp_path.iterdir()}
