"""Steps of training on eight devices against one: gradients, loss curves, and what the devices tell each other.

A program, see `eight_devices`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from eight_devices import mesh_of, relative_errors, report
from support import SMALL, lively_model, random_tokens

import nosa_jax
from nosa_jax import ModelConfig, parallel, train
from nosa_jax.train.step import token_loss

ROWS, LENGTH = 8, 256  # 16 blocks, of which SMALL selects 8
OPTIMIZER = train.OptimizerConfig(learning_rate=3e-3, clip_norm=1e6)

# No two sizes are alike, so that a shape tells what it is of.
CONFIG = ModelConfig(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
    attention=SMALL,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of training on a mesh.

    axes: sizes of the mesh.
    explicit: its axes are Explicit.
    options: of `train_step`.
    config: what differs from CONFIG.
    batch: "windows", "packed" (documents and padding) or "masked".
    way: "step", or "grad" for `jax.grad` of `token_loss`.
    """

    axes: dict[str, int]
    variant: str = "nosa"
    explicit: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: str = "windows"
    way: str = "step"


ALL = {"data": 2, "tensor": 2, "context": 2}
REST = {"fsdp": 2, "tensor": 2, "context": 2}
UNTIED = {"tie_embeddings": False}

FEW = {"fsdp": Step({"fsdp": 8}), "tensor context": Step({"tensor": 2, "context": 2})}
AXES = {
    "data": Step({"data": 8}),
    **{f"data {variant}": Step({"data": 8}, variant) for variant in ("full", "infllmv2", "dma")},
    "fsdp": Step({"fsdp": 8}),
    "tensor": Step({"tensor": 2}),
    "tensor untied": Step({"tensor": 2}, config=UNTIED),
    "context": Step({"context": 2}),
}
PAIRS = {
    "context of 4": Step({"context": 4}),
    "data fsdp": Step({"data": 2, "fsdp": 4}),
    "data tensor": Step({"data": 4, "tensor": 2}),
    "data context": Step({"data": 2, "context": 4}),
    "fsdp tensor": Step({"fsdp": 4, "tensor": 2}),
    "fsdp context": Step({"fsdp": 4, "context": 2}),
    "all": Step(ALL),
    "all but data": Step(REST),
    "gradients alone": Step(ALL, way="grad"),
}
EXPLICIT = {
    "data": Step({"data": 8}, explicit=True),
    "fsdp": Step({"fsdp": 8}, explicit=True),
    "tensor": Step({"tensor": 2}, explicit=True),
    "context": Step({"context": 4}, explicit=True),
    "all": Step(ALL, explicit=True),
    "all but data": Step(REST, explicit=True),
    "gradients alone": Step(ALL, explicit=True, way="grad"),
}
VARIANTS = {
    **{f"all {variant}": Step(ALL, variant) for variant in ("full", "infllmv2", "dma")},
    **{f"all but data {variant}": Step(REST, variant) for variant in ("full", "infllmv2", "dma")},
    "explicit full": Step(REST, "full", explicit=True),
}
BATCHES = {
    "packed": Step(ALL, batch="packed"),
    "packed full": Step({"fsdp": 4, "context": 2}, "full", batch="packed"),
    "packed explicit": Step(REST, batch="packed", explicit=True),
    "masked": Step({"data": 4, "context": 2}, batch="masked"),
    "accumulate": Step({"data": 2, "fsdp": 2, "context": 2}, batch="masked", options={"accumulate": 2}),
    "accumulate, explicit": Step({"data": 4}, batch="masked", options={"accumulate": 2}, explicit=True),
    "accumulate, one row a device": Step({"data": 8}, batch="masked", options={"accumulate": 2}),
}
OPTIONS = {
    "remat": Step(REST, options={"remat": True}),
    "remat explicit": Step({"fsdp": 4}, options={"remat": True}, explicit=True),
    "offload": Step({"fsdp": 4, "tensor": 2}, options={"remat": "offload"}),
    "loss_chunk": Step({"data": 2, "fsdp": 2, "context": 2}, options={"loss_chunk": 50, "z_loss": 1e-3}),
    "loss_chunk untied": Step({"data": 2, "tensor": 2}, options={"loss_chunk": 100}, config=UNTIED),
    "trainable": Step(ALL, options={"trainable": "importance"}),
    "untied": Step(REST, config=UNTIED),
    "biases and norms": Step(REST, config={"qkv_bias": True, "qk_norm": True, "output_bias": True}),
    "watch": Step({"fsdp": 4, "tensor": 2}, options={"watch": True}),
}


def made_model(variant: str, **config: Any) -> nosa_jax.NosaLM:
    """Importance and, where there are any, biases and the weights of norms are not what they begin as."""
    known = lively_model(dataclasses.replace(CONFIG.with_attention(variant=variant), **config))
    model = nosa_jax.with_attention(known, variant=variant)  # a copy, as others have that one, too
    draw = np.random.default_rng(3)
    for name in ("qkv_bias", "query_norm", "key_norm", "output_bias"):
        leaf = getattr(model.layers.attention, name)
        if leaf is not None:
            leaf[...] = leaf[...] + 0.3 * draw.standard_normal(leaf.shape).astype(np.float32)
    return model


