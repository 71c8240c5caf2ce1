"""Checkpoints with Orbax: the model, the optimizer, and a JSON item with all the rest.

A checkpoint is `<directory>/<step>/{model,optimizer,meta}`. Arrays are stored under readable names such as
`layers.attention.qkv`; `meta` holds the configuration, the position in the data and the layout of the weights. Orbax
writes into a temporary folder and renames it, so a checkpoint that exists is whole.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from nosa_jax import parallel, processes
from nosa_jax._paths import user_path
from nosa_jax._pytree import by_name
from nosa_jax.model import NosaLM
from nosa_jax.train.fields import model_config_from_dict
from nosa_jax.train.finite import Skipped
from nosa_jax.train.step import TrainState
from pallas_kernels.checks import bad_value, require_int
from pallas_kernels.device import current_device, default_device

# How weights are arranged: 1 had all queries before all keys before all values, 2 has them by KV head. Checkpoints from
# before the number was kept are of layout 1.
LAYOUT = 2

# How ValueErrors of TensorStore begin where the system failed (too many open files, no permission, a disk or a network
# that does not answer): the files may be whole, and readable the next time.
_FAULTS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "UNKNOWN", "ABORTED", "DEADLINE_EXCEEDED")

# What taking a meta apart raises where something is missing in it or of another kind.
_NOT_AS_SAVED = (LookupError, TypeError, AttributeError)


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read: something in it is cut, empty or missing."""


