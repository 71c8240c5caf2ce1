"""Where the records of a run go besides its log: TensorBoard, Weights & Biases, or whatever takes a record.

    from nosa_jax.train import as_trackers

    losses = []
    with as_trackers([lambda record: losses.append(record.get("loss"))]) as trackers:
        trackers.record({"kind": "train", "step": 1, "loss": 5.5})

A record is a dict that JSON can hold: its `kind`, the `step` that it was made after, and fields. The first one of a
run, of kind `start`, has the run's `config` and the folder that it writes to, `directory`, None without one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nosa_jax._extras import import_extra
from nosa_jax._paths import user_path
from nosa_jax.train.folder import TENSORBOARD_NAME
from nosa_jax.train.log import Record
from pallas_kernels.checks import bad_type, bad_value


@runtime_checkable
class Tracker(Protocol):
    """What is told of a run. One with a method `close` has it called at the end, of every run that it is told of; one
    with a method `check` before anything is done, with the folder of the run or None, to raise what is wrong."""

    def record(self, record: Record) -> None:
        """Takes one record, which it must not change."""
        ...


def scalars(record: Record) -> dict[str, float]:
    """The numbers in a record as `<kind>/<field>`, those inside of lists and dicts as `<kind>/<field>/<index or key>`.

    Truth values, texts and None are no numbers; `step` is the place of all others, not one of them.
    """
    fields = {name: value for name, value in record.items() if name not in ("kind", "step")}
    return dict(_numbers(record["kind"], fields))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{name}/{index}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


class TensorBoard:
    """Writes the numbers of every record as scalars for TensorBoard, and the configuration as text.

    directory: where its files go; None for `tensorboard/` in the folder of the run.

    A run that resumes hides what was written of later steps before. Raises ImportError without tensorboardX.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._make = import_extra("tensorboardX").SummaryWriter
        self._directory = None if directory is None else user_path("directory", directory)
        self._writer: Any = None

    def check(self, directory: Path | None) -> None:
        """Raises ValueError when there is no folder to write to."""
        if self._directory is None and directory is None:
            remedy = "Give the run a folder, or pass TensorBoard(directory=...)."
            raise bad_value("directory", "must be given for TensorBoard where the run has no folder", "None", remedy)

    def record(self, record: Record) -> None:
        """Raises ValueError when there is no folder to write to."""
        if record["kind"] == "start":
            self._start(record)
            return
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # records are rare, and a run may be killed

    def _start(self, record: Record) -> None:
        self.close()
        root = None if record.get("directory") is None else Path(record["directory"])
        self.check(root)
        directory = self._directory or root / TENSORBOARD_NAME  # type: ignore[operator]
        step = record["step"]
        self._writer = self._make(str(directory), purge_step=step + 1 if step else None)
        text = json.dumps(record.get("config", {}), indent=4)
        # Markdown, which shows lines that are indented by four spaces as they are.
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """Sends the numbers of every record to Weights & Biases, with the configuration of the run.

    project: what the run is listed under.
    options: further arguments of `wandb.init`, e.g. `mode="offline"`; to continue a run there when one is resumed here,
        `id="..."` and `resume="allow"`. `config` and `dir` are those of the run unless given.

    Raises ImportError without wandb.
    """

    def __init__(self, project: str = "nosa-jax", **options: Any) -> None:
        self._wandb = import_extra("wandb")
        self._options = {"project": project, **options}
        self._run: Any = None

    def record(self, record: Record) -> None:
        if record["kind"] == "start":
            self.close()
            own = {"config": record.get("config"), "dir": record.get("directory")}
            self._run = self._wandb.init(**{**own, **self._options})
        elif found := scalars(record):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


_BY_NAME: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """Several trackers as one. One that raises is dropped with a warning: watching a run must not end it.

    A context manager; `close()` ends them all. They may be told of another run then.
    """

    def __init__(self, trackers: Sequence[Tracker | Callable[[Record], None]]) -> None:
        self._trackers = list(trackers)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._trackers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._trackers)

    def check(self, directory: Path | None) -> None:
        """Raises what a tracker has against a run that writes to `directory`, None for nowhere."""
        for tracker in self._trackers:
            if callable(check := getattr(tracker, "check", None)):
                check(directory)

    def record(self, record: Record) -> None:
        """Tells every tracker that is left."""
        for tracker in list(self._trackers):
            take = tracker.record if isinstance(tracker, Tracker) else tracker
            self._attempt(tracker, partial(take, record))

    def close(self) -> None:
        """Closes what can be closed."""
        for tracker in list(self._trackers):
            self._attempt(tracker, getattr(tracker, "close", lambda: None))

    def _attempt(self, tracker: Any, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a full disk, a network that is gone: whatever it is, the run goes on
            self._trackers.remove(tracker)
            name = getattr(tracker, "__name__", type(tracker).__name__)
            text = f"the tracker {name} gets no more records: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def as_trackers(value: Any) -> Trackers:
    """`value` as Trackers: None, or one or a sequence of trackers, functions of a record, and words.

    Trackers come back as others of the same: one that is dropped is in those given still. The words are "tensorboard"
    and "wandb". Raises ValueError for another word, TypeError for anything else, and ImportError where the package of a
    word is not installed.
    """
    if isinstance(value, Trackers):
        return Trackers(list(value))
    one = isinstance(value, str | Tracker) or callable(value)
    return Trackers([_as_tracker(each) for each in ([] if value is None else [value] if one else _each(value))])


def _each(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise bad_type("trackers", "must be trackers", f"{value!r:.60}", 'Pass ["tensorboard"], for example.')
    return list(value)


def _as_tracker(value: Any) -> Any:
    if isinstance(value, str):
        if value not in _BY_NAME:
            remedy = "Pick one, or pass an object with a method record(record)."
            raise bad_value("trackers", f"must be among {sorted(_BY_NAME)}", repr(value), remedy)
        return _BY_NAME[value]()
    if not isinstance(value, type) and (isinstance(value, Tracker) or callable(value)):
        return value
    remedy = "Pass an object with a method record(record), or a function of a record."
    raise bad_type("trackers", "must be trackers, functions or words", f"{value!r:.60}", remedy)
