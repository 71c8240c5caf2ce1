"""What is timed: for each op its named cases, its inputs, the truth to compare with, and the least it has to do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels as ops
from pallas_kernels import OPS, Op, blocks
from pallas_kernels.append_and_select import cases as step_cases
from pallas_kernels.append_and_select import reference as step_reference
from pallas_kernels.append_token import cases as append_cases
from pallas_kernels.append_token import reference as append_reference
from pallas_kernels.bench import counts
from pallas_kernels.bench.counts import Floor, nbytes
from pallas_kernels.block_attention import cases as attention_cases
from pallas_kernels.block_attention import reference as attention_reference
from pallas_kernels.block_scores import cases as scores_cases
from pallas_kernels.block_scores import reference as scores_reference
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.device import current_device
from pallas_kernels.fetch_blocks import cases as fetch_cases
from pallas_kernels.fetch_blocks import reference as fetch_reference
from pallas_kernels.pooled_keys import cases as pooled_cases
from pallas_kernels.pooled_keys import reference as pooled_reference
from pallas_kernels.rebuilt_attention import cases as rebuilt_cases
from pallas_kernels.rebuilt_attention import reference as rebuilt_reference
from pallas_kernels.resolve_slots import cases as resolve_cases
from pallas_kernels.resolve_slots import reference as resolve_reference
from pallas_kernels.rms_norm import cases as norm_cases
from pallas_kernels.rms_norm import reference as norm_reference
from pallas_kernels.select_blocks import cases as select_cases
from pallas_kernels.select_blocks import reference as select_reference

_REFERENCE_TOKENS = 4096  # of pooled keys
_REFERENCE_QUERIES = 256  # of select_blocks, whose reference is a Python loop


@dataclasses.dataclass(frozen=True)
class Work:
    """One case of one op.

    call(implementation=, **inputs): what is timed. updates: inputs that it changes in place, as its users donate them;
    updated(output): what they are then.
    checked: inputs of the call whose output is compared. truth(): the reference's answer, a dict; comparable(output)
    gives the same entries, or fewer, of an output. compared: which part of the output that is.
    """

    inputs: dict[str, Any]
    call: Callable[..., Any]
    floor: Floor
    truth: Callable[[], dict[str, Any]] | None = None
    comparable: Callable[[Any], dict[str, Any]] = lambda output: {"out": output}
    compared: str = "all"
    checked: dict[str, Any] | None = None
    updates: tuple[str, ...] = ()
    updated: Callable[[Any], tuple[Any, ...]] = lambda output: (output,)

    @functools.cached_property
    def expected(self) -> dict[str, Any] | None:
        """The truth, computed once, in exact float32."""
        if self.truth is None:
            return None
        with jax.default_matmul_precision("highest"):
            return jax.device_get(self.truth())


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A row of the table of ops. source: the op's `cases` module. build(case, its inputs) gives the work."""

    op: Op
    source: Any
    build: Callable[[Any, Any], Work]

    @property
    def cases(self) -> Mapping[str, Any]:
        return self.source.CASES

    def work(self, case: Any) -> Work:
        return self.build(case, _inputs(self.source, case))


@functools.lru_cache(maxsize=1)
def _inputs(source: Any, case: Any) -> Any:
    """The last inputs made: real ones take half a minute, and neighbouring ops share them."""
    return source.make_inputs(case, jax.random.key(0))


def _logits_bytes() -> int:
    """For one array of the references' [queries, tokens] logits, of which they hold some four."""
    return 2**30 if current_device().is_gpu else 2**26


def sample_of(length: int, most: int) -> tuple[np.ndarray, str]:
    """(evenly spaced places, at most `most` of `length`; in words)."""
    if length <= most:
        return np.arange(length), "all"
    return np.unique(
        np.linspace(0, length - 1, max(1, most)).round().astype(int)
    ), f"{max(1, most)} of {length} queries"


def upcast(arrays: Any) -> Any:
    """Floats as float32."""
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_float(x) else x, arrays)


def on_numpy(inputs: dict[str, Any]) -> dict[str, Any]:
    """Turns arrays into what references that are Python loops take."""
    return {name: int(x) if name == "layer" else jax.tree.map(np.asarray, x) for name, x in inputs.items()}


