"""Prompts and decode steps of policies and variants on a GPU, by the public functions, on the same prompts and clock.

    python -m experiments.rivals.speed --runs shadowkv:16384:16 arkvale:16384:16 full:16384:16:device \\
        nosa:16384:16:72 --output experiments/results/rivals_speed_h100.json

A run is policy:context:rows[:NAME=VALUE,...] with settings of the policy, or variant:context:rows[:slots], and in any
place behind the rows `device` for a cache that lies there, `repeated` for a KV head for every query head.
Weights are random, so selections are made up. How many units cross the link per step decides the speed of what is
offloaded, so each run is measured twice: fed random tokens, when queries jump about, and fed the same token again and
again, when they hardly move. `fetched` says what crossed, per layer, row and KV head; between the two the time is
nearly a straight line in it, on which a rate measured on real text can be looked up (`experiments.rivals.quality`
measures it).
Decode steps are one jitted `fori_loop` of `decode.run_step` with the state donated; medians, synchronised.
`floor_ms`: the bytes that the step reads at the rate of device memory, plus what crosses at the rate of the link.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

import nosa_jax
from experiments.decode_throughput import launches
from experiments.environment import gpu_arguments, save
from experiments.profiling import link_rate, memory_rate, profile
from experiments.rivals.repeated_heads import repeated_heads
from nosa_jax import CacheConfig, NosaLM, baselines, decode, presets, with_attention
from nosa_jax.cache.plan import plan
from nosa_jax.cache.state import DecodeState, device_bytes
from pallas_kernels.device import Rates

POLICIES = {"shadowkv": baselines.ShadowKV, "arkvale": baselines.ArkVale}


@dataclasses.dataclass(frozen=True)
class Run:
    variant: Any
    context: int
    rows: int
    cache: CacheConfig
    repeated: bool = False

    @staticmethod
    def parse(text: str) -> Run:
        name, context, rows, *rest = text.split(":")
        given = next((part for part in rest if "=" in part), "")
        settings = {key: int(value) for key, _, value in (pair.partition("=") for pair in given.split(",") if pair)}
        words = [part for part in rest if "=" not in part]
        slots = next((int(word) for word in words if word.isdecimal()), None)
        wrong = [word for word in words if word not in ("device", "repeated") and not word.isdecimal()]
        if wrong or (settings and name not in POLICIES) or (slots and name in POLICIES):
            raise ValueError(f"--runs: must be a run as --help describes it, got {text!r}.")
        policy = POLICIES[name](**settings) if name in POLICIES else None
        cache = CacheConfig(offload="device" not in words, slots=slots, policy=policy)
        return Run("full" if policy else name, int(context), int(rows), cache, "repeated" in words)


def loop(
    model: NosaLM, state: DecodeState, tokens: Int32[Array, "steps B"]
) -> tuple[DecodeState, Array, Int32[Array, ""]]:
    """Feeds the tokens; returns the state, the last logits and how many units were fetched."""

    def body(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, _, fetched = carry
        state, out = decode.run_step(model, state, tokens[i])
        return state, out.logits, fetched if out.fetched is None else fetched + jnp.sum(out.fetched)

    logits = jnp.zeros((tokens.shape[1], model.config.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, len(tokens), body, (state, logits, jnp.int32(0)))


def measure(run: Run, model: NosaLM, *, steps: int, repeats: int, prompts: int, rates: Rates) -> dict[str, Any]:
    model = with_attention(model, variant=run.variant)
    if run.repeated:
        model = repeated_heads(model)
    config = model.config
    max_length = run.context + steps * (2 * repeats + 5)
    draw = lambda key, shape: jax.random.randint(jax.random.key(key), shape, 0, config.vocab_size, jnp.int32)
    prompt = draw(0, (run.rows, run.context))
    prefills = []
    state = None
    for _ in range(prompts):  # the first one compiles
        del state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(nosa_jax.prefill(model, prompt, max_length=max_length, cache=run.cache))
        prefills.append(time.perf_counter() - start)
    assert state is not None
    held = device_bytes(state)
    inputs = {"moving": draw(1, (steps, run.rows)), "still": jnp.broadcast_to(draw(2, (run.rows,)), (steps, run.rows))}
    compiled = jax.jit(loop, donate_argnums=1).lower(model, state, inputs["still"]).compile(decode.COMPILER_OPTIONS)
    tables = config.num_layers * run.rows * config.num_kv_heads
    found: dict[str, Any] = {}
    for name, tokens in inputs.items():
        seconds, fetched = [], []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            state, _, count = jax.block_until_ready(compiled(model, state, tokens))
            seconds.append((time.perf_counter() - start) / steps)
            fetched.append(int(count) / steps / tables)
        step = statistics.median(seconds[1:])
        moved = statistics.mean(fetched[1:])
        costs = plan(config, run.rows, max_length, run.cache, misses=moved if run.cache.offload else None)
        hbm, link = (
            costs.hbm_bytes_per_token * run.rows / rates.memory,
            costs.pcie_bytes_per_token * run.rows / rates.link,
        )
        found[name] = {
            "tokens_per_second": round(run.rows / step, 1), "step_ms": round(1e3 * step, 3),
            "samples_ms": [round(1e3 * s, 3) for s in seconds[1:]], "fetched": round(moved, 2),
            "hbm_ms": round(1e3 * hbm, 3), "link_ms": round(1e3 * link, 3), "floor_ms": round(1e3 * (hbm + link), 3),
        }  # fmt: skip
    kernels = {name: ms / steps for name, ms in profile(lambda: compiled(model, state, inputs["moving"])).items()}
    prefill = round(min(prefills[1:]), 3) if prompts > 1 else None
    return {
        "prefill_s": prefill, "cache_device_gb": round(held / 1e9, 3), **found,
        "kernel_ms": {name: round(ms, 4) for name, ms in sorted(kernels.items(), key=lambda x: -x[1])[:40]},
        "launches_per_layer": launches(compiled.as_text()),
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--preset", choices=("nosa_1b", "nosa_3b", "nosa_8b"), default="nosa_8b")
    parser.add_argument("--steps", type=int, default=16, help="decode steps per sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=2, help="how often they are read; with 1 they are not timed")
    args = gpu_arguments(parser)
    rates = Rates(memory=memory_rate(), link=link_rate())
    config = getattr(presets, args.preset)(variant="nosa")
    model = jax.jit(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    print(f"link {rates.link / 1e9:.1f} GB/s, device memory {rates.memory / 1e12:.2f} TB/s", flush=True)
    measured = functools.partial(measure, steps=args.steps, repeats=args.repeats, prompts=args.prompts, rates=rates)
    entries: list[dict[str, Any]] = []
    for text in args.runs:
        try:
            entries.append({"run": text, **measured(Run.parse(text), model)})
        except Exception as error:  # one failure must not lose the rest of the run
            entries.append({"run": text, "failed": f"{type(error).__name__}: {error}"[:300]})
        print(json.dumps(entries[-1]), flush=True)
        save(
            args.output, model=args.preset, link_bytes_per_second=rates.link, hbm_bytes_per_second=rates.memory,
            steps=args.steps, repeats=args.repeats, prompts=args.prompts, entries=entries,
        )  # fmt: skip


if __name__ == "__main__":
    main()
