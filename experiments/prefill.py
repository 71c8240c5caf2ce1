"""Times of sparse attention over whole rows on a GPU, against dense attention by cuDNN and FLA's NSA kernel.

    python -m experiments.prefill --output experiments/results/prefill_h200.json

Times are medians after warm-up, all in one process; calls shorter than 5 ms are enqueued together and waited for once.
Selections are what the ops select on correlated inputs (`experiments.correlated`), except where the entry says
"random". The time of block attention includes building its lists; "whole" adds pooling, scores and selection.
Gradients are for q, k, v and the bias. FLA's kernel needs torch and flash-linear-attention and is left out where they
are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import correlated
from experiments.environment import gpu_arguments, save
from nosa_jax.config import AttentionConfig
from pallas_kernels import block_attention, select_blocks
from pallas_kernels.bench import peers, timing
from pallas_kernels.block_scores import block_scores
from pallas_kernels.pooled_keys import pool_keys

CONFIG = AttentionConfig()


def milliseconds(run: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median per call, as `pallas_kernels.bench` times: short calls are enqueued together and waited for once."""
    return timing.measure(timing.sampler(lambda: run(*args), [{}]), repeats).median


def gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """(inputs, dout, *rest) -> gradients of `attend(inputs, *rest)` for all of its float inputs."""

    def run(inputs: Any, dout: Any, *rest: Any) -> Any:
        _, pull = jax.vjp(lambda floats: attend(floats, *rest), inputs)
        return pull(dout)[0]

    return jax.jit(run)


def dense(floats: tuple[Any, ...]) -> Any:
    q, k, v = floats
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def sparse(implementation: str) -> Callable[..., Any]:
    def attend(floats: tuple[Any, ...], ids: Any, positions: Any) -> Any:
        return block_attention(*floats, ids, positions, block_size=CONFIG.block_size, implementation=implementation)[0]

    return attend


def whole(floats: tuple[Any, ...], positions: Any) -> Any:
    ids = correlated.selection(CONFIG, correlated.Inputs(*floats, positions))
    return sparse("auto")(floats, ids, positions)


