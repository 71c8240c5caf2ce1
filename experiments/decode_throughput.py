"""Tokens per second of batched decoding on a GPU, what bounds them, and the rivals on the same engine.

python -m experiments.decode_throughput --runs nosa:16384:16:80:trace --output experiments/results/decode_16k_h200.json

A run is variant:context:batch:slots, then :trace, :FILE.npz or nothing; slots "device" keeps the cache on the device.
context: tokens of each row at the start, or 8192-24576 for rows of lengths spread evenly from the one to the other.
With "trace" the selection of every step is replaced, after it was computed, by one whose locality is the published one;
with a file of `Selections.save`, as `nosa locality --save-selections` writes one, by what another model selected on a
text (`experiments.traces` says how it is mapped; the timed model takes the file's attention); without, it is what the
weights select. Weights are random unless a checkpoint is given, keys and values always; all loops are one jitted
`lax.fori_loop` of `decode.run_step` with the state donated. Medians, synchronised. Shares compare the step with its
bytes (`nosa_jax.cache.step_costs.step_bytes`) at rates measured in the same process: a sum over device memory for what
it reads there, `device_put` for what crosses the link.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, Shaped

from experiments import traces
from experiments.environment import gpu_arguments, save
from experiments.profiling import link_rate, memory_rate, profile
from nosa_jax import CacheConfig, ModelConfig, NosaLM, Selections, decode, from_pretrained, presets
from nosa_jax.cache import slots
from nosa_jax.cache.plan import plan
from nosa_jax.cache.state import DecodeState, empty_state
from nosa_jax.cache.step_costs import step_bytes
from nosa_jax.convert import with_attention
from nosa_jax.locality import replay_misses
from pallas_kernels import blocks
from pallas_kernels.device import Rates

TRACED_HEADS = 8  # layers with a made-up trace of their own, per row; those beyond repeat them


@dataclasses.dataclass(frozen=True)
class Run:
    variant: Any
    context: tuple[int, int]  # of the shortest and the longest row
    batch: int
    cache: CacheConfig
    traced: bool
    trace_file: str | None = None  # where the selections were recorded; None makes them up

    @staticmethod
    def parse(text: str) -> Run:
        variant, context, batch, where, *rest = text.split(":", 4)
        cache = CacheConfig(offload=False) if where == "device" else CacheConfig(slots=int(where))
        shortest, longest = (int(context.split("-")[at]) for at in (0, -1))
        file = rest[0] if rest and rest[0] != "trace" else None
        if shortest > longest or (file is not None and not file.endswith(".npz")):
            raise ValueError(f"--runs: must be variant:context:batch:slots[:trace or :FILE.npz], got {text!r}")
        return Run(variant, (shortest, longest), int(batch), cache, bool(rest), file)

    @property
    def lengths(self) -> Int32[np.ndarray, " B"]:
        """Tokens of each row at the start."""
        return np.linspace(*self.context, self.batch).round().astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "run", "max_length"))
def make_state(config: ModelConfig, run: Run, max_length: int, ids: Array | None, key: Array) -> DecodeState:
    """Rows of random content; the slots hold the first selection."""
    state = empty_state(config, run.batch, max_length, run.cache, jnp.bfloat16)
    normal = lambda shape, dtype: jax.random.normal(key, shape, dtype)
    fill = lambda whole: jax.lax.fori_loop(
        0, config.num_layers, lambda i, x: x.at[i].set(normal(x.shape[1:], x.dtype)), whole
    )
    lengths = jnp.asarray(run.lengths)
    state = dataclasses.replace(state, pool=fill(state.pool), lengths=lengths)
    if state.host is not None:
        layer = jax.device_put(normal((1, *state.host.shape[1:]), state.host.dtype), jax.memory.Space.Host)
        put = lambda i, host: jax.lax.dynamic_update_index_in_dim(host, layer, i, 0)
        host = jax.lax.fori_loop(0, config.num_layers, put, state.host)
        assert ids is not None
        step = jnp.broadcast_to(lengths[:, None] - 1, ids.shape[:-1])
        state = dataclasses.replace(state, host=host, table=slots.filled_table(ids, step, state.pool.shape[3]))
    if state.pooled_keys is not None:
        pooled_keys = state.pooled_keys._replace(pooled=fill(state.pooled_keys.pooled))
        state = dataclasses.replace(state, pooled_keys=pooled_keys)
    if state.importance is not None:
        pooled = state.pooled_importance._replace(pooled=jnp.abs(fill(state.pooled_importance.pooled)))
        state = dataclasses.replace(state, importance=jnp.abs(fill(state.importance)), pooled_importance=pooled)
    return state


def by_layer(ids: Int32[np.ndarray, "steps B heads J"], kv_heads: int) -> Int32[np.ndarray, "steps Z B K J"]:
    """Traces of layers: Z have one of their own."""
    return ids.reshape(*ids.shape[:2], -1, kv_heads, ids.shape[-1]).transpose(0, 2, 1, 3, 4)


def of_all_layers(of_first: Shaped[Array, "Z *rest"], layers: int) -> Shaped[Array, "L *rest"]:
    """What the first layers have, the ids of their traces say, for all of them: in turn."""
    return jnp.concatenate([of_first] * -(-layers // of_first.shape[0]))[:layers]


def loop(
    model: NosaLM, state: DecodeState, token: Int32[Array, " B"], ids: Int32[Array, "new Z B K J"] | None, steps: int
) -> tuple[DecodeState, Array, Array]:
    """Greedy decoding. Returns the state, the last tokens and how many blocks were fetched."""

    def body(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, token, fetched = carry
        forced = None
        if ids is not None:
            forced = of_all_layers(ids[i], model.config.num_layers)
        state, out = decode.run_step(model, state, token, None, forced)
        if out.fetched is not None:
            fetched += jnp.sum(out.fetched)
        return state, jnp.argmax(out.logits, axis=-1).astype(jnp.int32), fetched

    return jax.lax.fori_loop(0, steps, body, (state, token, jnp.int32(0)))


def launches(text: str) -> int:
    """Kernels per layer: fusions, calls and copies in the body of the loop over layers, the one that holds most."""
    bodies: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"^%?([\w.\-]+) .*\{$", line):
            name = match[1]
        elif re.match(r"\s+%?[\w.\-]+ = .*? (fusion|custom-call|copy|sort|scatter)\(", line):
            bodies[name] = bodies.get(name, 0) + 1
    return max((n for name, n in bodies.items() if name.startswith("region")), default=0)


def measure(
    model: NosaLM,
    run: Run,
    *,
    steps: int,
    repeats: int,
    rates: Rates,
    options: dict[str, Any],
) -> dict[str, Any]:
    recorded = None if run.trace_file is None else Selections.load(run.trace_file)
    if recorded is not None and recorded.attention.variant != run.variant:
        raise ValueError(f"--runs: must name the variant that {run.trace_file} records, {recorded.attention.variant!r}")
    overrides = {"variant": run.variant} if recorded is None else dataclasses.asdict(recorded.attention)
    model = with_attention(model, **overrides)
    config = model.config
    attention = config.attention
    max_length = run.context[1] + steps * (repeats + 2)
    plan(config, run.batch, max_length, run.cache).require_memory(allocated=("weights",))
    num_blocks = blocks.num_blocks(max_length, attention.block_size)
    traced = first = replayed = None
    total = 1 + steps * (repeats + 2)
    if attention.is_sparse:
        if recorded is None:
            heads = min(TRACED_HEADS, config.num_layers) * config.num_kv_heads
            ids = traces.make_trace(config, run.lengths - 1, total, heads, num_blocks)
        else:
            ids = traces.replayed(recorded, config, run.lengths - 1, total)
        if run.cache.slots is not None:
            listed = jnp.asarray(ids.transpose(1, 2, 0, 3))  # [B, heads, steps, J]
            at = jnp.broadcast_to((run.lengths - 1)[:, None, None] + np.arange(total), listed.shape[:-1])
            misses = replay_misses(listed, at, attention, run.cache.slots)
            misses = misses[..., 1 + steps : 1 + steps * (repeats + 1)].mean((0, 2)).reshape(-1, config.num_kv_heads)
            replayed = round(float(of_all_layers(misses, config.num_layers).mean()), 3)
        traced = by_layer(ids, config.num_kv_heads)
        first = of_all_layers(jnp.asarray(traced[0]), config.num_layers)
    state = make_state(config, run, max_length, first, jax.random.key(0))
    token = jnp.zeros((run.batch,), jnp.int32)
    start = time.perf_counter()

    def given(sample: int) -> Array | None:
        """Selections of a sample's steps, where they are replaced."""
        if traced is None or not run.traced:
            return None
        return jnp.asarray(traced[1 + sample * steps : 1 + (sample + 1) * steps])

    compiled = (
        jax.jit(functools.partial(loop, steps=steps), donate_argnums=1)
        .lower(model, state, token, given(0))
        .compile(compiler_options=decode.COMPILER_OPTIONS | options)
    )
    compile_seconds = time.perf_counter() - start
    seconds, fetched = [], []
    for i in range(repeats + 1):
        arguments = jax.block_until_ready((model, state, token, given(i)))
        start = time.perf_counter()
        state, token, count = jax.block_until_ready(compiled(*arguments))
        seconds.append((time.perf_counter() - start) / steps)
        fetched.append(int(count) / steps)
    step_seconds = statistics.median(seconds[1:])
    arguments = jax.block_until_ready((model, state, token, given(repeats + 1)))
    kernels = {name: ms / steps for name, ms in profile(lambda: compiled(*arguments)).items()}
    tables = config.num_layers * run.batch * config.num_kv_heads
    moved = statistics.mean(fetched[1:]) / tables
    least = step_bytes(config, run.lengths, fetched=moved, offloaded=state.host is not None)
    hbm_ms, link_ms = 1e3 * least.device / rates.memory, 1e3 * least.link / rates.link
    memory = compiled.memory_analysis()
    return {
        "run": dataclasses.asdict(run), "attention": dataclasses.asdict(attention), "steps": steps,
        "tokens_per_second": round(run.batch / step_seconds, 1),
        "step_ms": round(1e3 * step_seconds, 3), "samples_ms": [round(1e3 * s, 3) for s in seconds[1:]],
        "fetched_per_table": round(moved, 3), "replayed_per_table": replayed,
        "hbm_gb": round(least.device / 1e9, 3),
        "link_gb": round(least.link / 1e9, 4), "hbm_ms": round(hbm_ms, 3), "link_ms": round(link_ms, 3),
        "share_of_sum": round((hbm_ms + link_ms) / (1e3 * step_seconds), 3),
        "share_of_larger": round(max(hbm_ms, link_ms) / (1e3 * step_seconds), 3),
        "kernel_ms": {name: round(ms, 4) for name, ms in sorted(kernels.items(), key=lambda x: -x[1])[:40]},
        "launches_per_layer": launches(compiled.as_text()),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1), "compile_s": round(compile_seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", required=True, type=Run.parse, metavar="VARIANT:CONTEXT:BATCH:SLOTS[:trace|:FILE.npz]"
    )
    parser.add_argument("--preset", choices=("nosa_1b", "nosa_3b", "nosa_8b"), default="nosa_8b")
    parser.add_argument(
        "--model", type=Path, help="folder of a checkpoint, for its shape and weights instead of a preset's"
    )
    parser.add_argument("--steps", type=int, default=64, help="decode steps per sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--xla", nargs="*", default=[], metavar="FLAG=VALUE", help="compiler options to try")
    args = gpu_arguments(parser)
    rates = Rates(memory=memory_rate(), link=link_rate())
    if args.model:
        model = from_pretrained(args.model, dtype=jnp.bfloat16)
    else:
        config = getattr(presets, args.preset)()
        model = jax.jit(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    options: dict[str, Any] = dict(option.split("=", 1) for option in args.xla)
    print(f"link {rates.link / 1e9:.1f} GB/s, device memory {rates.memory / 1e12:.2f} TB/s", flush=True)
    measured = functools.partial(measure, steps=args.steps, repeats=args.repeats, rates=rates, options=options)
    entries = []
    for run in args.runs:
        try:
            entries.append(measured(model, run))
        except Exception as error:  # one failure must not lose the rest of the run
            entries.append({"run": dataclasses.asdict(run), "failed": f"{type(error).__name__}: {error}"[:300]})
        print(json.dumps(entries[-1]), flush=True)
        save(
            args.output,
            model=args.model.name if args.model else args.preset,
            link_bytes_per_second=rates.link,
            hbm_bytes_per_second=rates.memory,
            repeats=args.repeats,
            compiler_options=decode.COMPILER_OPTIONS | options,
            entries=entries,
        )


if __name__ == "__main__":
    main()
