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
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nosa_jax
from experiments.environment import save
from nosa_jax import AttentionConfig, CacheConfig, ModelConfig, NosaLM, RopeConfig, Sampling, locality, ops, presets

EXPECTED = (ValueError, TypeError, NotImplementedError, FloatingPointError, OSError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function, right keyword arguments, and what each of them is: a kind of `wrong_values`.

    fine: by argument, labels of `wrong_values` that are right input for it after all.
    """

    call: Callable[..., Any]
    arguments: Mapping[str, Any]
    kinds: Mapping[str, str]
    fine: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def answer(self) -> Any:
        """The answer to the right arguments as they stand."""
        return jax.block_until_ready(self.call(**self.arguments))

    def wrong(self, argument: str) -> Iterator[Any]:
        """Wrong values of one argument."""
        for label, value in wrong_values(self.arguments[argument], self.kinds[argument]).items():
            if label not in self.fine.get(argument, ()):
                yield value


def same_forms(value: Any, kind: str) -> Iterator[Any]:
    """Returns one input in several forms that mean the same."""
    if kind == "int":
        yield from (np.int64(value), np.int32(value), np.uint16(value))
    elif kind in ("tokens", "ids"):
        array = np.asarray(value)
        yield from (array.tolist(), array, array.astype(np.int64), jnp.asarray(array))
    elif kind == "floats":
        yield np.asarray(value)
    elif kind == "number":
        yield from (np.float32(value), jnp.float32(value))


def wrong_values(value: Any, kind: str) -> dict[str, Any]:
    """What no function may take silently, by a label."""
    wrong = {"text": "text", "dict": {"a": 1}, "object": object(), "none": None}
    array = np.asarray(value) if kind in ("tokens", "ids", "floats") else np.zeros(1)
    deeper = {"deeper": array[..., None], "bools": array.astype(bool), "complex": array.astype(complex)}
    match kind:
        case "int":
            more = {"negative": -1, "fraction": 1.5, "nan": float("nan"), "bool": True, "list": [3], "digits": "3"}
            return wrong | more | {"huge": 10**30}
        case "number":
            more = {"nan": float("nan"), "inf": float("inf"), "negative": -1.0, "digits": "1.0", "list": [1.0]}
            return wrong | more | {"imaginary": 1j}
        case "tokens" | "ids":
            more = {"floats": array.astype(np.float32), "scalar": array.ravel()[0], "empty": array[:0]}
            more |= {"largest": np.full_like(array, 2**31 - 1), "smallest": np.full_like(array, -(2**31))}
            return wrong | deeper | more | {"wider": np.concatenate([array, array], axis=-1)}
        case "floats":
            return wrong | deeper | {"integers": array.astype(np.int32), "shorter": array[..., :-1]}
        case "choice":
            return wrong | {"other": "no such thing", "number": 3, "bytes": b"auto"}
        case "flag":
            return wrong | {"two": 2, "yes": "yes", "half": 0.5}
    return wrong | {"number": 3, "name": "nosa", "listed": [value]}


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
    shape["rms_norm_eps"] = 2.0**-17  # the same in float32
    stream = lambda **arguments: np.stack(list(nosa_jax.stream(**arguments)))
    generated = lambda **arguments: nosa_jax.generate(**arguments).tokens
    recorded = np.asarray(out.block_ids)
    # Longer prompts are prompts; lengths may be left out; what is read at once may be more than there is.
    rows_fine = {"tokens": ("wider",), "lengths": ("none",)}
    counts_fine = {"chunk": ("none", "huge"), "max_new_tokens": ("huge",), "max_length": ("huge",)}
    beyond = ("largest", "smallest")  # the ops ignore what is out of range
    return {
        "forward": Target(
            lambda **arguments: nosa_jax.forward(**arguments).logits,
            running | {"logits": "all", "record": False, "remat": False},
            row | {"logits": "choice", "record": "flag", "remat": "flag"},
            rows_fine,
        ),
        "generate": Target(
            generated,
            running | {"max_new_tokens": 2, "cache": CacheConfig(), "sampling": Sampling(), "pad_token": 0,
                       "stop_tokens": [3], "record": False, "chunk": 16},
            row | {"max_new_tokens": "int", "cache": "object", "sampling": "object", "pad_token": "int",
                   "chunk": "int"},
            rows_fine | counts_fine,
        ),
        "stream": Target(
            stream,
            running | {"max_new_tokens": 2, "cache": CacheConfig(), "sampling": Sampling(), "pad_token": 0},
            row | {"max_new_tokens": "int", "cache": "object", "sampling": "object", "pad_token": "int"},
            rows_fine | counts_fine,
        ),
        "prefill": Target(
            lambda **arguments: nosa_jax.prefill(**arguments)[1],
            running | {"max_length": 64, "cache": CacheConfig(), "chunk": 16},
            row | {"max_length": "int", "cache": "object", "chunk": "int"},
            rows_fine | counts_fine,
        ),
        "extend": Target(
            lambda **arguments: nosa_jax.extend(**arguments)[1],
            {"model": model, "state": state, "tokens": tokens[:, :5], "lengths": np.array([5, 2], np.int32)},
            row | {"state": "object"},
            rows_fine,
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
            dict.fromkeys(("misses", "link_bytes_per_second", "hbm_bytes_per_second"), ("none",))
            | dict.fromkeys(("batch", "max_length"), ("huge",)),
        ),
        "Sampling": Target(
            Sampling,
            {"temperature": 0.5, "top_k": 5, "top_p": 0.5},
            {"temperature": "number", "top_k": "int", "top_p": "number"},
            {"top_k": ("none", "huge")},
        ),
        "CacheConfig": Target(
            CacheConfig,
            {"offload": True, "slots": 9, "transport": "auto"},
            {"offload": "flag", "slots": "int", "transport": "choice"},
            {"slots": ("none", "huge")},
        ),
        "AttentionConfig": Target(
            AttentionConfig, config, {name: "choice" if name == "variant" else "int" for name in config},
            dict.fromkeys(("num_selected_blocks", "block_size"), ("huge",)),
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
            dict.fromkeys(shape, ("huge",)),
        ),
        "gamma": Target(
            locality.gamma,
            {"block_ids": recorded},
            {"block_ids": "ids"},
            {"block_ids": ("deeper", "empty", "largest", "wider")},
        ),
        "replay_misses": Target(
            locality.replay_misses,
            {"block_ids": recorded, "positions": 0, "attention": attention, "slots": 9},
            {"block_ids": "ids", "attention": "object", "slots": "int"},
            {"block_ids": ("deeper", "empty", "largest", "wider"), "slots": ("huge",)},
        ),
        "block_attention": Target(
            lambda **arguments: ops.block_attention(**arguments)[0],
            {"q": floats(1, 40, 4, 16), **kv, "bias": floats(1, 2, 40), "block_ids": ids, "positions": positions,
             "block_size": 16, "implementation": "auto"},
            {"q": "floats", "k": "floats", "v": "floats", "block_size": "int", "implementation": "choice"},
            {"block_size": ("huge",)},
        ),
        "select_blocks": Target(
            ops.select_blocks,
            {"query_scores": floats(1, 2, 40, 3), "importance_scores": floats(1, 2, 3), "positions": positions,
             "block_size": 16, "num_selected_blocks": 3, "num_sink_blocks": 1, "num_local_blocks": 1,
             "num_query_blocks": 1},
            {"query_scores": "floats", "positions": "ids", "block_size": "int", "num_selected_blocks": "int",
             "num_sink_blocks": "int", "num_local_blocks": "int", "num_query_blocks": "int"},
            {"query_scores": ("none",), "positions": beyond} | dict.fromkeys(
                ("block_size", "num_selected_blocks", "num_sink_blocks", "num_local_blocks", "num_query_blocks"),
                ("huge",),
            ),
        ),
        "pool_keys": Target(
            ops.pool_keys, {"keys": floats(1, 2, 40, 16), "stride": 4}, {"keys": "floats", "stride": "int"},
            {"keys": ("shorter",), "stride": ("huge",)},
        ),
        "block_scores": Target(
            ops.block_scores,
            {"q": floats(1, 40, 4, 16), "pooled_keys": floats(1, 2, 9, 16), "positions": positions, "num_blocks": 3,
             "block_size": 16, "stride": 4},
            {"q": "floats", "pooled_keys": "floats", "positions": "ids", "num_blocks": "int", "block_size": "int",
             "stride": "int"},
            {"positions": beyond},
        ),
        "decode_attention": Target(
            ops.decode_attention,
            {"q": floats(1, 4, 16), "pool": floats(1, 1, 2, 3, 2, 16, 16), "bias": floats(1, 1, 2, 3, 16),
             "slots": np.zeros((1, 2, 2), np.int32), "block_ids": np.array([[[0, -1], [0, 1]]], np.int32),
             "positions": np.array([20], np.int32), "layer": 0},
            {"q": "floats", "pool": "floats", "bias": "floats", "slots": "ids", "positions": "ids", "layer": "int"},
            {"bias": ("none",), "slots": beyond, "positions": beyond},
        ),
    }  # fmt: skip


def equal(ours: Any, theirs: Any) -> bool:
    """Tells whether two answers agree, arrays to rounding."""
    a, b = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    if len(a) != len(b):
        return False
    close = lambda x, y: np.allclose(np.asarray(x), np.asarray(y), atol=1e-5, equal_nan=True)
    same = lambda x, y: close(x, y) if hasattr(x, "shape") else x == y
    return all(map(same, a, b))


def names(message: str, argument: str, others: Iterable[str]) -> bool:
    """Whether the message says which argument is at fault: where two shapes disagree, either."""
    if "must have shape" in message:
        return any(message.startswith(name) for name in others)
    return re.search(rf"\b{re.escape(argument)}\b", message, re.IGNORECASE) is not None


def judge(target: Target, argument: str, value: Any, is_right: bool) -> str:
    """What is wrong with the answer; "right" where nothing is."""
    try:
        answer = jax.block_until_ready(target.call(**{**target.arguments, argument: value}))
    except EXPECTED as error:
        if is_right:
            return f"refused: {type(error).__name__}: {str(error)[:100]}"
        is_named = names(str(error), argument, target.arguments)
        return "right" if is_named else f"unnamed: {type(error).__name__}: {str(error)[:100]}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:100]}"
    if not is_right:
        return "answered"
    return "right" if equal(answer, target.answer) else "another answer"


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
    save(args.output, seed=args.seed, calls=args.calls, possible=len(every), by_function=dict(tried), faults=faults)


if __name__ == "__main__":
    main()
