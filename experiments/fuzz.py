"""Public functions called with wrong types, shapes, dtypes and values: what they answer. Seeded; a CPU will do.

    python -m experiments.fuzz --calls 1000 --output experiments/results/fuzz_cpu.json

A call takes right arguments and changes one. Where the change is another form of the same input (a list, a NumPy
array or integer, another integer dtype) the answer must be that of the canonical form. Where it is wrong, one of
`EXPECTED` must be raised with a message that names the argument. Anything else is a fault: an answer to a wrong input,
another exception, a message that does not say which argument.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nosa_jax
from experiments.environment import environment
from nosa_jax import AttentionConfig, CacheConfig, ModelConfig, NosaLM, RopeConfig, Sampling, locality, ops, presets

EXPECTED = (ValueError, TypeError, NotImplementedError, FloatingPointError, OSError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function, right keyword arguments, and what each of them is: a kind of `wrong_values`.

    optional: arguments for which None is right, too. unbounded: integers that may be as large as one likes.
    """

    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    kinds: Mapping[str, str]
    optional: tuple[str, ...] = ()
    unbounded: tuple[str, ...] = ()

    def wrong(self, argument: str) -> Iterator[Any]:
        """Wrong values of one argument."""
        for value in wrong_values(self.arguments[argument], self.kinds[argument]):
            is_large = isinstance(value, int) and value > 2**62
            if not (value is None and argument in self.optional) and not (is_large and argument in self.unbounded):
                yield value


def same_forms(value: Any, kind: str) -> Iterator[Any]:
    """The same input in other forms."""
    if kind == "int":
        yield from (np.int64(value), np.int32(value), np.uint16(value))
    elif kind in ("tokens", "ids"):
        array = np.asarray(value)
        yield from (array.tolist(), array, array.astype(np.int64), jnp.asarray(array))
    elif kind == "floats":
        yield np.asarray(value)
    elif kind == "number":
        yield from (np.float32(value), jnp.float32(value))


def wrong_values(value: Any, kind: str) -> Iterator[Any]:
    """What no function may take silently."""
    yield from ("text", {"a": 1}, object())
    if kind == "int":
        yield from (-1, 1.5, float("nan"), True, [3], None, "3", 10**30)
    elif kind == "number":
        yield from (float("nan"), float("inf"), -1.0, "1.0", [1.0], None, 1j)
    elif kind in ("tokens", "ids"):
        array = np.asarray(value)
        yield from (array.astype(np.float32), array.astype(bool), array[..., None], array.ravel()[0], array[:0])
        yield from (np.full_like(array, 2**31 - 1), np.full_like(array, -(2**31)), array.astype(complex), None)
        yield np.concatenate([array, array], axis=-1)
    elif kind == "floats":
        array = np.asarray(value)
        yield from (
            array.astype(np.int32),
            array.astype(bool),
            array[..., None],
            array[..., :-1],
            array.astype(complex),
            None,
        )
    elif kind == "choice":
        yield from ("no such thing", 3, None, b"auto")
    elif kind == "flag":
        yield from (2, "yes", None, 0.5)
    elif kind == "object":
        yield from (None, 3, "nosa", [value])


