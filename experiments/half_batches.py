"""Would halves of a batch hide transfers? One half's selection while the other half's blocks cross, weights read once.

python -m experiments.half_batches --context 65536 --batch 64 --output experiments/results/half_batches_h200.json

The rows are kept in two states of their own, so that nothing of one half waits for the other; the matrix products see
all rows. "staggered": the second half's selection starts after the first half's, beside its transfers. XLA runs
launches that do not depend on each other side by side only in concurrent CUDA graphs, so both kinds of graph are
measured. State, traces and shapes are those of `experiments.decode_throughput`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from experiments import traces
from experiments.decode_throughput import TRACED_HEADS, Run, by_layer, make_state, of_all_layers
from experiments.environment import gpu_arguments, save
from experiments.overlap import CONCURRENT
from nosa_jax import CacheConfig, NosaLM, decode, presets
from nosa_jax.attention.layer import Attention
from nosa_jax.cache.residence import write_back
from nosa_jax.cache.state import DecodeState
from nosa_jax.decode.step import attend_token, place_of
from pallas_kernels import blocks


def step(
    model: NosaLM, states: tuple[DecodeState, ...], tokens: Array, forced: Array, staggered: bool
) -> tuple[tuple[DecodeState, ...], Array]:
    """`decode.run_step` of rows in several states; forced [L, B, K, J] replaces the selections."""
    config, size = model.config, tokens.shape[0] // len(states)
    parts = [slice(i * size, (i + 1) * size) for i in range(len(states))]
    places = [place_of(config, state.lengths) for state in states]

    def body(index: Array, carry: tuple[Array, tuple[DecodeState, ...]]) -> tuple[Array, tuple[DecodeState, ...]]:
        x, states = carry

        def attend(attention: Attention, x: Array) -> tuple[Array, tuple[DecodeState, ...]]:
            qkv = attention.heads(config, x[:, 0])
            outs, after, updated = [], None, []
            for part, state, place in zip(parts, states, places, strict=True):
                of_half = qkv[part]
                if staggered and after is not None:
                    of_half, _ = jax.lax.optimization_barrier((of_half, after))
                out, (state, recorded) = attend_token(model, of_half, state, place, forced[index, part], index)
                assert recorded is not None
                after = recorded[1]
                outs.append(out)
                updated.append(state)
            return attention.merge(jnp.concatenate(outs)[:, None]), tuple(updated)

        return model.layers.block(config, x, attend, index)

    x, states = jax.lax.fori_loop(0, config.num_layers, body, (model.embed[...][tokens][:, None], states))
    states = tuple(write_back(state, of.positions) for state, of in zip(states, places, strict=True))
    states = tuple(dataclasses.replace(state, lengths=state.lengths + 1) for state in states)
    return states, model.logits(model.final_norm(x[:, 0]))


def measure(
    model: NosaLM,
    run: Run,
    *,
    halves: int,
    staggered: bool,
    ids: np.ndarray,
    steps: int,
    repeats: int,
    max_length: int,
) -> dict[str, Any]:
    """Milliseconds per step of a batch in this many parts, in both kinds of CUDA graphs."""
    part = dataclasses.replace(run, batch=run.batch // halves)
    split = np.split(ids, halves, axis=2)  # [steps, layers with a trace, B, K, J]
    first = [of_all_layers(jnp.asarray(one[0]), model.config.num_layers) for one in split]
    states = tuple(make_state(model.config, part, max_length, one, jax.random.key(0)) for one in first)
    token = jnp.zeros((run.batch,), jnp.int32)

    def loop(model: NosaLM, states: Any, token: Array, ids: Array) -> Any:
        def body(i: Array, carry: Any) -> Any:
            states, token = carry
            states, logits = step(model, states, token, of_all_layers(ids[i], model.config.num_layers), staggered)
            return states, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, steps, body, (states, token))

    lowered = jax.jit(loop, donate_argnums=1).lower(model, states, token, jnp.asarray(ids[1 : 1 + steps]))
    result, sample = {}, 0
    for name, options in (("default", {}), ("concurrent", CONCURRENT)):
        compiled = lowered.compile(compiler_options=decode.COMPILER_OPTIONS | options)
        seconds = []
        for _ in range(repeats + 1):
            given = jnp.asarray(ids[1 + sample * steps : 1 + (sample + 1) * steps])
            arguments = jax.block_until_ready((model, states, token, given))
            start = time.perf_counter()
            states, token = jax.block_until_ready(compiled(*arguments))
            seconds.append((time.perf_counter() - start) / steps)
            sample += 1
        result[f"{name}_ms"] = round(1e3 * statistics.median(seconds[1:]), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--slots", type=int, default=80)
    parser.add_argument("--steps", type=int, default=24, help="decode steps per sample")
    parser.add_argument("--repeats", type=int, default=2)
    args = gpu_arguments(parser)
    config = presets.nosa_8b()
    model = jax.jit(lambda: NosaLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    run = Run("nosa", (args.context, args.context), args.batch, CacheConfig(slots=args.slots), True)
    total = 1 + 2 * args.steps * (args.repeats + 1)
    max_length = args.context + total
    num_blocks = blocks.num_blocks(max_length, config.attention.block_size)
    ids = traces.make_trace(config, run.lengths - 1, total, TRACED_HEADS * config.num_kv_heads, num_blocks)
    ids = by_layer(ids, config.num_kv_heads)
    measured = functools.partial(
        measure, model, run, ids=ids, steps=args.steps, repeats=args.repeats, max_length=max_length
    )
    entries = []
    for halves, staggered in itertools.chain([(1, False)], itertools.product([2], (False, True))):
        entries.append({"parts": halves, "staggered": staggered} | measured(halves=halves, staggered=staggered))
        print(json.dumps(entries[-1]), flush=True)
        save(args.output, run=dataclasses.asdict(run), steps=args.steps, repeats=args.repeats, entries=entries)


if __name__ == "__main__":
    main()