def _pool_keys(case: pooled_cases.Case, keys: Float[Array, "B K S D"]) -> Work:
    windows = blocks.num_windows(min(_REFERENCE_TOKENS, case.tokens), case.stride)
    call = functools.partial(ops.pool_keys, stride=case.stride)
    out = jax.eval_shape(functools.partial(call, implementation="xla"), keys)
    return Work(
        {"keys": keys},
        call,
        Floor(nbytes(keys, out), keys.size + 2 * out.size),
        lambda: {"out": pooled_reference.pool_keys_ref(upcast(keys[:, :, :_REFERENCE_TOKENS]), stride=case.stride)},
        lambda output: {"out": output[:, :, :windows]},
        "all" if case.tokens <= _REFERENCE_TOKENS else f"the first {windows} windows",
    )


def _append_pooled_keys(case: pooled_cases.Case, keys: Float[Array, "B K S D"]) -> Work:
    """The last `chunk` tokens arrive after all others, in the second of two layers."""
    layer, before = jnp.asarray(1, jnp.int32), case.tokens - case.chunk
    call = functools.partial(ops.append_pooled_keys, stride=case.stride)
    total = blocks.num_windows(case.tokens, case.stride)
    pooled = jnp.zeros((2, case.batch, case.kv_heads, total, case.dim), keys.dtype)
    sums = jnp.zeros((2, case.batch, case.kv_heads, 2, case.dim), jnp.float32)
    row = lambda n: jnp.full((case.batch,), n, jnp.int32)
    if before:
        fill = jax.jit(functools.partial(call, implementation="xla"))
        pooled, sums = fill(pooled, sums, keys[:, :, :before], row(0), row(before), layer)
    first = max(0, before // case.stride - 1)  # of the windows that this call completes
    new = keys[:, :, before:]
    written = case.batch * case.kv_heads * (total - first) * case.dim
    inputs = {
        "pooled": pooled,
        "sums": sums,
        "new": new,
        "start": row(before),
        "count": row(case.chunk),
        "layer": layer,
    }
    by_name = lambda output: dict(zip(("pooled", "sums"), output, strict=True))
    return Work(
        inputs,
        call,
        Floor(
            nbytes(new) + written * keys.dtype.itemsize + nbytes(sums), new.size + 2 * written
        ),  # one layer's sums, read and written
        lambda: by_name(pooled_reference.append_pooled_keys_ref(**on_numpy(inputs), stride=case.stride)),
        by_name,
        updates=("pooled", "sums"),
        updated=lambda output: output,
    )


def _block_scores(case: scores_cases.Case, inputs: dict[str, Any]) -> Work:
    options: dict[str, Any] = scores_cases.options(case)
    call = functools.partial(ops.block_scores, **options)
    out = jax.eval_shape(functools.partial(call, implementation="xla"), **inputs)
    batch, length, heads, dim = inputs["q"].shape
    windows = inputs["pooled_keys"].shape[2]
    seen = counts.visible_windows(
        inputs["positions"], inputs["first_block"], windows, block_size=case.block_size, stride=case.stride
    )
    at, compared = sample_of(length, _logits_bytes() // max(1, 4 * batch * heads * windows))

    def truth() -> dict[str, Any]:
        arrays = inputs | {name: inputs[name][:, at] for name in ("q", "positions")}
        return {"out": jax.jit(functools.partial(scores_reference.block_scores_ref, **options))(**upcast(arrays))}

    return Work(
        inputs,
        call,
        Floor(nbytes(inputs, out), 2 * heads * dim * seen, inputs["q"].dtype.name),
        truth,
        lambda output: {"out": output[:, :, at]},
        compared,
    )


def _select_blocks(case: select_cases.Case, inputs: dict[str, Any]) -> Work:
    options: dict[str, Any] = select_cases.options(case)
    call = functools.partial(ops.select_blocks, **options)
    out = jax.eval_shape(functools.partial(call, implementation="xla"), **inputs)
    at, compared = sample_of(inputs["positions"].shape[1], _REFERENCE_QUERIES)

    def truth() -> dict[str, Any]:
        arrays = inputs | {"query_scores": inputs["query_scores"][:, :, at], "positions": inputs["positions"][:, at]}
        return {"out": select_reference.select_blocks_ref(**jax.device_get(arrays), **options)}

    return Work(inputs, call, Floor(nbytes(inputs, out)), truth, lambda output: {"out": output[:, :, at]}, compared)


def attention_arrays(output: Any) -> dict[str, Any]:
    out, lse = output
    return {"out": out, "lse": lse}


def forward_and_backward(
    attend: Callable[..., Any], inputs: dict[str, Any], dout: Float[Array, "B T N D"]
) -> dict[str, Any]:
    """out and lse of `attend`, and the gradients of sum(out * dout) by name."""
    learned = {name: inputs[name] for name in ("q", "k", "v", "bias") if inputs[name] is not None}
    (out, lse), pull = jax.vjp(lambda x: attend(**(inputs | x)), learned)
    return {"out": out, "lse": lse} | pull((dout, jnp.zeros_like(lse)))[0]


def attention(inputs: dict[str, Any], *, block_size: int, gradient: bool) -> Work:
    """Block attention of these inputs, forward alone or forward and backward with a random gradient `dout`."""
    attend = functools.partial(ops.block_attention, block_size=block_size)
    q = inputs["q"]
    batch, length, heads, _ = q.shape
    numbered = inputs
    if inputs["positions"] is None:
        numbered = inputs | {"positions": blocks.whole_rows(batch, length)}
    floor = counts.attention(numbered, block_size=block_size, gradient=gradient)
    at, compared = sample_of(length, _logits_bytes() // max(1, 4 * batch * heads * inputs["k"].shape[2]))
    sampled = {name: numbered[name][:, at] for name in ("q", "positions")}
    if inputs["block_ids"] is not None:
        sampled["block_ids"] = inputs["block_ids"][:, :, at]
    slow = functools.partial(attention_reference.block_attention_ref, block_size=block_size)
    if not gradient:
        return Work(
            inputs,
            attend,
            floor,
            lambda: attention_arrays(jax.jit(slow)(**upcast(inputs | sampled))),
            lambda output: {name: x[:, at] for name, x in attention_arrays(output).items()},
            compared,
        )

    dout = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
    # Compared where only the sampled queries have a gradient: then the others do not count in those of k and v.
    sparse_dout = jnp.zeros_like(dout).at[:, at].set(dout[:, at])

    def call(*, implementation: str, dout: Float[Array, "B T N D"], **inputs: Any) -> dict[str, Any]:
        return forward_and_backward(functools.partial(attend, implementation=implementation), inputs, dout)

    def comparable(output: dict[str, Any]) -> dict[str, Any]:
        return {name: x[:, at] if name in ("out", "lse", "q") else x for name, x in output.items()}

    return Work(
        inputs | {"dout": dout},
        call,
        floor,
        lambda: jax.jit(functools.partial(forward_and_backward, slow))(upcast(inputs | sampled), upcast(dout[:, at])),
        comparable,
        compared,
        inputs | {"dout": sparse_dout},
    )


def _attention(gradient: bool) -> Callable[[Any, Any], Work]:
    return lambda case, inputs: attention(inputs, **attention_cases.options(case), gradient=gradient)


def _decode_attention(case: decode_cases.Case, inputs: dict[str, Any]) -> Work:
    return Work(
        inputs,
        ops.decode_attention,
        counts.decode_attention(inputs),
        lambda: {"out": jax.jit(decode_reference.decode_attention_ref)(**upcast(inputs))},
    )


def _update_and_attend(case: decode_cases.Case, inputs: dict[str, Any]) -> Work:
    given = decode_cases.offloaded(inputs, jax.random.key(1))
    attended, moved = counts.decode_attention(given), counts.moved_blocks(given | {"block_ids": given["loads"]})
    floor = dataclasses.replace(attended, bytes=attended.bytes + moved.bytes, link_bytes=moved.link_bytes)
    by_name = lambda output: dict(zip(("out", "pool"), output, strict=True))

    def call(*, implementation: str, **arrays: Any) -> Any:
        return ops.update_and_attend(**decode_cases.arguments(arrays), implementation=implementation)

    def truth() -> dict[str, Any]:
        return by_name(decode_reference.update_and_attend_ref(**upcast(on_numpy(decode_cases.arguments(given)))))

    return Work(given, call, floor, truth, by_name, updates=("pool",), updated=lambda output: output[1:])


def _rebuilt_attention(case: rebuilt_cases.Case, inputs: dict[str, Any]) -> Work:
    truth = lambda: {"out": rebuilt_reference.rebuilt_attention_ref(**on_numpy(inputs))}
    return Work(inputs, ops.rebuilt_attention, counts.rebuilt_attention(inputs), truth)


def _append_token(case: append_cases.Case, inputs: dict[str, Any]) -> Work:
    options = append_cases.options(case)
    by_number = lambda output: {str(i): x for i, x in enumerate(jax.tree.leaves(output))}
    keys, _, importance = inputs["summaries"]
    sums = [cache[1][0] for cache in (keys, importance) if cache is not None]  # of one layer, read and written
    return Work(
        inputs,
        functools.partial(ops.append_token, **options),
        Floor(2 * nbytes(inputs["qkv"], sums) + nbytes(inputs["delta"])),
        lambda: by_number(append_reference.append_token_ref(**on_numpy(inputs), **options)),
        by_number,
        updates=("summaries",),
        updated=lambda output: output[-1:],
    )


def _append_and_select(case: step_cases.Case, inputs: dict[str, Any]) -> Work:
    """Compared without the selection: where scores nearly tie, rounding decides, and slots follow."""
    options: dict[str, Any] = step_cases.options(case)

    def by_number(output: Any) -> dict[str, Any]:
        token, selectable, *_ = output
        return {str(i): x for i, x in enumerate(jax.tree.leaves((token, selectable.summaries)))}

    return Work(
        inputs,
        functools.partial(ops.append_and_select, **options),
        counts.append_and_select(case, inputs),
        lambda: by_number(step_reference.append_and_select_ref(**on_numpy(inputs), **options)),
        by_number,
        "the token and its summaries",
        updates=("selectable",),
        updated=lambda output: output[1:2],
    )


def _rms_norm(case: norm_cases.Case, inputs: dict[str, Any]) -> Work:
    options = norm_cases.options(case)
    return Work(
        inputs,
        functools.partial(ops.rms_norm, **options),
        Floor(2 * nbytes(inputs["x"]) + nbytes(inputs["weight"][0])),
        lambda: {"out": norm_reference.rms_norm_ref(**on_numpy(inputs), **options)},
    )


def _resolve_slots(case: resolve_cases.Case, inputs: dict[str, Any]) -> Work:
    names = ("blocks", "last_used", "slots", "loads", "num_loads")
    listed = nbytes(*(inputs[name][0] for name in ("blocks", "last_used"))) * 2 + 3 * nbytes(inputs["wanted"])
    return Work(
        inputs,
        ops.resolve_slots,
        Floor(listed),
        lambda: dict(zip(names, resolve_reference.resolve_slots_ref(**on_numpy(inputs)), strict=True)),
        lambda output: dict(zip(names, output, strict=True)),
    )


def _transport(call: Callable[..., Any], slow: Callable[..., Any], inputs: dict[str, Any], updated: str) -> Work:
    return Work(
        inputs, call, counts.moved_blocks(inputs), lambda: {"out": slow(**on_numpy(inputs))}, updates=(updated,)
    )


def _fetch_blocks(case: fetch_cases.Case, inputs: dict[str, Any]) -> Work:
    return _transport(ops.fetch_blocks, fetch_reference.fetch_blocks_ref, inputs, "pool")


def _write_back_blocks(case: fetch_cases.Case, inputs: dict[str, Any]) -> Work:
    inputs = fetch_cases.of_all_layers(inputs)
    return _transport(ops.write_back_blocks, fetch_reference.write_back_blocks_ref, inputs, "host")


# Ops that share their inputs are neighbours.
BENCHMARKS: dict[str, Benchmark] = {
    "pool_keys": Benchmark(OPS["pool_keys"], pooled_cases, _pool_keys),
    "append_pooled_keys": Benchmark(OPS["append_pooled_keys"], pooled_cases, _append_pooled_keys),
    "append_token": Benchmark(OPS["append_token"], append_cases, _append_token),
    "append_and_select": Benchmark(OPS["append_and_select"], step_cases, _append_and_select),
    "rms_norm": Benchmark(OPS["rms_norm"], norm_cases, _rms_norm),
    "block_scores": Benchmark(OPS["block_scores"], scores_cases, _block_scores),
    "select_blocks": Benchmark(OPS["select_blocks"], select_cases, _select_blocks),
    "block_attention": Benchmark(OPS["block_attention"], attention_cases, _attention(gradient=False)),
    "block_attention_grad": Benchmark(OPS["block_attention"], attention_cases, _attention(gradient=True)),
    "decode_attention": Benchmark(OPS["decode_attention"], decode_cases, _decode_attention),
    "update_and_attend": Benchmark(OPS["update_and_attend"], decode_cases, _update_and_attend),
    "rebuilt_attention": Benchmark(OPS["rebuilt_attention"], rebuilt_cases, _rebuilt_attention),
    "resolve_slots": Benchmark(OPS["resolve_slots"], resolve_cases, _resolve_slots),
    "fetch_blocks": Benchmark(OPS["fetch_blocks"], fetch_cases, _fetch_blocks),
    "write_back_blocks": Benchmark(OPS["write_back_blocks"], fetch_cases, _write_back_blocks),
}
