"""`forward` and decoding on meshes against one device. A program, see `eight_devices`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import mesh_of, report
from jax.sharding import NamedSharding, PartitionSpec
from parallel_steps import CONFIG, made_model
from support import random_tokens

import nosa_jax
from nosa_jax import CacheConfig, Sampling, baselines, parallel
from nosa_jax._pytree import by_name
from nosa_jax.cache.state import page_range, with_pages


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh.

    whole: every device has all weights, by `jax.device_put`; else they are cut, by `parallel.shard`.
    tokens: "numpy", "one device", or "rows", cut over the devices.
    rows, length: of the tokens. ragged: with lengths. packed: with segment ids. cache: of decoding.
    brief: of `forward` the logits of all tokens alone. limits: rows may grow to different lengths, and one is refilled.
    """

    axes: dict[str, int]
    variant: str = "nosa"
    explicit: bool = False
    whole: bool = False
    tokens: str = "numpy"
    rows: int = 8
    length: int = 176
    ragged: bool = False
    packed: bool = False
    brief: bool = False
    limits: bool = False
    cache: CacheConfig = CacheConfig(slots=9)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


SHADOWKV = CacheConfig(policy=baselines.ShadowKV(chunk=8, rank=16, budget=48, local_chunks=2, outlier_chunks=2))
ARKVALE = CacheConfig(policy=baselines.ArkVale(page=8, budget=10, page_topks=7, sink=1, window=3))
ALL = {"data": 2, "tensor": 2, "context": 2}
REST = {"fsdp": 2, "tensor": 2, "context": 2}
FORWARD = {
    "sharded": Case(REST),
    "explicit": Case(ALL, explicit=True, tokens="rows"),
    "whole": Case({"data": 4}, whole=True, tokens="one device"),
    "whole, explicit": Case({"data": 2, "context": 2}, whole=True, explicit=True, ragged=True),
    "packed": Case(ALL, packed=True, tokens="rows"),
    "ragged": Case({"context": 4}, ragged=True, tokens="rows"),
    "full": Case(REST, "full", ragged=True),
    "infllmv2": Case({"fsdp": 4, "tensor": 2}, "infllmv2", explicit=True),
    "dma, untied": Case(REST, "dma", config={"tie_embeddings": False}),
    "three rows": Case({"data": 4}, rows=3),
    "three rows, explicit": Case({"data": 2, "fsdp": 2}, rows=3, explicit=True),
    "odd length": Case({"data": 2, "context": 2}, length=145),
    "odd length, explicit": Case({"fsdp": 2, "context": 2}, length=146, explicit=True),
}
DECODING = {
    "sharded": Case(REST, ragged=True),
    "explicit": Case({"data": 2, "fsdp": 2}, explicit=True, tokens="rows"),
    "whole": Case({"data": 4}, whole=True, tokens="one device", ragged=True),
    "whole, explicit": Case({"data": 4}, whole=True, explicit=True),
    "on the device": Case({"data": 2, "context": 2}, "infllmv2", cache=CacheConfig(offload=False)),
    "full, explicit": Case({"fsdp": 4}, "full", explicit=True, cache=CacheConfig(offload=False)),
    "three rows": Case({"data": 4}, rows=3),
    "three rows, explicit": Case({"data": 4}, rows=3, explicit=True),
    "ArkVale": Case({"data": 2, "fsdp": 2}, "full", explicit=True, tokens="rows", ragged=True, cache=ARKVALE),
    "limits": Case({"data": 4}, whole=True, limits=True),
    "limits, explicit": Case({"data": 2, "fsdp": 2}, explicit=True, tokens="rows", ragged=True, limits=True),
}
GENERATION = {
    "sharded": Case({"data": 2, "fsdp": 2}, ragged=True),
    "explicit": Case({"data": 2, "fsdp": 2}, explicit=True, tokens="rows"),
    "whole": Case({"data": 4}, whole=True, tokens="one device"),
    "whole, explicit": Case({"data": 8}, whole=True, explicit=True, ragged=True),
    "ShadowKV": Case({"data": 2, "fsdp": 2}, "full", explicit=True, tokens="rows", ragged=True, cache=SHADOWKV),
}


def made(case: Case, mesh: Any) -> tuple[nosa_jax.NosaLM, Any, dict[str, Any]]:
    """The model, the tokens and what goes with them, on a mesh or on one device."""
    model = made_model(case.variant, **case.config)
    tokens = random_tokens(case.rows, case.length, seed=4, vocab=CONFIG.vocab_size)
    options: dict[str, Any] = {}
    if case.ragged:
        options["lengths"] = np.linspace(1, case.length, case.rows).astype(np.int32)
    if case.packed:
        options["segment_ids"] = np.repeat([[0] * 80 + [1] * (case.length - 90) + [-1] * 10], case.rows, axis=0)
    if mesh is None:
        return model, tokens, options
    whole = NamedSharding(mesh, PartitionSpec())
    model = jax.device_put(model, whole) if case.whole else parallel.shard(model, mesh)
    if case.tokens == "rows":
        rows = NamedSharding(mesh, parallel.fitting(mesh, tokens.shape, PartitionSpec(parallel.ROWS)))
        tokens, options = jax.device_put((tokens, options), rows)
    elif case.tokens == "one device":
        tokens, options = jax.tree.map(jnp.asarray, (tokens, options))
    return model, tokens, options


