"""What policies lose on text, on any machine: each token fed attends to a quarter of what came before it.

    python -m experiments.rivals.losses --model models/smollm2-135m --output experiments/results/rivals_losses_cpu.json
    python -m experiments.rivals.losses --repetition --output experiments/results/rivals_repetition_cpu.json

Documents are of packages that the study holds out. Their first 2,048 tokens are the prompt, read with dense attention
but by InfLLM, which reads prompts in its own way; the next 128 are fed one by one, with 512 tokens attended (ShadowKV
attends to those that were fed besides). The first of them is predicted by the prompt alone. `loss` is in nats per
token, `above` how much more than dense attention, with its 95 % interval by paired bootstrap over documents, whose
losses are kept; `fetched` are units per step, layer, row and KV head (InfLLM: row) that were not on the device.
With `--repetition` the prompt ends with 32 tokens that stand in it before, from token 512 on, and those behind them
are fed: all of this text lies in the context word for word, where each token must be found.

The model was trained for none of this: `infllmv2` stands for blocks by query in an untrained model. InfLLM runs layer
by layer through `baselines.replay`, in which it is golden; the others decode on the engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import nosa_jax
from experiments.environment import save
from experiments.study import held, tables, text
from nosa_jax import CacheConfig, NosaLM, baselines, decode, from_pretrained, with_attention
from nosa_jax.hf import load_tokenizer
from pallas_kernels.checks import bad_value
from pallas_kernels.device import current_device

PROMPT, STEPS, ROWS = 2048, 128, 4
CUE, BEGIN = 32, 512  # of a repetition: tokens of it in the prompt, and where they stand before
BLOCKS = {"num_selected_blocks": 8, "num_sink_blocks": 1, "num_local_blocks": 3, "num_query_blocks": 4}
# By name: the cache that decodes, and the fields of AttentionConfig where that is not `full`.
CASES: dict[str, tuple[CacheConfig, dict[str, Any]]] = {
    "full": (CacheConfig(offload=False), {}),
    "shadowkv": (CacheConfig(policy=baselines.ShadowKV(8, 30, budget=384, local_chunks=4, outlier_chunks=12)), {}),
    "shadowkv, chunks of 64": (
        CacheConfig(policy=baselines.ShadowKV(64, 30, budget=320, local_chunks=1, outlier_chunks=2)), {},
    ),
    "arkvale": (CacheConfig(policy=baselines.ArkVale(page=32, budget=16, page_topks=9, sink=1, window=4)), {}),
    "infllmv2, not trained": (CacheConfig(), {"variant": "infllmv2", **BLOCKS}),
    "infllm": (CacheConfig(policy=baselines.InfLLM(32, 32, n_local=128, topk=11, max_cached=11, exc=64, rep=4)), {}),
}  # fmt: skip

Losses = Float[np.ndarray, "B steps"]


def decoded(model: NosaLM, tokens: Int32[Array, "B T"], cache: CacheConfig, steps: int = STEPS) -> tuple[Losses, float]:
    """Losses of the last tokens on the engine, and units fetched per step, layer, row and KV head."""
    state, last = nosa_jax.prefill(
        model, tokens[:, :-steps], max_length=tokens.shape[1], cache=cache, dense=model.config.attention.is_sparse
    )
    first, rest, fetched = _fed(model, state, last, tokens[:, -steps:].T)
    config = model.config
    per_table = float(fetched) / ((steps - 1) * len(tokens) * config.num_layers * config.num_kv_heads)
    return np.concatenate([first[None], rest]).T, per_table


@jax.jit
def _fed(model: NosaLM, state: Any, last: Array, steps: Int32[Array, "steps B"]) -> tuple[Array, Array, Array]:
    def body(carry: Any, pair: Any) -> Any:
        state, fetched = carry
        token, target = pair
        state, out = decode.run_step(model, state, token)
        moved = 0 if out.fetched is None else jnp.sum(out.fetched)
        return (state, fetched + moved), cross_entropy(out.logits, target)

    (_, fetched), losses = jax.lax.scan(body, (state, jnp.int32(0)), (steps[:-1], steps[1:]))
    return cross_entropy(last, steps[0]), losses, fetched


def replayed(
    model: NosaLM, tokens: Int32[Array, "B T"], policy: baselines.InfLLM, steps: int = STEPS
) -> tuple[Losses, float]:
    """As `decoded`, by InfLLM: every layer attends by its replay over that layer's queries, keys and values."""
    config, prompt = model.config, tokens.shape[1] - steps
    fetched = []

    def attend(attention: Any, x: Float[Array, "B T H"]) -> tuple[Array, None]:
        q, k, v = jnp.split(attention.heads(config, x), (config.group_size, config.group_size + 1), axis=-2)
        q = q.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        parts = {"q": q, "k": k[..., 0, :], "v": v[..., 0, :]}
        case = {name: jnp.moveaxis(one[:, :prompt], 1, 2) for name, one in parts.items()}
        case |= {f"dec_{name}": one[:, prompt:] for name, one in parts.items()}
        trace = baselines.replay(policy, case, rope_config=config.rope)
        fetched.append((np.asarray(trace.new_ids) >= 0).sum(-1).mean())
        return attention.merge(jnp.concatenate([trace.prompt_out, trace.out], axis=1)), None

    x = model.embedded(tokens)
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda stacked, at=number: stacked[at], model.layers)
        x, _ = layer.block(config, x, attend)
    logits = model.logits(model.final_norm(x[:, -steps - 1 : -1]))
    return np.asarray(cross_entropy(logits, tokens[:, -steps:])), float(np.mean(fetched))


