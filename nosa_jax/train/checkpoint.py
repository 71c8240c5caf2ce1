"""Checkpoints with Orbax: the model, the optimizer, and a JSON item with all the rest.

A checkpoint is `<directory>/<step>/{model,optimizer,meta}`. Arrays are stored under readable names such as
`layers.attention.qkv`; `meta` holds the configuration, the position in the data and the layout of the weights. Orbax
writes into a temporary folder and renames it, so a checkpoint that exists is whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from nosa_jax.config import AttentionConfig, ModelConfig, RopeConfig
from nosa_jax.model import NosaLM
from nosa_jax.train.step import TrainState
from pallas_kernels.checks import bad_value, require_int
from pallas_kernels.device import default_device

# How weights are arranged: 1 had all queries before all keys before all values, 2 has them by KV head. Checkpoints from
# before the number was kept are of layout 1.
LAYOUT = 2


class Checkpoints:
    """The checkpoints below `directory`, of which the newest `keep` stay. A context manager; `close()` ends it."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        require_int("keep", keep, 1)
        self.directory = Path(directory).expanduser().resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Saved before the call returns: the next step donates, that is, overwrites the state.
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> Path:
        """Writes `state` with JSON-able `meta` and returns the folder; one of the same step is kept as it is.

        The key `layout` of `meta` is ours.
        """
        step = int(state.step)
        if step != self.latest_step():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(_by_name(state.model)),
                    optimizer=ocp.args.StandardSave(_by_name(state.opt_state)),
                    meta=ocp.args.JsonSave({**meta, "layout": LAYOUT}),
                ),
            )
        return self.directory / str(step)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved as `meta` at `step` (None: the newest).

        Raises ValueError when there is no such checkpoint or when its weights are arranged otherwise than ours.
        """
        step = self._existing(step)
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        layout = meta.pop("layout", 1)
        if layout != LAYOUT:
            raise bad_value(
                "directory",
                f"must hold weights of layout {LAYOUT}",
                f"layout {layout} in {self.directory / str(step)}",
                "Save it as a Hugging Face folder with the code that wrote it (CHANGELOG.md names it), and load that.",
            )
        return meta

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state saved at `step` (None: the newest); `like` gives the structure, shapes and dtypes expected.

        `like` may hold arrays, whose sharding is then kept, or the results of `jax.eval_shape`.
        Raises ValueError when there is no such checkpoint, or when it has another layout of weights, or other names,
        shapes or dtypes.
        """
        step = self._existing(step)
        self.meta(step)  # refuses another layout, at which names and shapes would only hint
        place = getattr(like.step, "sharding", None) or default_device()
        return TrainState(
            model=self._restore_item("model", like.model, step),
            opt_state=self._restore_item("optimizer", like.opt_state, step),
            step=jax.device_put(jax.numpy.int32(step), place),
        )

    def restore_model(self, like: Any, step: int | None = None) -> Any:
        """As `restore`, for the model alone."""
        step = self._existing(step)
        self.meta(step)
        return self._restore_item("model", like, step)

    def _existing(self, step: int | None) -> int:
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise bad_value("directory", "must hold a checkpoint", f"none in {self.directory}", "Check the path.")
        if step is not None and step not in steps:
            raise bad_value("step", f"must be one of the steps saved, {steps}", step, "Pick one or pass None.")
        return steps[-1] if step is None else step

    def _restore_item(self, item: str, like: Any, step: int) -> Any:
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for name, leaf in _by_name(like).items()
        }
        saved = self._manager.item_metadata(step)[item]
        for name in sorted(wanted.keys() | saved.keys()):
            expected, found = _describe(wanted.get(name)), _describe(saved.get(name))
            if expected != found:
                raise bad_value(
                    f"{item}.{name}",
                    f"must be {expected}",
                    f"{found} in {self.directory / str(step)}",
                    "Use the configuration that the checkpoint was trained with, or another directory.",
                )
        arrays = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)}))[item]
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _by_name(like)])


def load_model(directory: str | os.PathLike[str], step: int | None = None) -> NosaLM:
    """The float32 model of a training run, from its newest checkpoint or that of `step`.

    Raises ValueError when `directory` holds no such checkpoint.
    """
    if not Path(directory).expanduser().is_dir():
        raise bad_value("directory", "must exist", str(directory), "Check the path.")
    with Checkpoints(directory) as checkpoints:
        config = model_config_from_dict(checkpoints.meta(step)["config"]["model"])
        return checkpoints.restore_model(jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0))), step)


def model_config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` after a trip through JSON, which turns tuples into lists."""
    rope: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields["rope"].items()
    }
    return ModelConfig(**{**fields, "rope": RopeConfig(**rope), "attention": AttentionConfig(**fields["attention"])})


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves_with_path(tree)
    # `.value` is where NNX keeps a parameter's array: no part of its name.
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _describe(array: Any) -> str:
    return "absent" if array is None else f"{jax.numpy.dtype(array.dtype).name}{list(array.shape)}"
