"""What users get who call nothing but `prefill`, `jit_extend`, `generate`, `stream` and `jit_decode_step`.

    python -m experiments.as_used --runs nosa:16:16384:64:80 full:4:16384:64:device --output DIR/as_used_h100.json

A run is variant:rows:context:new[:slots[:chunk[:max_length]]]; slots "device" keeps the cache on the device, and none
stands for the default. Every run has a process of its own, so that its peak of device memory is its own. Prompts are
random tokens and weights random unless a checkpoint is given, so selections are made up: `fetched` says how many
blocks crossed per step, layer, KV head and row. Times are medians of synchronised calls after a warm one:

prefill_s: `prefill` with room for the new tokens (or of `max_length`).   first_token_s: until `stream` has yielded one.
extend_s: `jit_extend` of the prompt's state by `--extend` tokens.   forward_s: `forward` of them, with `--forward`.
generate_ms, stream_ms, own_loop_ms: per decode step, of `generate` (less its time to the first token), of `stream` and
of a loop of `jit_decode_step`. first_steps_ms: of four steps after prompts that are alike, with `--first-steps`.
peak_gb: of device memory, weights included, beside what `plan` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import nosa_jax
from experiments.environment import gpu_arguments, save
from nosa_jax import CacheConfig, NosaLM, presets

PRESETS = ("nosa_1b", "nosa_3b", "nosa_8b", "tiny")


@dataclasses.dataclass(frozen=True)
class Run:
    variant: Any
    rows: int
    context: int
    new: int
    cache: CacheConfig
    chunk: int | None
    max_length: int

    @staticmethod
    def parse(text: str) -> Run:
        variant, rows, context, new, *rest = text.split(":")
        slots, chunk, longest = (*rest, "", "", "")[:3]
        cache = CacheConfig(offload=False) if slots == "device" else CacheConfig(slots=int(slots) if slots else None)
        max_length = int(longest) if longest else int(context) + int(new)
        return Run(variant, int(rows), int(context), int(new), cache, int(chunk) if chunk else None, max_length)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call after one that compiles."""
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def peak_bytes() -> int:
    """The most device memory that this process has held at once; 0 where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def own_loop(model: NosaLM, state: Any, logits: Any, steps: int) -> float:
    """Seconds per step of a greedy loop as a user writes it."""
    best = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
    token = best(logits)
    for _ in range(2):  # compiles, then runs once
        state, logits = nosa_jax.jit_decode_step(model, state, token)
        token = best(logits)
    jax.block_until_ready(token)
    start = time.perf_counter()
    for _ in range(steps - 2):
        state, logits = nosa_jax.jit_decode_step(model, state, token)
        token = best(logits)
    jax.block_until_ready(token)
    return (time.perf_counter() - start) / (steps - 2)


def extending(model: NosaLM, tokens: Any, count: int, repeats: int, *, max_length: int, **rooms: Any) -> float:
    """Median seconds of `jit_extend` by so many tokens, again and again."""
    room = max(max_length, tokens.shape[1] + count * (repeats + 1))
    state, _ = nosa_jax.prefill(model, tokens, max_length=room, **rooms)
    more = jax.random.randint(jax.random.key(1), (len(tokens), count), 0, model.config.vocab_size, jnp.int32)
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, logits = nosa_jax.jit_extend(model, state, more)
        jax.block_until_ready(logits)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def first_steps(model: NosaLM, tokens: Any, *, max_length: int, **rooms: Any) -> dict[str, float]:
    """Four steps right after the prompt, all rows alike: what the published system times."""
    tokens = jnp.broadcast_to(tokens[:1], tokens.shape)
    best = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
    for _ in range(2):  # the first time compiles
        state, logits = nosa_jax.prefill(model, tokens, max_length=max_length, **rooms)
        token = jax.block_until_ready(best(logits))
        start = time.perf_counter()
        for _ in range(4):
            state, logits = nosa_jax.jit_decode_step(model, state, token)
            token = best(logits)
        jax.block_until_ready(token)
        step = (time.perf_counter() - start) / 4
        del state
    fetched = nosa_jax.generate(model, tokens, max_new_tokens=5, record="fetched", **rooms).fetched
    return {
        "first_steps_ms": 1e3 * step, "first_steps_tokens_per_second": len(tokens) / step,
        "first_steps_fetched": float(jnp.mean(fetched[..., 1:].astype(jnp.float32))),
    }  # fmt: skip


def streamed(model: NosaLM, tokens: Any, **options: Any) -> tuple[float, float]:
    """Seconds to the first token, and per step after it."""
    start, times = time.perf_counter(), []
    for _ in nosa_jax.stream(model, tokens, **options):
        times.append(time.perf_counter() - start)
    return times[0], (times[-1] - times[1]) / max(1, len(times) - 2)


def measure(
    run: Run, model: NosaLM, *, repeats: int, extend: int, decode: bool, forward: bool, first: bool
) -> dict[str, Any]:
    tokens = jax.random.randint(jax.random.key(0), (run.rows, run.context), 0, model.config.vocab_size, jnp.int32)
    rooms = {"cache": run.cache, "chunk": run.chunk}
    read = {"prompt": run.context, "chunk": run.chunk}
    planned = nosa_jax.plan(model.config, run.rows, run.max_length, run.cache, **read)
    before = peak_bytes()
    prefill = lambda: nosa_jax.prefill(model, tokens, max_length=run.max_length, **rooms)
    found: dict[str, Any] = {"prefill_s": seconds(lambda: prefill()[1], repeats)}
    found["prefill_tokens_per_second"] = run.rows * run.context / found["prefill_s"]
    found |= {"peak_gb": peak_bytes() / 1e9, "weights_peak_gb": before / 1e9, "plan_gb": planned.device_bytes / 1e9}
    if forward:
        found["forward_s"] = seconds(lambda: nosa_jax.forward(model, tokens, logits="last").logits, repeats)
        found["forward_tokens_per_second"] = run.rows * run.context / found["forward_s"]
    if extend:
        found["extend_s"] = extending(model, tokens, extend, repeats, max_length=run.max_length, **rooms)
        found["extend_peak_gb"] = peak_bytes() / 1e9
    if first:
        found |= first_steps(model, tokens, max_length=run.max_length, **rooms)
    if decode and run.new >= 8:
        options = {"max_new_tokens": run.new, **rooms}
        streamed(model, tokens, **options)
        samples = [streamed(model, tokens, **options) for _ in range(repeats)]
        first, step = (statistics.median(column) for column in zip(*samples, strict=True))
        found |= {"first_token_s": first, "stream_ms": 1e3 * step}
        whole = seconds(lambda: nosa_jax.generate(model, tokens, **options).tokens, repeats)
        found["generate_ms"] = 1e3 * (whole - first) / (run.new - 1)
        state, logits = prefill()
        found["own_loop_ms"] = 1e3 * own_loop(model, state, logits, run.new)
        del state
        if model.config.attention.is_sparse:
            fetched = nosa_jax.generate(model, tokens, record="fetched", **options).fetched
            found["fetched"] = float(jnp.mean(fetched[..., 1:].astype(jnp.float32)))
        found["decode_peak_gb"] = peak_bytes() / 1e9
    return {name: round(value, 4) for name, value in found.items()}


def in_this_process(args: argparse.Namespace) -> None:
    run = Run.parse(args.child)
    if args.model in PRESETS:
        config = getattr(presets, args.model)().with_attention(variant=run.variant)
        model = jax.jit(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    else:
        model = nosa_jax.from_pretrained(args.model, variant=run.variant, dtype=jnp.bfloat16)
    jax.block_until_ready(jax.tree.leaves(model))
    what = {"extend": args.extend, "decode": not args.prefill_only, "forward": args.forward, "first": args.first_steps}
    found = measure(run, model, repeats=args.repeats, **what)
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[], metavar="VARIANT:ROWS:CONTEXT:NEW[:SLOTS[:CHUNK[:MAX]]]")
    parser.add_argument("--model", default="nosa_8b", help=f"one of {PRESETS}, or a folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--extend", type=int, default=0, help="time `extend` by so many tokens, too")
    parser.add_argument("--prefill-only", action="store_true", help="leave out the decode loops")
    parser.add_argument("--forward", action="store_true", help="time `forward` of the prompts, too")
    parser.add_argument("--first-steps", action="store_true", help="time four steps after prompts that are alike, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    own = dict(os.environ)
    if "--child" not in sys.argv:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process must leave the memory to its children
    args = gpu_arguments(parser, tiny=True)
    if args.child:
        in_this_process(args)
        return
    entries = []
    for text in args.runs:
        entry: dict[str, Any] = {"run": text, "model": args.model, "selections": "made up by random weights"}
        again = [sys.executable, "-m", "experiments.as_used", "--child", text, "--model", args.model]
        again += ["--repeats", str(args.repeats), "--extend", str(args.extend)]
        again += ["--tiny"] * args.tiny + ["--prefill-only"] * args.prefill_only
        again += ["--forward"] * args.forward + ["--first-steps"] * args.first_steps
        done = subprocess.run(again, capture_output=True, text=True, env=own)
        if done.returncode:  # one failure must not lose the rest of the run
            entry["failed"] = done.stderr.strip().splitlines()[-1][:300]
        else:
            entry |= json.loads(done.stdout.strip().splitlines()[-1])
        entries.append(entry)
        print(json.dumps(entry), flush=True)
        save(args.output, repeats=args.repeats, extend=args.extend, entries=entries)


if __name__ == "__main__":
    main()