@functools.cache
def targets() -> dict[str, Target]:
    """Every function that is tried."""
    rng = np.random.default_rng(0)
    model = NosaLM(presets.tiny(), rngs=nnx.Rngs(0))
    tokens = rng.integers(0, 256, (2, 40)).astype(np.int32)
    lengths = np.array([40, 17], np.int32)
    state, _ = nosa_jax.prefill(model, tokens, lengths, max_length=64)
    out = nosa_jax.forward(model, tokens, lengths, record=True)
    attention = presets.tiny().attention
    row = {"model": "object", "tokens": "tokens", "lengths": "ids"}
    running = {"model": model, "tokens": tokens, "lengths": lengths}
    floats = lambda *shape: rng.standard_normal(shape, np.float32)
    positions = np.arange(40, dtype=np.int32)[None]
    kv = {"k": floats(1, 2, 40, 16), "v": floats(1, 2, 40, 16)}
    ids = np.sort(rng.integers(0, 3, (1, 2, 40, 2)), -1).astype(np.int32)
    ids[..., 1] = np.where(ids[..., 1] == ids[..., 0], -1, ids[..., 1])
    config = dataclasses.asdict(attention)
    shape = {field.name: getattr(presets.tiny(), field.name) for field in dataclasses.fields(ModelConfig)}
    stream = lambda **arguments: np.stack(list(nosa_jax.stream(**arguments)))
    generated = lambda **arguments: nosa_jax.generate(**arguments).tokens
    recorded = np.asarray(out.block_ids)
    return {
        "forward": Target(
            lambda **arguments: nosa_jax.forward(**arguments).logits,
            running | {"logits": "all", "record": False, "remat": False},
            row | {"logits": "choice", "record": "flag", "remat": "flag"},
            optional=("lengths",),
        ),
        "generate": Target(
            generated,
            running | {"max_new_tokens": 2, "cache": CacheConfig(), "sampling": Sampling(), "pad_token": 0,
                       "stop_tokens": [3], "record": False, "chunk": 16},
            row | {"max_new_tokens": "int", "cache": "object", "sampling": "object", "pad_token": "int",
                   "chunk": "int"},
            optional=("lengths", "chunk"), unbounded=("chunk",),
        ),
        "stream": Target(
            stream,
            running | {"max_new_tokens": 2, "cache": CacheConfig(), "sampling": Sampling(), "pad_token": 0},
            row | {"max_new_tokens": "int", "cache": "object", "sampling": "object", "pad_token": "int"},
            optional=("lengths",),
        ),
        "prefill": Target(
            lambda **arguments: nosa_jax.prefill(**arguments)[1],
            running | {"max_length": 64, "cache": CacheConfig(), "chunk": 16},
            row | {"max_length": "int", "cache": "object", "chunk": "int"},
            optional=("lengths", "chunk"), unbounded=("chunk",),
        ),
        "extend": Target(
            lambda **arguments: nosa_jax.extend(**arguments)[1],
            {"model": model, "state": state, "tokens": tokens[:, :5], "lengths": np.array([5, 2], np.int32)},
            row | {"state": "object"},
            optional=("lengths",),
        ),
        "decode_step": Target(
            lambda **arguments: nosa_jax.decode_step(**arguments)[1],
            {"model": model, "state": state, "tokens": tokens[:, 0]},
            {"model": "object", "state": "object", "tokens": "tokens"},
        ),
        "plan": Target(
            lambda **arguments: nosa_jax.plan(**arguments).to_dict(),
            {"config": presets.tiny(), "batch": 2, "max_length": 64, "cache": CacheConfig(), "misses": 1.0,
             "link_bytes_per_second": 50e9, "hbm_bytes_per_second": 1e12},
            {"config": "object", "batch": "int", "max_length": "int", "cache": "object", "misses": "number",
             "link_bytes_per_second": "number", "hbm_bytes_per_second": "number"},
            optional=("misses", "link_bytes_per_second", "hbm_bytes_per_second"), unbounded=("batch", "max_length"),
        ),
        "Sampling": Target(
            Sampling,
            {"temperature": 0.5, "top_k": 5, "top_p": 0.5},
            {"temperature": "number", "top_k": "int", "top_p": "number"},
            optional=("top_k",), unbounded=("top_k",),
        ),
        "CacheConfig": Target(
            CacheConfig,
            {"offload": True, "slots": 9, "transport": "auto"},
            {"offload": "flag", "slots": "int", "transport": "choice"},
            optional=("slots",), unbounded=("slots",),
        ),
        "AttentionConfig": Target(
            AttentionConfig, config, {name: "choice" if name == "variant" else "int" for name in config},
            unbounded=("num_selected_blocks",),
        ),
        "RopeConfig": Target(RopeConfig, {"theta": 1e4, "kind": "plain"}, {"theta": "number", "kind": "choice"}),
        "ModelConfig": Target(
            ModelConfig,
            shape,
            {
                name: "object" if name in ("rope", "attention") else "number" if name == "rms_norm_eps"
                else "flag" if isinstance(value, bool) else "int"
                for name, value in shape.items()
            },
            unbounded=tuple(shape),
        ),
        "gamma": Target(locality.gamma, {"block_ids": recorded}, {"block_ids": "ids"}),
        "replay_misses": Target(
            locality.replay_misses,
            {"block_ids": recorded, "positions": 0, "attention": attention, "slots": 9},
            {"block_ids": "ids", "attention": "object", "slots": "int"},
            unbounded=("slots",),
        ),
        "block_attention": Target(
            lambda **arguments: ops.block_attention(**arguments)[0],
            {"q": floats(1, 40, 4, 16), **kv, "bias": floats(1, 2, 40), "block_ids": ids, "positions": positions,
             "block_size": 16, "implementation": "auto"},
            {"q": "floats", "k": "floats", "v": "floats", "block_size": "int", "implementation": "choice"},
            unbounded=("block_size",),
        ),
        "select_blocks": Target(
            ops.select_blocks,
            {"query_scores": floats(1, 2, 40, 3), "importance_scores": floats(1, 2, 3), "positions": positions,
             "block_size": 16, "num_selected_blocks": 3, "num_sink_blocks": 1, "num_local_blocks": 1,
             "num_query_blocks": 1},
            {"query_scores": "floats", "positions": "ids", "block_size": "int", "num_selected_blocks": "int",
             "num_sink_blocks": "int", "num_local_blocks": "int", "num_query_blocks": "int"},
            optional=("query_scores",), unbounded=("block_size", "num_selected_blocks"),
        ),
        "pool_keys": Target(
            ops.pool_keys, {"keys": floats(1, 2, 40, 16), "stride": 4}, {"keys": "floats", "stride": "int"}
        ),
        "block_scores": Target(
            ops.block_scores,
            {"q": floats(1, 40, 4, 16), "pooled_keys": floats(1, 2, 9, 16), "positions": positions, "num_blocks": 3,
             "block_size": 16, "stride": 4},
            {"q": "floats", "pooled_keys": "floats", "positions": "ids", "num_blocks": "int", "block_size": "int",
             "stride": "int"},
        ),
        "decode_attention": Target(
            ops.decode_attention,
            {"q": floats(1, 4, 16), "pool": floats(1, 1, 2, 3, 2, 16, 16), "bias": floats(1, 1, 2, 3, 16),
             "slots": np.zeros((1, 2, 2), np.int32), "block_ids": np.array([[[0, -1], [0, 1]]], np.int32),
             "positions": np.array([20], np.int32), "layer": 0},
            {"q": "floats", "pool": "floats", "bias": "floats", "slots": "ids", "positions": "ids", "layer": "int"},
            optional=("bias",),
        ),
    }  # fmt: skip


