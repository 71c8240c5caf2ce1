"""What policies cost in answers: a dense model that decodes over 1,024 of 8K tokens, by tasks of the study.

    python -m experiments.rivals.quality --model runs/study/tuned --text runs/study/text.pickle \\
        --output experiments/results/rivals_quality_h100.json

The model is the study's `full` arm after tuning on tasks; every prompt is read with dense attention, and what decodes
it is a policy with the settings of the NOSA paper's comparison (4,096 attended tokens, keys of rank 40 of 256), scaled
to a quarter and to this model's 192 dimensions of keys. `infllmv2` is the same model with blocks selected by query, not
trained for it. Answers are by greedy decoding; `score` is the task's metric. `fetched` are units of the store that
crossed the link per step, layer, row and KV head while held-out documents were read on token by token.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nosa_jax
from experiments.environment import gpu_arguments, save
from experiments.rivals.speed import loop
from experiments.study.arms import GPU, Arm
from experiments.study.held import documents_of
from nosa_jax import CacheConfig, NosaLM, baselines, evals, from_pretrained, with_attention
from nosa_jax.hf import load_tokenizer

LENGTH = 8192
TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "extract_records")
SHADOWKV = baselines.ShadowKV(chunk=8, rank=30, budget=768, local_chunks=8, outlier_chunks=24)
LARGE_CHUNKS = baselines.ShadowKV(chunk=64, rank=30, budget=768, local_chunks=1, outlier_chunks=3)
ARKVALE = baselines.ArkVale(page=32, budget=32, page_topks=17, sink=2, window=8)
# By name: what decodes, and the fields of AttentionConfig where that is not `full`.
CASES: dict[str, tuple[CacheConfig, dict[str, Any]]] = {
    "full": (CacheConfig(offload=False), {}),
    "shadowkv, chunks of 8": (CacheConfig(policy=SHADOWKV), {}),
    "shadowkv, chunks of 64": (CacheConfig(policy=LARGE_CHUNKS), {}),
    "arkvale": (CacheConfig(policy=ARKVALE), {}),
    "infllmv2, not trained": (CacheConfig(), Arm("", "infllmv2", "eighth").attention(GPU)),
}
STEPS = 192
ROWS = 4


def fetched(model: NosaLM, documents: Any, cache: CacheConfig) -> float | None:
    """Units that cross per step, layer, row and KV head while the last tokens of documents are fed; None for none."""
    if not cache.offload:
        return None
    found = []
    run = jax.jit(loop, donate_argnums=1)
    for begin in range(0, len(documents), ROWS):
        rows = jnp.asarray(documents[begin : begin + ROWS])
        dense = model.config.attention.is_sparse
        state, _ = nosa_jax.prefill(model, rows[:, :-STEPS], max_length=rows.shape[1], cache=cache, dense=dense)
        _, _, count = run(model, state, rows[:, -STEPS:].T)
        found.append(int(count) / (STEPS * ROWS * model.config.num_layers * model.config.num_kv_heads))
    return round(float(np.mean(found)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a dense model")
    parser.add_argument("--text", type=Path, required=True, help="text.pickle of a run of the study")
    parser.add_argument("--count", type=int, default=40, help="examples of each task")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="NAME",
                        help="; ".join(map(repr, CASES)))  # fmt: skip
    args = gpu_arguments(parser)
    dense = from_pretrained(args.model, variant="full", dtype=jnp.bfloat16)
    tokenizer = load_tokenizer(args.model, dense.config.vocab_size)
    documents = documents_of(pickle.loads(args.text.read_bytes()), GPU)[:: GPU.documents // (2 * ROWS)]
    entries = []
    for name in args.cases:
        cache, attention = CASES[name]
        model = with_attention(dense, **attention) if attention else dense
        crossed = fetched(model, documents, cache)
        table = evals.evaluate(
            model, tokenizer, TASKS, (LENGTH,), args.count, teacher_forcing=False,
            prefill="dense" if attention else "sparse", cache=cache, progress=False,
        )  # fmt: skip
        rows = [{key: row[key] for key in ("task", "count", "metric", "score", "stderr")} for row in table.rows]
        entries.append({"name": name, "cache": repr(cache), "attention": attention, "fetched": crossed, "tasks": rows})
        print(json.dumps(entries[-1]), flush=True)
        save(args.output, model=str(args.model.name), length=LENGTH, entries=entries)


if __name__ == "__main__":
    main()
