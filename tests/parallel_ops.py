"""Every op inside `jax.shard_map` against the same op outside. A program, see `eight_devices`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import mesh_of, report
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels.append_and_select import Selectable
from pallas_kernels.append_and_select import cases as step_cases
from pallas_kernels.append_token import cases as append_cases
from pallas_kernels.block_attention import cases as attention_cases
from pallas_kernels.block_scores import cases as score_cases
from pallas_kernels.decode_attention import Store
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.fetch_blocks import cases as fetch_cases
from pallas_kernels.pooled_keys import cases as key_cases
from pallas_kernels.rebuilt_attention import Chunks, Exact, Factors
from pallas_kernels.rebuilt_attention import cases as rebuilt_cases
from pallas_kernels.resolve_slots import Resolved
from pallas_kernels.resolve_slots import cases as slot_cases
from pallas_kernels.rms_norm import cases as norm_cases
from pallas_kernels.select_blocks import cases as select_cases

# Of each op the first axes of its arguments and results: "b" rows, "k" KV heads or query heads by KV head, "." others.
# The importance of a token in any head takes its values in all heads: `append_token` is cut by rows alone.
AXES: dict[str, tuple[dict[str, str], Any]] = {
    "block_attention": (
        dict(q="b.k", k="bk", v="bk", bias="bk", block_ids="bk", positions="b", first_block="b"), ("b.k", "b.k"),
    ),
    "block_scores": (dict(q="b.k", pooled_keys="bk", positions="b", first_block="b"), "bk"),
    "select_blocks": (dict(query_scores="bk", importance_scores="bk", positions="b", first_block="b"), "bk"),
    "pool_keys": (dict(keys="bk"), "bk"),
    "append_pooled_keys": (
        dict(pooled=".bk", sums=".bk", new="bk", start="b", count="b", layer=""), (".bk", ".bk"),
    ),
    "append_token": (
        dict(qkv="b", cos="b", sin="b", scale="", delta="", summaries=".b", positions="b", layer=""),
        ("b", "b", "b", ".b"),
    ),
    "append_and_select": (
        dict(projected="b", selectable=Selectable(".b", "", "", ".b"), positions="b", layer=""),
        ("b", Selectable(".b", "", "", ".b"), "b", "b"),
    ),
    "rms_norm": (dict(x="b", weight="", layer=""), "b"),
    "decode_attention": (
        dict(q="bk", pool=".bk", bias=".bk", slots="bk", block_ids="bk", positions="b", layer=""), "bk",
    ),
    "update_and_attend": (
        dict(token="bk", store=Store(".bk", ".bk", "b", ".bk"), residence="bk", positions="b", layer=""), ("bk", ".bk"),
    ),
    "rebuilt_attention": (
        dict(
            q="bk", factors=Factors(".b", ".bk", "", ""), chunks=Chunks(".bk", "bk", "bk"),
            exact=Exact(".bk", "b"), layer="",
        ),
        "bk",
    ),
    "resolve_slots": (
        dict(blocks=".bk", last_used=".bk", wanted="bk", step="b", layer=""), Resolved(".bk", ".bk", "bk", "bk", "bk"),
    ),
    "fetch_blocks": (dict(pool=".bk", host=".bk", page_table="b", block_ids="bk", slots="bk", layer=""), ".bk"),
    "write_back_blocks": (dict(host=".bk", pool=".bk", page_table="b", block_ids=".bk", slots=".bk"), ".bk"),
}  # fmt: skip
LEARNED = {"block_attention": ("q", "k", "v", "bias"), "pool_keys": ("keys",)}


def specs_of(op: str, arguments: dict[str, Any]) -> tuple[dict[str, PartitionSpec], Any]:
    """Of arguments by name, and of results."""
    names = {"b": "data", "k": "tensor", ".": None}
    spec = lambda letters: PartitionSpec(*(names[letter] for letter in letters))
    given, out = AXES[op]
    return {name: jax.tree.map(spec, given[name]) for name in arguments}, jax.tree.map(spec, out)


def sharded(call: Callable[..., Any], op: str, arguments: dict[str, Any], mesh: Any) -> Callable[..., Any]:
    """`call`, of arguments by name, with every device doing its own rows and KV heads; the default check is on."""
    in_specs, out_specs = specs_of(op, arguments)
    return jax.shard_map(call, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs)


def placed(op: str, arguments: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """The arguments on a mesh, each in the memory where it was."""

    def place(spec: PartitionSpec, part: Any) -> Any:
        put = lambda x: jax.device_put(x, NamedSharding(mesh, spec, memory_kind=x.sharding.memory_kind))
        return jax.tree.map(put, part)

    specs, _ = specs_of(op, arguments)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return {name: jax.tree.map(place, specs[name], part, is_leaf=is_spec) for name, part in arguments.items()}


def in_order(arrays: dict[str, Any]) -> dict[str, Any]:
    """With the pages of each row on the device that has the row."""
    table = arrays["page_table"]
    return arrays | {"page_table": jnp.arange(table.size, dtype=table.dtype).reshape(table.shape)}


def calls() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Of each op, arguments that look like a model's, and what is static."""
    key = jax.random.key(0)
    attention, scores = attention_cases.SMALL["k2_g1_packed"], score_cases.SMALL["k2_g1_packed"]
    selection, token = select_cases.SMALL["k2_g8_chunk"], append_cases.SMALL["nosa"]
    step = dataclasses.replace(step_cases.SMALL["nosa"], positions=(320, -1, 3, 335))
    norm = norm_cases.Case(4, 64)
    decoding = decode_cases.make_inputs(decode_cases.Case((100, 205), 9), key)
    offloaded = in_order(decode_cases.offloaded(decoding, key, 0.3))
    keys = key_cases.make_inputs(key_cases.SMALL["importance"], key)
    moves = in_order(fetch_cases.make_inputs(fetch_cases.SMALL["all"], key))
    batch, heads, length, dim = keys.shape
    every = lambda ids: jnp.stack([ids] * moves["pool"].shape[0])
    return {
        "block_attention": (attention_cases.make_inputs(attention, key), attention_cases.options(attention)),
        "block_scores": (
            score_cases.make_inputs(scores, key),
            {"num_blocks": scores.num_blocks, "block_size": scores.block_size, "stride": scores.stride},
        ),
        "select_blocks": (select_cases.make_inputs(selection, key), select_cases.options(selection)),
        "pool_keys": ({"keys": keys}, {"stride": 4}),
        "append_pooled_keys": (
            {
                "pooled": jnp.zeros((2, batch, heads, length // 4 - 1, dim)),
                "sums": jnp.zeros((2, batch, heads, 2, dim)),
                "new": keys,
                "start": jnp.zeros(batch, jnp.int32),
                "count": jnp.arange(length - batch, length, dtype=jnp.int32),
                "layer": jnp.int32(1),
            },
            {"stride": 4},
        ),
        "append_token": (append_cases.make_inputs(token, key), append_cases.options(token)),
        "append_and_select": (step_cases.make_inputs(step, key), step_cases.options(step)),
        "rms_norm": (norm_cases.make_inputs(norm, key), norm_cases.options(norm)),
        "decode_attention": (decoding, {}),
        "update_and_attend": (decode_cases.arguments(offloaded), {}),
        "rebuilt_attention": (rebuilt_cases.make_inputs(rebuilt_cases.Case((30, 4), (50, 9), 7, 70), key), {}),
        "resolve_slots": (slot_cases.make_inputs(slot_cases.SMALL["some_move"], key), {}),
        "fetch_blocks": (moves, {}),
        "write_back_blocks": (
            {name: moves[name] for name in ("host", "pool", "page_table")}
            | {name: every(moves[name]) for name in ("block_ids", "slots")},
            {},
        ),
    }  # fmt: skip


def check_op(op: str) -> dict[str, Any]:
    arrays, static = calls()[op]
    arrays = {name: x for name, x in arrays.items() if x is not None}
    missing = dict.fromkeys(name for name in ("bias", "first_block") if name in AXES[op][0])
    call = lambda arrays: getattr(pallas_kernels, op)(**(missing | arrays), **static, implementation="xla")
    mesh = mesh_of({"data": 2, "tensor": 2})
    here, there = call, sharded(call, op, arrays, mesh)
    found = {"values": _difference(jax.jit(there)(placed(op, arrays, mesh)), jax.jit(here)(arrays))}
    if op in LEARNED:
        learned = {name: arrays[name] for name in LEARNED[op]}

        def loss(call: Callable[..., Any], learned: dict[str, Any]) -> Any:
            weigh = lambda x: (jnp.where(jnp.isfinite(x), x, 0) * jnp.sin(jnp.arange(x.size)).reshape(x.shape)).sum()
            return sum(weigh(x) for x in jax.tree.leaves(call(arrays | learned)))

        grads = [jax.jit(jax.grad(functools.partial(loss, call)))(learned) for call in (there, here)]
        found |= {"gradients": _difference(*grads)}
    return found


def _difference(ours: Any, theirs: Any) -> float:
    """The largest, as a share of the largest number; NaN and infinities must be the same."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)

    def one(a: Any, b: Any) -> float:
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.asarray(jax.device_put(x, jax.memory.Space.Device), np.float64) for x in (a, b))
        seen = np.isfinite(b)
        np.testing.assert_array_equal(a[~seen], b[~seen])
        return float(np.abs(a[seen] - b[seen]).max(initial=0) / max(np.abs(b[seen]).max(initial=0), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, ours, theirs)))


GROUPS = {"ops": ({op: op for op in AXES}, check_op)}

if __name__ == "__main__":
    report(GROUPS)