def equal(ours: Any, theirs: Any) -> bool:
    """The same answer, arrays to rounding."""
    a, b = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    if len(a) != len(b):
        return False
    close = lambda x, y: np.allclose(np.asarray(x), np.asarray(y), atol=1e-5, equal_nan=True)
    same = lambda x, y: close(x, y) if hasattr(x, "shape") else x == y
    return all(map(same, a, b))


def names(message: str, argument: str) -> bool:
    return argument.lower() in message.lower()


def judge(target: Target, argument: str, value: Any, is_right: bool) -> str:
    """ "right", or what is wrong with the answer."""
    try:
        answer = jax.block_until_ready(target.call(**{**target.arguments, argument: value}))
    except EXPECTED as error:
        if is_right:
            return f"refused: {type(error).__name__}: {str(error)[:100]}"
        return "right" if names(str(error), argument) else f"unnamed: {type(error).__name__}: {str(error)[:100]}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:100]}"
    if not is_right:
        return "answered"
    return "right" if equal(answer, canonical(target)) else "another answer"


_canonical: dict[int, Any] = {}


def canonical(target: Target) -> Any:
    """The answer to the right arguments as they stand."""
    if id(target) not in _canonical:
        _canonical[id(target)] = jax.block_until_ready(target.call(**target.arguments))
    return _canonical[id(target)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of which ones (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(args.seed)
    every = [
        (name, argument, value, is_right)
        for name, target in targets().items()
        for argument, kind in target.kinds.items()
        for is_right, values in (
            (True, same_forms(target.arguments[argument], kind)),
            (False, target.wrong(argument)),
        )
        for value in values
    ]
    chosen = rng.choice(len(every), args.calls, replace=args.calls > len(every))
    faults, tried = [], collections.Counter()
    for number in chosen:
        name, argument, value, is_right = every[number]
        verdict = judge(targets()[name], argument, value, is_right)
        tried[name] += 1
        if verdict != "right":
            array = f"{value.dtype}{list(value.shape)} " if hasattr(value, "dtype") else ""
            form = f"{type(value).__name__} {array}{str(value)[:40]}"
            faults.append({"function": name, "argument": argument, "value": form, "verdict": verdict})
            print(f"{name}({argument}={form}): {verdict}".replace("\n", " "), flush=True)
    print(f"{len(faults)} faults in {args.calls} calls of {len(every)} possible ones")
    if args.output:
        result = {"environment": environment(), "seed": args.seed, "calls": args.calls, "possible": len(every),
                  "by_function": dict(tried), "faults": faults}  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