def forward_of(case: Case, mesh: Any) -> dict[str, Any]:
    model, tokens, options = made(case, mesh)
    whole = nosa_jax.forward(model, tokens, record=True, **options)
    found = {"logits": whole.logits}
    if whole.block_ids is not None:
        found |= {"block_ids": whole.block_ids}
    if not case.brief:
        none = nosa_jax.forward(model, tokens, logits="none", **options)
        assert none.logits is None
        last = nosa_jax.forward(model, tokens, logits="last", **options)
        found |= {"hidden": none.hidden, "last": last.logits}
    return found


def decoding_of(case: Case, mesh: Any) -> dict[str, Any]:
    model, tokens, options = made(case, mesh)
    next_tokens = np.asarray(tokens)[:, 5:13]
    options |= {"max_length": np.linspace(185, 256, case.rows).astype(int) if case.limits else 256, "cache": case.cache}
    state, first = nosa_jax.prefill(model, tokens, **options)
    parts: dict[str, Any] = {"chunk": 64} if case.cache.policy is None else {"working_set": 2**22}
    _, same = nosa_jax.prefill(model, tokens, **options, **parts)
    found = {"prefill": first, "in chunks": same}
    state, found["decode_step"] = nosa_jax.decode_step(model, state, next_tokens[:, 0])
    for n in range(1, 3):
        state, found[f"jit_decode_step {n}"] = nosa_jax.jit_decode_step(model, state, next_tokens[:, n])
    state, found["extend"] = nosa_jax.extend(model, state, next_tokens[:, 3:])
    state, found["after extend"] = nosa_jax.jit_decode_step(model, state, found["extend"].argmax(-1))
    if case.limits:
        count = np.where(np.arange(case.rows) == 5, 40, 0)
        state = with_pages(state, 5, page_range(state, 5)[-3:], 40)
        state, logits = nosa_jax.jit_extend(model, state, np.asarray(tokens)[:, :40], count)
        found["refilled"] = np.asarray(logits)[5:6]
    return found | {"lengths": state.lengths, "pool": state.pool, "state": state}


def generation_of(case: Case, mesh: Any) -> dict[str, Any]:
    model, tokens, options = made(case, mesh)
    given = {} if mesh is None else {"mesh": mesh}
    drawn = {"sampling": Sampling(temperature=1.0), "key": jax.random.key(3)}
    out = nosa_jax.generate(model, tokens, max_new_tokens=6, cache=case.cache, record=True, **drawn, **options, **given)
    return {"tokens": out.tokens, "logits": out.logits, "block_ids": out.block_ids, "fetched": out.fetched}


_ALONE: dict[str, dict[str, Any]] = {}


def compared(of_case: Any, case: Case) -> dict[str, Any]:
    """By what was made: of integers how many differ, else the largest difference; and of how many parts arrays are."""
    mesh = mesh_of(case.axes, case.explicit)
    same = dataclasses.replace(case, axes={}, explicit=False, whole=False, tokens="numpy")
    key = f"{of_case.__name__} {same}"
    if key not in _ALONE:
        _ALONE[key] = of_case(same, None)
    truth, found = dict(_ALONE[key]), of_case(case, mesh)
    parts = {}
    state = found.pop("state", None)
    if state is not None:
        truth.pop("state")
        parts = {name: _parts(leaf, 0 if leaf.ndim < 3 else 1) for name, leaf in by_name(state).items()}
    differences = {name: _difference(found[name], truth[name]) for name in truth}
    return {"differences": differences, "parts": parts, "devices": int(mesh.size)}


def _difference(ours: jax.Array, theirs: jax.Array) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if np.issubdtype(ours.dtype, np.integer):
        return float((ours != theirs).sum())
    return float(np.abs(ours - theirs).max())


def _parts(x: jax.Array, axis: int) -> int:
    """Into how many parts an axis is cut."""
    return x.shape[axis] // x.sharding.shard_shape(x.shape)[axis]


GROUPS = {
    "few": ({"all": Case(ALL, ragged=True, brief=True)}, lambda case: compared(forward_of, case)),
    "forward": (FORWARD, lambda case: compared(forward_of, case)),
    "decoding": (DECODING, lambda case: compared(decoding_of, case)),
    "generation": (GENERATION, lambda case: compared(generation_of, case)),
}

if __name__ == "__main__":
    report(GROUPS)
