"""Llama, Qwen2, Qwen3 and Mistral with every RoPE against logits of transformers (`experiments/golden_hf.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import assert_same, raw_config, read_tensors
from safetensors.numpy import load_file, save_file
from support import but_slow

import nosa_jax
from nosa_jax import rope
from nosa_jax.hf import from_pretrained, save_pretrained
from nosa_jax.hf.config_json import parse_config

GOLDEN = Path(__file__).parent / "golden" / "hf"
CASES = json.loads((GOLDEN / "cases.json").read_text())
# The others differ from these in their RoPE alone, which has a quicker test of its own, or in nothing but a name.
QUICK = ("llama-yarn-in-full", "llama-biased-tied", "qwen2", "qwen3-tied")
RUN = but_slow(CASES, *(case for case in CASES if case not in QUICK))


@functools.cache
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as file:
        return dict(file)


@functools.cache
def weights() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "weights.safetensors")


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The checkpoint of a case, as it was given to transformers."""
    case = CASES[request.node.callspec.params["case"]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(case["config"]))
    tensors = {name: tensor for name, tensor in weights().items() if not name.endswith(tuple(case["lacking"]))}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    return tmp_path / "in"


@pytest.mark.parametrize("case", RUN)
def test_logits_are_those_of_transformers(case, folder):
    model = from_pretrained(folder)
    out = nosa_jax.forward(model, expected()["tokens"][None])
    theirs = expected()[f"{case}.logits"]
    assert 1.9 < theirs.std() < 2.1
    # Two right float32 runs differ by up to 1.5e-5; another RoPE changes logits by more than 3.
    np.testing.assert_allclose(out.logits[0, expected()["positions"]], theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers_to_the_bit(case):
    config = parse_config(CASES[case]["config"], overrides={}, has_importance=False)
    ours = rope.inverse_frequencies(config.rope, config.head_dim, config.max_context)
    np.testing.assert_array_equal(ours, expected()[f"{case}.inv_freq"])
    assert rope.attention_factor(config.rope, config.max_context) == expected()[f"{case}.factor"]


@pytest.mark.parametrize("case", CASES)
def test_saved_as_it_came(case, folder, tmp_path):
    model = from_pretrained(folder)
    save_pretrained(model, tmp_path / "out")
    assert raw_config(tmp_path / "out")["model_type"] == CASES[case]["config"]["model_type"]
    assert_same(from_pretrained(tmp_path / "out"), model)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), after[name])


@pytest.mark.parametrize("case", ["llama-biased-tied", "qwen2", "qwen3-biased-linear", "mistral"])
def test_sparse_it_has_our_own_type_and_comes_back(case, folder, tmp_path):
    with pytest.warns(UserWarning, match="nothing is sparse"):
        model = from_pretrained(folder, variant="nosa")
    save_pretrained(model, tmp_path / "out")
    raw = raw_config(tmp_path / "out")
    assert (raw["model_type"], raw["architectures"]) == ("nosa_llama", ["NosaForCausalLM"])
    assert_same(from_pretrained(tmp_path / "out"), model)
    dense = from_pretrained(tmp_path / "out", variant="full")
    assert_same(dense, from_pretrained(folder))