def made_batch(kind: str) -> Any:
    windows = random_tokens(ROWS, LENGTH + 1, vocab=CONFIG.vocab_size)
    if kind == "windows":
        return windows
    tokens, targets = windows[:, :-1], windows[:, 1:]
    draw = np.random.default_rng(1)
    if kind == "masked":  # unevenly, so that parts of the batch and devices have counts of their own
        return train.Batch(tokens, targets, draw.random(tokens.shape) < np.linspace(0.1, 0.9, ROWS)[:, None])
    assert kind == "packed"
    segments = np.full(tokens.shape, -1, np.int32)
    for row in segments:
        start = 0
        for document in range(3):
            end = min(start + int(draw.integers(20, 120)), LENGTH)
            row[start:end] = document
            start = -(-end // SMALL.block_size) * SMALL.block_size
    mask = (segments >= 0) & (np.roll(segments, -1, 1) == segments)
    mask[:, -1] = False
    return train.Batch(tokens, targets, mask, segments)


_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str) -> list[dict[str, Any]]:
    """Of a compiled program, one entry per array: kind, dtype, shape on a device, and where.

    in_layers: inside a loop. backward: in the backward pass, what is made again there included.
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        source = re.search(r'op_name="([^"]*)"', line)
        name = source[1] if source else ""
        for dtype, sizes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", match["type"]):
            found.append(
                {
                    "kind": match["kind"],
                    "dtype": dtype,
                    "shape": [int(size) for size in sizes.split(",") if size],
                    "in_layers": "while" in name,
                    "backward": "transpose(" in name or "rematted" in name,
                    "source": name,
                }
            )
    return found


def run_step(case: Step, mesh: Any) -> tuple[dict[str, Any], Any, Any]:
    """Gradients by name (of a step, the first moments, a tenth of them), numbers, and the compiled program."""
    model, batch = made_model(case.variant, **case.config), made_batch(case.batch)
    if case.way == "grad":
        model = model if mesh is None else parallel.shard(model, mesh)
        function = jax.jit(jax.grad(lambda model, batch: token_loss(model, batch)[0]))
        program = function.lower(model, train.Batch(batch[:, :-1], batch[:, 1:])).compile()
        grads = program(model, train.Batch(batch[:, :-1], batch[:, 1:]))
        return grads, {}, (program, _same_places(grads, model))
    trainable = case.options.get("trainable", ("*",))
    state = train.init_state(model if mesh is None else parallel.shard(model, mesh), OPTIMIZER, trainable)
    places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    program = train.jit_train_step.lower(state, batch, optimizer=OPTIMIZER, steps=10, **case.options).compile()
    state, metrics = program(state, batch)
    return state.opt_state[1].mu, jax.tree.map(float, metrics), (program, _same_places(state, places))


def _same_places(ours: Any, theirs: Any) -> bool:
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    return all(jax.tree.leaves(jax.tree.map(same, ours, theirs)))


_ALONE: dict[str, tuple[Any, Any]] = {}


def alone(case: Step) -> tuple[Any, Any]:
    """Gradients and numbers of one device; computed once for all meshes."""
    same = dataclasses.replace(case, axes={}, explicit=False)
    if repr(same) not in _ALONE:
        _ALONE[repr(same)] = run_step(same, None)[:2]
    return _ALONE[repr(same)]


def check_step(case: Step) -> dict[str, Any]:
    true_grads, true_metrics = alone(case)
    grads, metrics, (program, same_places) = run_step(case, mesh_of(case.axes, case.explicit))
    return {
        "gradients": relative_errors(grads, true_grads),
        "metrics": relative_errors(metrics, true_metrics),
        "collectives": collectives(program.as_text()),
        "same_places": same_places,
    }


# ---- Loss curves ----


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of twenty steps on one batch. replay: with the block ids of the first forward pass in every step."""

    axes: dict[str, int]
    variant: str
    replay: bool
    explicit: bool = False


REPLAYED = {
    "full": Curve(ALL, "full", False),
    "full, explicit": Curve(REST, "full", False, explicit=True),
    "nosa": Curve(ALL, "nosa", True),
    "nosa, explicit": Curve(REST, "nosa", True, explicit=True),
    "infllmv2": Curve(REST, "infllmv2", True),
    "dma": Curve({"fsdp": 4, "context": 2}, "dma", True),
}
SELECTING = {
    "nosa": Curve(ALL, "nosa", False),
    "infllmv2": Curve(REST, "infllmv2", False),
    "dma": Curve({"fsdp": 4, "context": 2}, "dma", False),
}
STEPS, ORDERS = 20, 5


def losses(curve: Curve, mesh: Any, order: int = 0) -> list[float]:
    """order: which of some orders of the rows of the batch."""
    model, windows = made_model(curve.variant), made_batch("windows")
    loss = None
    if curve.replay:
        ids = np.asarray(nosa_jax.forward(model, windows[:, :-1], record=True).block_ids)

        def loss(model: Any, batch: train.Batch) -> Any:
            logits = nosa_jax.forward(model, batch.tokens, block_ids=ids).logits
            return train.next_token_loss(logits, batch.targets)[0]

    windows = windows if order == 0 else np.random.default_rng(order).permutation(windows)
    state = train.init_state(model if mesh is None else parallel.shard(model, mesh), OPTIMIZER)
    found = []
    for _ in range(STEPS):
        state, metrics = train.jit_train_step(state, windows, optimizer=OPTIMIZER, steps=STEPS, loss=loss)
        found.append(float(metrics["loss"]))
    return found


def check_curve(curve: Curve) -> dict[str, Any]:
    orders = range(ORDERS if curve in SELECTING.values() else 1)
    mesh = mesh_of(curve.axes, curve.explicit)
    return {"mesh": losses(curve, mesh), "alone": [losses(curve, None, order) for order in orders]}


GROUPS = {
    "few": (FEW, check_step),
    "axes": (AXES, check_step),
    "pairs": (PAIRS, check_step),
    "explicit": (EXPLICIT, check_step),
    "variants": (VARIANTS, check_step),
    "batches": (BATCHES, check_step),
    "options": (OPTIONS, check_step),
    "replayed": (REPLAYED, check_curve),
    "selecting": (SELECTING, check_curve),
}


if __name__ == "__main__":
    report(GROUPS)
