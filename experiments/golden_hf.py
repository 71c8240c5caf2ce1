"""Logits of tiny random Llama, Qwen2, Qwen3 and Mistral models with every RoPE, computed by transformers.

    python -m experiments.golden_hf --output tests/golden/hf

Writes what `tests/test_hf_logits.py` compares with: `weights.safetensors` (bfloat16, the tensors of all models),
`cases.json` (by case the config.json as released checkpoints have it, and which tensors its model lacks) and
`expected.npz` (the tokens, the positions kept, and by case float32 logits, inverse frequencies and attention factor).
Needs torch and transformers, which are no dependencies of this project, and no JAX.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ORIGINAL, CONTEXT, LENGTH = 128, 512, 448
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN_IN_FULL = YARN | {"beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.5, "truncate": False}
LONGROPE = {
    "short_factor": [1.0 + i / 100 for i in range(16)],
    "long_factor": [1.0 + i / 4 for i in range(16)],
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
QWEN2 = {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 256, "max_window_layers": 2}
# By case, the keys of config.json beside the sizes. `rope_scaling` is the form of transformers before 5.
CASES: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, "beta_fast": 8}},
    "llama-yarn-in-full": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", **YARN_IN_FULL}},
    "llama-longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONGROPE}},
    "llama-biased-tied": {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "qwen2": QWEN2,
    "qwen2-yarn-no-window": {**QWEN2, "use_sliding_window": True, "rope_scaling": {"type": "yarn", **YARN}},
    "qwen3-tied": {"rope_theta": 1000000.0, "tie_word_embeddings": True, "attention_bias": False},
    "qwen3-biased-linear": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0},
    },
    "mistral": {"rope_theta": 1000000.0, "sliding_window": None},
    "mistral-llama3": {
        "sliding_window": CONTEXT,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3},
    },
}


def make_weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Every tensor that any of the models has, float32, of sizes that make logits of a trained model's spread."""
    normal = lambda scale, *shape: (scale * random.standard_normal(shape)).astype(np.float32)
    hidden, inner, vocab, dim = 64, 96, 128, 32
    weights = {"model.embed_tokens.weight": normal(0.25, vocab, hidden), "lm_head.weight": normal(0.25, vocab, hidden)}
    weights["model.norm.weight"] = 1 + normal(0.1, hidden)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, out in (("q", 4 * dim), ("k", 2 * dim), ("v", 2 * dim), ("o", hidden)):
            into = 4 * dim if name == "o" else hidden
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(
                (1.5 if name in "qk" else 1) / into**0.5, out, into
            )
            weights[f"{prefix}self_attn.{name}_proj.bias"] = normal(0.3, out)
        for name in "qk":
            weights[f"{prefix}self_attn.{name}_norm.weight"] = 1.3 + normal(0.2, dim)
        for name, out, into in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            weights[f"{prefix}mlp.{name}_proj.weight"] = normal(into**-0.5, out, into)
        for name in ("input", "post_attention"):
            weights[f"{prefix}{name}_layernorm.weight"] = 1 + normal(0.1, hidden)
    return weights


def lacking(case: str, config: dict[str, Any]) -> list[str]:
    """How the names of the tensors end that the model of a case does not have."""
    model_type, biased = case.split("-")[0], config.get("attention_bias", False)
    return [
        *([] if biased or model_type == "qwen2" else [f"{name}_proj.bias" for name in "qkv"]),
        *([] if biased else ["o_proj.bias"]),
        *([] if model_type == "qwen3" else ["q_norm.weight", "k_norm.weight"]),
        *(["lm_head.weight"] if config["tie_word_embeddings"] else []),
    ]


def run_case(config: dict[str, Any], tensors: dict[str, Any], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers makes of a folder with this config.json and these tensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report  # no tensor is missing, left over or of another shape
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits
    rope = model.model.rotary_emb  # after the run: longrope has chosen by now
    return {"logits": logits.numpy(), "inv_freq": rope.inv_freq.numpy(), "factor": np.float64(rope.attention_scaling)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder that the three files go to")
    output = parser.parse_args().output
    import torch
    from safetensors.torch import save_file

    random = np.random.default_rng(0)
    weights = {name: torch.tensor(array).to(torch.bfloat16) for name, array in make_weights(random).items()}
    tokens = random.integers(0, SIZES["vocab_size"], (1, LENGTH))
    positions = np.unique(np.geomspace(1, LENGTH, 40).astype(int)) - 1
    expected = {"tokens": tokens[0].astype(np.int32), "positions": positions.astype(np.int32)}
    cases = {}
    for case, keys in CASES.items():
        config = {"model_type": case.split("-")[0], **SIZES, **keys}
        absent = lacking(case, config)
        tensors = {name: tensor for name, tensor in weights.items() if not name.endswith(tuple(absent))}
        found = run_case(config, tensors, tokens)
        found["logits"] = found["logits"][0, positions]
        expected |= {f"{case}.{name}": array for name, array in found.items()}
        cases[case] = {"config": config, "lacking": absent}
        print(f"{case:24} standard deviation of logits {found['logits'].std():.2f}")
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "weights.safetensors")
    (output / "weights.safetensors").chmod(0o644)  # safetensors makes its files private
    (output / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    np.savez_compressed(output / "expected.npz", **expected)


if __name__ == "__main__":
    main()
