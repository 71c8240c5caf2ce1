"""How far the model is from the published reference code, and offloaded decoding from decoding on the device.

    python -m experiments.exactness --output experiments/results/exactness_cpu.json

Compares the prompt logits, every selection and teacher-forced decode steps of the golden cases (`tests/golden`); then
generations with the cache in host memory, at several numbers of slots, against the cache on the device. All in float32.
Writes JSON. Runs anywhere.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nosa_jax
from experiments.environment import environment
from nosa_jax import CacheConfig

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
REDUCED = {"num_selected_blocks": 8, "num_local_blocks": 3, "num_sink_blocks": 1, "num_query_blocks": 1}
CASES = {
    "g4_red_1500": ("tiny_g4", "nosa", REDUCED),
    "g16_red_1500": ("tiny_g16", "nosa", REDUCED),
    "infllmv2_g4_red_1500": ("tiny_g4", "infllmv2", REDUCED),
    "g4_short_200": ("tiny_g4", "nosa", None),
    "dense_g4_1500": ("tiny_g4", "full", REDUCED),
}
MARGIN = 1e-6


def members(ids: np.ndarray, blocks: int) -> np.ndarray:
    return (np.asarray(ids)[..., None] == np.arange(blocks)).any(-2)


def compare_case(name: str) -> dict[str, Any]:
    checkpoint, variant, attention = CASES[name]
    arrays = dict(np.load(GOLDEN / "cases" / f"{name}.npz"))
    model = nosa_jax.from_pretrained(GOLDEN / "models" / checkpoint, variant=variant, attention=attention)
    tokens = arrays["input_ids"]
    blocks = -(-tokens.shape[1] // model.config.attention.block_size)
    run = jax.jit(functools.partial(nosa_jax.forward, record=True))
    out = run(model, tokens)
    result: dict[str, Any] = {
        "prompt_logits_max_error": float(np.abs(out.logits[0, arrays["positions"][0]] - arrays["logits"][0]).max()),
        "logits_std": float(arrays["logits"].std()),
    }
    if variant != "full":
        sure = equal = rows = 0
        for layer in range(model.config.num_layers):
            expected = np.unpackbits(arrays[f"L{layer}.sel_bits"], axis=-1, bitorder="little")[..., :blocks]
            same = (members(out.block_ids[layer, 0], blocks) == expected).all(-1)
            margins = [arrays[k] for m in ("qk", "final") if (k := f"L{layer}.margin_{m}") in arrays]
            decided = np.all([margin > MARGIN for margin in margins], axis=0)
            rows, sure, equal = rows + same.size, sure + decided.sum(), equal + (same & decided).sum()
        result |= {"selections": int(rows), "decided": int(sure), "decided_and_equal": int(equal)}
    ids = arrays["dec.ids"]
    new = ids.shape[1]
    gen = nosa_jax.generate(model, tokens, max_new_tokens=new, forced_tokens=ids, record=["logits"])
    error = np.abs(np.asarray(gen.logits[0, 1:]) - arrays["dec.logits"][:, 0]).max()
    return result | {"decode_steps": new - 1, "decode_logits_max_error": float(error)}


def compare_offload() -> dict[str, Any]:
    """A ragged batch on the golden g16 model, 100 steps, at four numbers of slots."""
    model = nosa_jax.from_pretrained(GOLDEN / "models" / "tiny_g16", variant="nosa", attention=REDUCED)
    tokens = np.load(GOLDEN / "cases" / "g16_red_1500.npz")["input_ids"]
    tokens, lengths = np.repeat(tokens, 3, axis=0), np.array([1500, 700, 65])
    new = 100
    generate = functools.partial(nosa_jax.generate, model, tokens, lengths, max_new_tokens=new, record=True)
    whole = generate(cache=CacheConfig(offload=False))
    results = {}
    for slots in (8, 9, 24, 25):
        gen = generate(cache=CacheConfig(slots=slots))
        results[slots] = {
            "logits_bit_identical": bool((gen.logits == whole.logits).all()),
            "blocks_fetched_per_step_layer_head_row": float(np.asarray(gen.fetched)[..., 1:].mean()),
        }
    return {"lengths": lengths.tolist(), "new_tokens": new, "slots": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("experiments/results/exactness_cpu.json")
    parser.add_argument(
        "--output", "--out", type=Path, default=default, help="where the JSON goes (default: %(default)s)"
    )
    out = parser.parse_args().output
    jax.config.update("jax_default_matmul_precision", "highest")
    results: dict[str, Any] = {"environment": environment(), "cases": {}}
    for name in CASES:
        results["cases"][name] = compare_case(name)
        print(name, json.dumps(results["cases"][name]), flush=True)
    results["offload"] = compare_offload()
    print("offload", json.dumps(results["offload"]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
