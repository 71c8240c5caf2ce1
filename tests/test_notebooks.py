"""Notebooks are what their scripts say, hold no outputs, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.notebooks import common, convert
from nosa_jax import hf

NAMES = [script.stem for script in convert.SCRIPTS]
ROOT = Path(__file__).parents[1]
# Of each notebook, figures or results that only its last cells write.
WRITTEN = {
    "locality_of_variants": {"difference.png", "reports.json", "dma-2.npz"},
    "offloaded_decode": {"steps.png", "fetched.png"},
    "train_four_variants": {"quality_and_bytes.png", "results.json"},
    "what_importance_learns": {"spread.png", "difference.png"},
}


def test_all_are_known():
    assert set(NAMES) == set(WRITTEN) == {file.stem for file in convert.FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_its_script_without_outputs(name):
    script = convert.FOLDER / f"{name}.py"
    stored, made = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8")), convert.notebook(script)
    assert stored["cells"] == json.loads(made)["cells"], "run `make notebooks`"  # outputs and counts are in the cells
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"] for cell in code].count({"tags": ["parameters"]}) == 1


def test_texts_to_judge_by_are_never_trained_on(monkeypatch):
    monkeypatch.setattr(common.train, "text", lambda files, *_, **__: files)
    trained = common.training_text(hf.ByteTokenizer(), common.small(), 384)
    texts = common.heldout_texts(hf.ByteTokenizer(), len(common.HELD_OUT), 4096)
    assert len(trained) == 80 and texts.shape == (9, 4096)
    assert not {file.read_bytes()[:4096] for file in trained} & {bytes(text.astype("uint8")) for text in texts}
    with pytest.raises(ValueError, match="length: must be at most"):
        common.heldout_texts(hf.ByteTokenizer(), 1, 10**6)
    with pytest.raises(ValueError, match="count: must be at most 9"):
        common.heldout_texts(hf.ByteTokenizer(), 10, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_script_runs(name, tmp_path):
    """As a program of its own, started elsewhere; pictures need no display."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NOSA_NOTEBOOK")}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # as users run it: steps of training count
    environment |= {"NOSA_NOTEBOOK_OUTPUT": str(tmp_path), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(convert.FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    written = {file.name for file in (tmp_path / name).iterdir()}
    assert WRITTEN[name] <= written, written
    if name == "offloaded_decode":
        assert "False" not in done.stdout and done.stdout.count("True       True") >= 3
