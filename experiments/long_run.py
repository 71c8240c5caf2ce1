"""Long generations from a cache in host memory: the same numbers as reading everything again, and no memory that grows.

    python -m experiments.long_run --output experiments/results/long_run_h200.json

Eight ragged rows of the golden G = 16 model, sampled, float32 with exact products. At ten places prompt and generation
are read again as one text, with the selections of the generation replayed; then ten generations run in one process.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

import nosa_jax
from experiments.environment import save
from experiments.exactness import GOLDEN, REDUCED
from nosa_jax import CacheConfig, NosaLM, Sampling

SLOTS = 10


def prompts(batch: int) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """The golden text from other places, of other lengths."""
    text = np.load(GOLDEN / "cases" / "g16_red_1500.npz")["input_ids"][0]
    lengths = np.linspace(33, 600, batch).astype(np.int32)
    tokens = np.stack([np.roll(text, -37 * row)[: lengths.max()] for row in range(batch)])
    return tokens.astype(np.int32), lengths


def whole_rows(
    prompt: np.ndarray, lengths: np.ndarray, generation: nosa_jax.Generation, prompt_ids: np.ndarray
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "L B K T J"]]:
    """Prompt and generation as one text, and the selections that were made for it."""
    new, recorded = np.asarray(generation.tokens), np.asarray(generation.block_ids)
    batch, count = new.shape
    tokens = np.zeros((batch, lengths.max() + count), np.int32)
    layers, _, kv_heads, _, width = recorded.shape
    ids = np.full((layers, batch, kv_heads, tokens.shape[1], width), -1, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length], tokens[row, length : length + count] = prompt[row, :length], new[row]
        ids[:, row, :, :length] = prompt_ids[:, row, :, :length]
        ids[:, row, :, length : length + count - 1] = recorded[:, row, :, 1:]
    return tokens, ids


def read_again(model: NosaLM, batch: int, count: int, places: int) -> dict[str, Any]:
    """Logits of one long generation against those of reading it again, at evenly spaced places."""
    prompt, lengths = prompts(batch)
    generation = nosa_jax.generate(
        model, prompt, lengths, max_new_tokens=count, cache=CacheConfig(slots=SLOTS), record=True,
        sampling=Sampling(temperature=1.0), key=jax.random.key(0),
    )  # fmt: skip
    prompt_ids = np.asarray(nosa_jax.forward(model, prompt, lengths, record=True, logits="none").block_ids)
    tokens, ids = whole_rows(prompt, lengths, generation, prompt_ids)
    forward = jax.jit(functools.partial(nosa_jax.forward, logits="last"))
    errors: list[float] = []
    steps = np.unique(np.linspace(1, count - 1, places).round().astype(int))
    for step in steps:
        logits = np.asarray(forward(model, tokens, lengths + step, block_ids=ids).logits)[:, 0]
        errors.append(float(np.abs(logits - np.asarray(generation.logits)[:, step]).max()))
        print(f"after {step} new tokens: {errors[-1]:.2e}", flush=True)
    return {
        "batch": batch, "prompt_lengths": lengths.tolist(), "new_tokens": count, "slots": SLOTS,
        "blocks_filled_per_row": int(count // model.config.attention.block_size),
        "blocks_fetched_per_step_layer_head_row": round(float(np.asarray(generation.fetched)[..., 1:].mean()), 3),
        "logits_std": round(float(np.asarray(generation.logits).std()), 3),
        "after": steps.tolist(), "max_error": errors,
    }  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process that is in RAM now (Linux)."""
    kilobytes = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
    return 1024 * int(kilobytes)


def generate_again(model: NosaLM, batch: int, count: int, times: int) -> dict[str, Any]:
    """Resident memory after each of several equal generations, and the peak of the second half above the first's."""
    prompt, lengths = prompts(batch)
    resident = []
    for _ in range(times):
        out = nosa_jax.generate(model, prompt, lengths, max_new_tokens=count, cache=CacheConfig(slots=SLOTS))
        jax.block_until_ready(out.tokens)
        resident.append(resident_bytes())
    config = model.config
    tokens = batch * (prompt.shape[1] + count)
    store = 2 * tokens * config.num_layers * config.num_kv_heads * config.head_dim * model.embed.dtype.itemsize
    print("resident MiB:", [round(n / 2**20, 1) for n in resident], flush=True)
    return {
        "batch": batch, "new_tokens": count, "host_store_mib": round(store / 2**20, 1),
        "resident_mib": [round(n / 2**20, 1) for n in resident],
        "growth_mib": round((max(resident[times // 2 :]) - max(resident[: times // 2])) / 2**20, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=8192, help="tokens that every row generates (default: 8192)")
    parser.add_argument("--batch", type=int, default=8, help="rows, each of another length (default: 8)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if args.new_tokens < 2 or args.batch < 1:
        parser.error("--new-tokens must be at least 2 and --batch at least 1")
    jax.config.update("jax_default_matmul_precision", "highest")
    model = nosa_jax.from_pretrained(GOLDEN / "models" / "tiny_g16", variant="nosa", attention=REDUCED)
    long = read_again(model, args.batch, args.new_tokens, places=10)
    many = generate_again(model, args.batch, min(1024, args.new_tokens), times=10)
    save(args.output, read_again=long, generate_again=many)
    print(json.dumps({"max_error": max(long["max_error"]), "growth_mib": many["growth_mib"]}))


if __name__ == "__main__":
    main()