class Checkpoints:
    """The checkpoints below `directory`, of which the newest `keep` stay. A context manager; `close()` ends it.

    keep_every: those of steps that this divides stay, too; 0 for none.
    clean: remove what killed saves left behind. Only for the one run that writes there.
    background: `save` returns as soon as the arrays are copied, and the files are written meanwhile; `wait` and `close`
        wait for them. What is being written is no checkpoint yet.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_every: int = 0,
        clean: bool = False,
        background: bool = False,
    ) -> None:
        require_int("keep", keep, 1)
        self._background = background
        self.directory = user_path("directory", directory).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=require_int("keep_every", keep_every, 0) or None,
                enable_async_checkpointing=background,
                cleanup_tmp_directories=clean,
            ),
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

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong meanwhile."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> Path:
        """Writes `state` with JSON-able `meta` and returns the folder; one of the same step is kept as it is.

        The keys `layout` and `skipped` of `meta` are ours.
        """
        step = int(state.step)
        skipped = {name: int(getattr(state.skipped, name)) for name in ("total", "in_a_row")}
        if step != self.latest_step():
            if self._background and current_device().platform == "cpu":
                # Arrays of other devices are on the host when this returns; a CPU's are written from where they lie,
                # which the next step overwrites.
                state = _copy(state)
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(by_name(state.model)),
                    optimizer=ocp.args.StandardSave(by_name(state.opt_state)),
                    meta=ocp.args.JsonSave({**meta, "skipped": skipped, "layout": LAYOUT}),
                ),
            )
            if not saved:
                rule = f"must lie above the newest step saved in {self.directory}, {self.latest_step()}"
                raise bad_value("state.step", rule, step, "Save to another directory.")
        return self.directory / str(step)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What was saved as `meta` at `step` (None: the newest).

        Raises ValueError when there is no such checkpoint, when it is damaged, or when its weights are arranged
        otherwise than ours.
        """
        return {name: value for name, value in self._meta(self.existing(step)).items() if name != "skipped"}

    def _meta(self, step: int) -> dict[str, Any]:
        with self.reading(step):
            meta = {**self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]}
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
        Raises ValueError when there is no such checkpoint, when it is damaged, or when it has another layout of
        weights, or other names, shapes or dtypes.
        """
        step = self.existing(step)
        meta = self._meta(step)  # refuses another layout, at which names and shapes would only hint
        return self._restore(like, step, meta)

    def _restore(self, like: TrainState, step: int, meta: dict[str, Any]) -> TrainState:
        place = getattr(like.step, "sharding", None) or default_device()
        skipped = meta.get("skipped", {"total": 0, "in_a_row": 0})
        return TrainState(
            model=self._restore_item("model", like.model, step),
            opt_state=self._restore_item("optimizer", like.opt_state, step),
            step=jax.device_put(np.int32(step), place),
            skipped=Skipped(*(jax.device_put(np.int32(skipped[name]), place) for name in ("total", "in_a_row"))),
        )

    def load_model(self, step: int | None = None, mesh: Mesh | None = None) -> NosaLM:
        """The model saved at `step` (None: the newest), without the optimizer; errors as in `restore`.

        mesh: devices to share it; None puts it onto the default device. Whatever it was saved from may be neither.
        """
        step = self.existing(step)
        meta = self._meta(step)
        with self.reading(step, *_NOT_AS_SAVED):
            config = model_config_from_dict(meta["config"]["model"])
        like = jax.eval_shape(lambda: NosaLM(config, rngs=nnx.Rngs(0)))
        return self._restore_item("model", like if mesh is None else parallel.shard(like, mesh), step)

    def restore_newest(self, like: TrainState, resume: Callable[[dict[str, Any]], None]) -> TrainState:
        """The state of the newest checkpoint that is whole, to go on from there.

        resume: takes from the meta what the run needs, and raises ValueError for one that must not go on. A meta that
            it cannot take apart (LookupError, TypeError, AttributeError) is damaged, and an older one follows.
        Newer ones, which are damaged, are moved aside with a warning. Raises ValueError when none is whole.
        """
        damaged: list[tuple[int, DamagedCheckpointError]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            found: DamagedCheckpointError | None = None
            with processes.failing_together(f"reading {self.directory / str(step)}"):
                try:
                    meta = self._meta(step)
                    with self.reading(step, *_NOT_AS_SAVED):
                        resume(meta)
                    state = self._restore(like, step, meta)
                except DamagedCheckpointError as error:
                    found = error
            if processes.any_of(found is not None):  # all go on from the same step
                where = self.directory / str(step)
                damaged.append((step, found or DamagedCheckpointError(f"{where} is damaged for another process.")))
                continue
            for other, reason in damaged:
                aside = self._move_aside(other)
                warnings.warn(f"{reason} It is now {aside}, and the run goes on from step {step}.", stacklevel=2)
            return state
        raise damaged[0][1]

    def _move_aside(self, step: int) -> Path:
        folder, aside = self.directory / str(step), self.directory / f"damaged-{step}-{uuid.uuid4().hex[:8]}"
        with processes.writing("moving a damaged checkpoint") as writes:
            if writes:
                folder.rename(aside)
        self._manager.reload()
        return aside

    @contextlib.contextmanager
    def reading(self, step: int, *errors: type[Exception]) -> Iterator[None]:
        """Turns `errors`, or whatever Orbax raises for a checkpoint that it cannot read, into one error."""
        errors = errors or (Exception,)
        try:
            yield
        except errors as error:
            if _is_fault_of_the_system(error):
                raise
            older = [other for other in sorted(self._manager.all_steps()) if other < step]
            raise DamagedCheckpointError(
                f"directory: must hold whole checkpoints, got {self.directory / str(step)}, which is damaged "
                f"({type(error).__name__}: {' '.join(str(error).split()):.200}). "
                + (f"The one before it is of step {older[-1]}." if older else "There is none before it.")
            ) from error

    def existing(self, step: int | None = None) -> int:
        """`step`, or the newest one for None. Raises ValueError where it is not there."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise bad_value("directory", "must hold a checkpoint", f"none in {self.directory}", "Check the path.")
        if step is not None and step not in steps:
            raise bad_value("step", f"must be one of the steps saved, {steps}", step, "Pick one or pass None.")
        return steps[-1] if step is None else step

    def _restore_item(self, item: str, like: Any, step: int) -> Any:
        # The devices that it was saved from may not be here: what has no place yet goes to the default device.
        here = jax.sharding.SingleDeviceSharding(default_device())
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
            for name, leaf in by_name(like).items()
        }
        with self.reading(step):
            saved = dict(self._manager.item_metadata(step)[item])
        for name in sorted(wanted.keys() | saved.keys()):
            expected, found = _describe(wanted.get(name)), _describe(saved.get(name))
            if expected != found:
                raise bad_value(
                    f"{item}.{name}",
                    f"must be {expected}",
                    f"{found} in {self.directory / str(step)}",
                    "Use the configuration and the optimizer that it was trained with, or another directory.",
                )
        with self.reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)}))
            arrays = restored[item]
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in by_name(like)])


# A copy of its own for every array, on the same devices.
_copy = jax.jit(lambda state: jax.tree.map(jax.numpy.copy, state))


def load_model(directory: str | os.PathLike[str], step: int | None = None, mesh: Mesh | None = None) -> NosaLM:
    """The float32 model of a training run, from its newest checkpoint or that of `step`; on a mesh where one is given.

    Raises ValueError when `directory` holds no such checkpoint, or a damaged one.
    """
    folder = user_path("directory", directory)
    if not folder.is_dir():
        raise bad_value("directory", "must exist", folder, "Check the path.")
    with Checkpoints(folder) as checkpoints:
        return checkpoints.load_model(step, mesh)


def _is_fault_of_the_system(error: BaseException) -> bool:
    """Whether reading failed for want of memory, permissions or an answer of the disk: the files may be whole."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if isinstance(error, ValueError) and str(error).startswith(_FAULTS):
        return True
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or not isinstance(error, Exception):
        return True
    # Orbax raises a plain Exception from whatever ended the reading of an array.
    return error.__cause__ is not None and _is_fault_of_the_system(error.__cause__)


def _describe(array: Any) -> str:
    return "absent" if array is None else f"{jax.numpy.dtype(array.dtype).name}{list(array.shape)}"