def temporary_gib(function: Callable[..., Any], *args: Any) -> float:
    """Peak temporary memory of the compiled function."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**30


class Table:
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, what: str, tokens: int, run: Callable[..., Any], *args: Any, **more: Any) -> None:
        repeats = 3 if tokens > 65536 else 10
        self.record({"what": what, "tokens": tokens, **more}, lambda: milliseconds(run, *args, repeats=repeats))

    def record(self, entry: dict[str, Any], measure: Callable[[], float]) -> None:
        try:
            entry["ms"] = round(measure(), 3)
        except Exception as error:  # one failure must not lose the rest of the run
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
        self.note(entry)

    def note(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        print(json.dumps(entry), flush=True)


def against_dense(table: Table, tokens: int) -> None:
    inputs = correlated.make_inputs(tokens)
    floats, positions = tuple(inputs[:4]), inputs.positions
    ids = jax.jit(lambda inputs: correlated.selection(CONFIG, inputs))(inputs)
    near = {k: round(float(v), 4) for k, v in correlated.locality(ids, num_blocks=tokens // CONFIG.block_size).items()}
    print(tokens, near, flush=True)
    dout = jax.random.normal(jax.random.key(1), inputs.q.shape, jnp.bfloat16)
    plain = (inputs.q, *(jnp.moveaxis(x, 1, 2) for x in (inputs.k, inputs.v)))

    table.add("dense cudnn forward", tokens, jax.jit(dense), plain)
    table.add("dense cudnn forward+backward", tokens, gradients(dense), plain, dout)
    names = ("auto", "triton") if tokens == 32768 else ("auto",)
    for name in names:
        table.add(f"block attention {name} forward", tokens, jax.jit(sparse(name)), floats, ids, positions, **near)
        table.add(
            f"block attention {name} forward+backward", tokens, gradients(sparse(name)), floats, dout, ids, positions
        )
    table.add("whole op forward", tokens, jax.jit(whole), floats, positions, **near)
    table.add("whole op forward+backward", tokens, gradients(whole), floats, dout, positions)

    stride = CONFIG.pooling_stride
    options = {"num_blocks": tokens // CONFIG.block_size, "block_size": CONFIG.block_size, "stride": stride}
    if tokens <= 32768:
        pooled = jax.jit(lambda k: pool_keys(k, stride=stride))(inputs.k)
        table.add("pool keys", tokens, jax.jit(lambda k: pool_keys(k, stride=stride)), inputs.k)
        score = jax.jit(lambda q, pooled: block_scores(q, pooled, positions, **options))
        table.add("block scores", tokens, score, inputs.q, pooled)
        scores = score(inputs.q, pooled)
        fill = jax.random.normal(jax.random.key(2), scores.shape[:2] + scores.shape[3:])
        pick = jax.jit(
            lambda scores, fill: select_blocks(
                scores, fill, positions, block_size=CONFIG.block_size, num_selected_blocks=CONFIG.num_selected_blocks,
                num_sink_blocks=CONFIG.num_sink_blocks, num_local_blocks=CONFIG.num_local_blocks,
                num_query_blocks=CONFIG.num_query_blocks,
            )
        )  # fmt: skip
        table.add("select blocks", tokens, pick, scores, fill)
    table.note(
        {
            "what": "temporary memory, GiB",
            "tokens": tokens,
            "scores and selection": round(
                temporary_gib(lambda inputs: correlated.selection(CONFIG, inputs), inputs), 3
            ),
            "whole op forward": round(temporary_gib(whole, floats, positions), 3),
            "[N, T, C] in bfloat16 would be": 2 * inputs.q.shape[2] * tokens * (tokens // stride) / 2**30,
        }
    )


def random_selections(table: Table, tokens: int = 32768) -> None:
    """The worst case: every query selects on its own. FLA's kernel gets the same ids."""
    inputs = correlated.make_inputs(tokens)
    floats, positions = tuple(inputs[:4]), inputs.positions
    scores = jax.random.uniform(jax.random.key(3), (1, 2, tokens, tokens // CONFIG.block_size))
    ids = jax.jit(
        lambda scores: select_blocks(
            scores, None, positions, block_size=CONFIG.block_size, num_selected_blocks=CONFIG.num_selected_blocks,
            num_sink_blocks=1, num_local_blocks=1, num_query_blocks=0,
        )
    )(scores)  # fmt: skip
    near = {k: round(float(v), 4) for k, v in correlated.locality(ids, num_blocks=tokens // CONFIG.block_size).items()}
    table.add("block attention auto forward, random", tokens, jax.jit(sparse("auto")), floats, ids, positions, **near)
    table.add("block attention triton forward, random", tokens, jax.jit(sparse("triton")), floats, ids, positions)
    real = jax.jit(lambda inputs: correlated.selection(CONFIG, inputs))(inputs)
    fla(table, inputs, ids, "random")
    fla(table, inputs, real, "real")


def fla(table: Table, inputs: Any, ids: Any, kind: str) -> None:
    missing = peers.missing().get(peers.FLA)
    if missing:
        print(f"no FLA peer: {missing}", flush=True)
        return
    arrays = inputs._asdict() | {"block_ids": ids, "first_block": None}
    for gradient in (False, True):
        what = f"FLA NSA {'forward+backward' if gradient else 'forward'}, {kind}"

        def run(gradient: bool = gradient) -> float:
            peer = peers.fla_nsa(arrays, block_size=CONFIG.block_size, gradient=gradient, copies=1)
            return timing.measure(peer.sample, 5).median

        table.record({"what": what, "tokens": inputs.q.shape[1]}, run)


def group_sizes(table: Table, tokens: int = 16384) -> None:
    """Correctness against the XLA implementation in float32 on the last queries, and times, for other shapes."""
    for heads, dim in ((2, 128), (8, 128), (16, 128), (32, 64)):
        inputs = correlated.make_inputs(tokens, heads, 2, dim)
        floats, positions = tuple(inputs[:4]), inputs.positions
        ids = jax.jit(lambda inputs: correlated.selection(CONFIG, inputs))(inputs)
        dout = jax.random.normal(jax.random.key(1), inputs.q.shape, jnp.bfloat16)
        last = slice(tokens - 256, None)
        exact = block_attention(
            floats[0][:, last].astype(jnp.float32), *(x.astype(jnp.float32) for x in floats[1:]), ids[:, :, last],
            positions[:, last], block_size=CONFIG.block_size, implementation="xla",
        )[0]  # fmt: skip
        ours = jax.jit(sparse("auto"))(floats, ids, positions)[:, last].astype(jnp.float32)
        error = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
        shape = {"group": heads // 2, "dim": dim, "relative_error": round(error, 6)}
        table.add("block attention auto forward", tokens, jax.jit(sparse("auto")), floats, ids, positions, **shape)
        run = gradients(sparse("auto"))
        table.add("block attention auto forward+backward", tokens, run, floats, dout, ids, positions, **shape)


PARTS: dict[str, Callable[[Table], None]] = {
    "8k": lambda table: against_dense(table, 8192),
    "32k": lambda table: against_dense(table, 32768),
    "random": random_selections,
    "groups": group_sizes,
    "128k": lambda table: against_dense(table, 131072),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PARTS,
        default=list(PARTS),
        help="what to time, in this order (default: all of it)",
    )
    args = gpu_arguments(parser)
    table = Table()
    for part in args.parts:
        PARTS[part](table)
        save(args.output, shape="N/K/D = 32/2/128, bfloat16, batch 1", entries=table.entries)


if __name__ == "__main__":
    main()