def documents(tokenizer: Any, count: int, length: int) -> tuple[list[str], Int32[np.ndarray, "N T"]]:
    """The first tokens of `count` packages that the study holds out, those that have so many, and their names."""
    found: dict[str, list[int]] = {}
    for name, files in text.packages().items():
        if text.is_held_out(name, held.HELD_OUT):
            ids = tokenizer.encode(text.joined(files)[: 8 * length])
            found |= {name: ids[:length]} if len(ids) >= length else {}
        if len(found) == count:
            return list(found), np.array(list(found.values()), np.int32)
    rule = f"must be at most {len(found)}, as many as the packages installed here have"
    raise bad_value("--documents", rule, count, "Lower it, or install more packages.")


def repetitions(rows: Int32[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
    """Documents, cut, and behind them what they say from BEGIN on."""
    cut = rows[:, : PROMPT - CUE]
    return np.concatenate([cut, cut[:, BEGIN : BEGIN + CUE + STEPS]], axis=1)


def measure(name: str, model: NosaLM, rows: Int32[np.ndarray, "N T"]) -> tuple[Losses, float]:
    """Losses of all rows by one case, and what it fetched."""
    cache, attention = CASES[name]
    model = with_attention(model, **attention) if attention else model
    results = []
    for begin in range(0, len(rows), ROWS):
        tokens = jnp.asarray(rows[begin : begin + ROWS])
        by_replay = isinstance(cache.policy, baselines.InfLLM)
        results.append(replayed(model, tokens, cache.policy) if by_replay else decoded(model, tokens, cache))
    losses, fetched = zip(*results, strict=True)
    return np.concatenate(losses), float(np.average(fetched, weights=[len(part) for part in losses]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of a dense model")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repetition", action="store_true", help="feed what stands in the prompt before")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if args.documents < 1:
        parser.error(f"--documents: must be >= 1, got {args.documents}. Raise it.")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        parser.error(f"--output: must be a file in a folder that is there, got {args.output}. Name another.")
    dtype = jnp.bfloat16 if current_device().is_gpu else jnp.float32
    model = from_pretrained(args.model, variant="full", dtype=dtype)
    names, rows = documents(load_tokenizer(args.model, model.config.vocab_size), args.documents, PROMPT + STEPS)
    rows = repetitions(rows) if args.repetition else rows
    entries: list[dict[str, Any]] = []
    dense = None
    print("| | loss | above dense attention | fetched |\n|---|---|---|---|")
    for name, (cache, attention) in CASES.items():
        losses, fetched = measure(name, model, rows)
        dense = losses if dense is None else dense
        above = tables.interval(np.asarray(losses - dense, np.float64))
        entries.append({"name": name, "loss": round(float(losses.mean()), 5), "above": above,
                        "documents": losses.mean(1, dtype=float).round(5).tolist(),
                        "fetched": round(fetched, 3), "policy": repr(cache.policy or attention)})  # fmt: skip
        mean, low, high = above
        print(f"| {name} | {losses.mean():.4f} | {mean:+.4f} ({low:+.4f} to {high:+.4f}) | {fetched:.2f} |", flush=True)
        save(args.output, model=args.model.name, prompt=PROMPT, steps=STEPS, documents=names,
             repetition=args.repetition, entries=entries)  # fmt: skip


if __name__ == "__main__":
    main()
