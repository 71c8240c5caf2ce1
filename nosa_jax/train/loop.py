"""The training loop: steps, progress, log, evaluation on held-out text, checkpoints, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nosa_jax import parallel, processes
from nosa_jax._extras import import_extra, missing_modules
from nosa_jax._paths import only_run, replacing, user_path
from nosa_jax.environment import environment
from nosa_jax.model import NosaLM, num_parameters
from nosa_jax.train._interrupt import interrupt_flag
from nosa_jax.train._progress import Progress, describe
from nosa_jax.train.checkpoint import Checkpoints
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import Batch, Corpus, Source
from nosa_jax.train.evaluation import Evaluation, evaluate_batches
from nosa_jax.train.feed import Feed, as_source
from nosa_jax.train.fields import model_config_from_dict
from nosa_jax.train.flops import mfu, peak_flops
from nosa_jax.train.log import LOG_NAME, JsonLines
from nosa_jax.train.loss import bits_per_byte
from nosa_jax.train.patterns import split
from nosa_jax.train.plots import PICTURE_NAME, plot_run
from nosa_jax.train.profile import Profiler
from nosa_jax.train.step import Loss, TrainState, init_state, jit_train_step
from nosa_jax.train.trackers import as_trackers
from pallas_kernels.checks import bad_type, bad_value, require_type

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    model: float32 NosaLM after the last step taken.
    step: how many steps the model has seen.
    history, evaluations: the log records of kind `train` and `eval` of this call.
    directory: where checkpoints and `log.jsonl` are, None when nothing was saved.
    interrupted: whether Ctrl-C or another signal asked the run to end, in its last step too.
    """

    model: Any
    step: int
    history: list[Record]
    evaluations: list[Record]
    directory: Path | None
    interrupted: bool


def train(
    config: TrainConfig,
    source: Source | Corpus,
    directory: str | os.PathLike[str] | None = None,
    *,
    model: NosaLM | None = None,
    mesh: Mesh | None = None,
    optimizer: Any = None,
    loss: Loss | None = None,
    evaluation: Callable[[NosaLM], dict[str, float]] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_record: Callable[[Record], None] | None = None,
    trackers: Any = None,
) -> TrainResult:
    """Trains on what `source` holds, evaluates on what it holds out.

    config: the run: model, batches, optimizer, what is logged, evaluated and kept.
    source: of batches; `train.text`, `jsonl`, `tokens`, `chat` and `mixture` make some. A Corpus is read in windows of
        `config.length`.
    directory: gets `log.jsonl` and `checkpoints/`; None saves nothing. The same for all processes.
    model: to start from (copied), e.g. for continued pretraining; None draws weights with `config.seed`.
        Its configuration must be `config.model`.
    mesh: devices that share the work, see `nosa_jax.parallel.make_mesh`; None for those that `model` lies on.
    optimizer: an optax transformation instead of `config.optimizer`.
    loss: what is minimised instead of the next-token loss; see `train_step`.
    evaluation: numbers of your own, made of the model whenever it is evaluated; they go into the record.
    resume: continue from the newest checkpoint in `directory` that is whole (from the start if there is none at all)
        on exactly the batches that would have come. The model's configuration, the seed, the batches and the text must
        be as they were, and so must what trains and how moments are kept; the mesh, the number of processes and all
        else may change.
    progress: whether a bar is shown on standard error.
    on_record: called with every log record.
    trackers: what else is told of the run: "tensorboard", "wandb", a Tracker, or several of them; see `as_trackers`.

    A record of kind `train` holds step, loss (nats), bits_per_byte, learning_rate, grad_norm, norms by group, `skipped`
    (steps so far that were not finite and changed nothing), and tokens_per_second and mfu (see `train.mfu`; None for an
    unknown card) over the `seconds` since the record before (the first one includes compiling). One of kind `eval`
    holds what `Evaluation` does, and seconds; one of kind `start` tells how the run was made. At the end all that
    becomes a picture in `directory`, training.png, where matplotlib is installed.

    Ctrl-C, SIGTERM and SIGHUP let the current step end, save, and return what there is; a second Ctrl-C stops at once.
    Raises ValueError for text shorter than a window or out of the vocabulary, for a directory that another run uses
    or that already holds checkpoints without `resume`, for a checkpoint of another run, and for a mesh that does not
    divide what it cuts; FloatingPointError after `config.max_skipped` steps in a row whose loss or gradient is not
    finite.
    """
    import_extra("tqdm")
    source = as_source(config, source)
    root = None if directory is None else user_path("directory", directory).resolve()
    if mesh is not None:
        require_type("mesh", mesh, Mesh, "Make one with nosa_jax.parallel.make_mesh.")
    elif model is not None:
        mesh = parallel.concrete_mesh(model)
    if model is not None and model.config != config.model:
        raise bad_value(
            "model",
            "must be of TrainConfig.model",
            model.config,
            "Change the variant with nosa_jax.with_attention.",
        )
    _check_processes(mesh, source)
    told = as_trackers(trackers)  # made everywhere, so that what cannot be made ends all processes
    if not processes.is_writer():
        told = as_trackers(None)
    if config.profile_steps is not None and (root is None or config.profile_steps[0] > config.steps):
        rule = f"must begin within the {config.steps} steps of a run that has a directory"
        raise bad_value("TrainConfig.profile_steps", rule, config.profile_steps, "Pass a directory, or earlier steps.")
    feed = Feed(source, config, mesh)
    state, origin = _first_state(config, model, mesh, optimizer)
    del model

    with contextlib.ExitStack() as stack:
        checkpoints = None
        if root is not None:
            with processes.failing_together("opening the directory"):
                if processes.is_writer():
                    stack.enter_context(only_run("directory", root))
            checkpoints = stack.enter_context(
                Checkpoints(
                    root / "checkpoints",
                    keep=config.keep_checkpoints,
                    keep_every=config.keep_every,
                    clean=True,
                    background=True,
                )
            )
            if checkpoints.latest_step() is not None:
                if not resume:
                    raise bad_value(
                        "directory",
                        "must not hold checkpoints yet",
                        f"step {checkpoints.latest_step()} in {checkpoints.directory}",
                        "Pass resume=True to continue it, or take another directory.",
                    )
                state = checkpoints.restore_newest(state, partial(_resume_data, config, source, feed))
        writes = processes.is_writer()
        log = stack.enter_context(JsonLines(root / LOG_NAME if root is not None and writes else None))
        stack.enter_context(told)
        traced = config.profile_steps if root is not None and writes else None
        profiler = stack.enter_context(Profiler((root or Path()) / "profile", traced))
        bar = stack.enter_context(Progress(config.steps, int(state.step), shown=progress and writes))
        stop = stack.enter_context(interrupt_flag())
        tell = [told.record] if on_record is None or not writes else [told.record, on_record]
        options = {"optimizer": optimizer or config.optimizer, "loss": loss}
        run = _Run(config, source, state, feed, checkpoints, log, bar, tell, profiler, options, evaluation)
        run.start(root)
        run.advance(stop)
        run.finish()
        if root is not None and writes:
            _draw(root)
        run.state.model.origin = origin  # the compiled step may be that of a run with another
        interrupted = processes.any_of(stop.is_set())
        return TrainResult(run.state.model, run.step, run.history, run.evaluations, root, interrupted)


class _Run:
    """The mutable part of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        state: TrainState,
        feed: Feed,
        checkpoints: Checkpoints | None,
        log: JsonLines,
        bar: Progress,
        tell: Sequence[Callable[[Record], None]],
        profiler: Profiler,
        options: dict[str, Any],
        evaluation: Callable[[NosaLM], dict[str, float]] | None,
    ) -> None:
        self.config, self.source, self.state, self.feed = config, source, state, feed
        self.checkpoints, self.log, self.bar, self.tell = checkpoints, log, bar, tell
        self.profiler, self.options, self.evaluation = profiler, options, evaluation
        self.dtype = config.resolved_dtype()
        self.step = int(state.step)
        self.metrics: dict[str, Any] = {}
        self.before: tuple[dict[str, Any], Batch] | None = None  # the step before the newest, and what it read
        self.history: list[Record] = []
        self.evaluations: list[Record] = []
        self.logged: list[Record] = []  # by an earlier part of this run
        self.ended = False  # by a signal to some process

    def record(self, kind: str, **fields: Any) -> Record:
        record = {"kind": kind, "step": self.step, **fields}
        self.log.write(record)
        for tell in self.tell:
            tell(record)
        return record

    def start(self, root: Path | None) -> None:
        sizes = {name: getattr(self.source, name, None) for name in ("train_tokens", "heldout_tokens")}
        self.record(
            "start",
            seed=self.config.seed,
            config=dataclasses.asdict(self.config),
            compute_dtype=self.dtype,
            parameters=num_parameters(self.state.model),
            corpus={**sizes, "fingerprint": self.source.fingerprint()},
            directory=None if root is None else str(root),
            processes=jax.process_count(),
            **environment(),
        )
        self.logged = self.log.read()

    def advance(self, stop: threading.Event) -> None:
        """Steps until the end of the run or until `stop` is set in any process."""
        config = self.config
        begin, since = time.perf_counter(), self.step
        while self.step < config.steps and not self._stopped(stop):
            batch = next(self.feed)
            self.profiler.before(self.step + 1, self.metrics)
            self.state, self.metrics = jit_train_step(
                self.state,
                batch,
                steps=config.steps,
                compute_dtype=self.dtype,
                accumulate=config.accumulate,
                remat=config.remat,
                trainable=config.trainable,
                loss_chunk=config.loss_chunk,
                z_loss=config.z_loss,
                watch=True,
                **self.options,
            )
            # Looking at a step waits for it. The one before is done soon, while the device has this one to do.
            self._check_before()
            self.before = (self.metrics, batch)
            self.step += 1
            self.profiler.after(self.step, self.metrics)
            self.bar.advance()
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last or not self.history:
                self._log_step(begin, since)
                begin, since = time.perf_counter(), self.step
            if _due(self.step, config.eval_every) and not last:
                self._evaluate()
                begin, since = time.perf_counter(), self.step
            if _due(self.step, config.checkpoint_every) and not last:
                self.save()
                begin, since = time.perf_counter(), self.step

    def _stopped(self, stop: threading.Event) -> bool:
        """Whether to end here; all processes come to the same answer at the same step, which `ended` keeps."""
        # A signal may come while they vote: then the next vote tells the others.
        self.ended = processes.any_of(stop.is_set())
        return self.ended

    def finish(self) -> None:
        """Saves and, unless the user is waiting for the prompt, evaluates."""
        saved = self.save()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        if self.ended and self.step < self.config.steps:
            where = "nothing was saved (no directory)" if saved is None else f"saved {saved}; resume=True continues"
            self.bar.say(f"Interrupted after step {self.step}: {where}.")
        else:
            self._evaluate()

    def save(self) -> Path | None:
        """Writes a checkpoint; returns its folder, None without a directory."""
        self._check_before()
        if self.checkpoints is None:
            return None
        meta = {
            "config": dataclasses.asdict(self.config),
            "corpus": self.source.fingerprint(),
            "data": self.feed.get_state(),
        }
        return self.checkpoints.save(self.state, meta)

    def _check_before(self) -> None:
        """Raises FloatingPointError where too many steps in a row were skipped, and saves what the last one read."""
        if self.before is None:
            return
        metrics, batch = self.before
        self.before = None
        skipped = int(processes.to_host(metrics["skipped_in_a_row"]))
        if not skipped:
            return
        values = _numbers(metrics)
        hopeless = not all(math.isfinite(value) for name, value in values.items() if name.startswith("param_norm"))
        if skipped < self.config.max_skipped and not hopeless:
            return
        name = next((name for name in ("loss", "grad_norm") if not math.isfinite(values[name])), "loss")
        rate = f" (now {values['learning_rate']:.3g})" if "learning_rate" in values else ""
        raise FloatingPointError(
            f"{name}: must stay finite, got {values[name]} in step {self.step}. Lower the learning rate{rate} or warm "
            f"up longer; earlier checkpoints are kept{self._keep(batch)}."
        )

    def _keep(self, batch: Batch) -> str:
        """Writes this process's part of a batch into the run's folder, for those who look for the cause."""
        if self.checkpoints is None:
            return ""
        path = self.checkpoints.directory.parent / f"not_finite-{self.step}-{jax.process_index()}.npz"
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        held: Any = {name: _held(array) for name, array in arrays.items() if array is not None}
        try:
            with replacing(path) as file:
                np.savez(file, **held)
        except OSError as error:  # the loss is what the user must hear of
            return f"; what the step read could not be written ({error})"
        return f", and what the step read is in {path}"

    def _log_step(self, begin: float, since: int) -> None:
        values = _numbers(self.metrics)
        seconds = time.perf_counter() - begin
        tokens = (self.step - since) * self.config.batch_size * self.config.length
        rate = tokens / seconds
        values["bits_per_byte"] = bits_per_byte(values["loss"], self.source.bytes_per_token)
        device, devices = jax.devices()[0].device_kind, self.state.step.sharding.num_devices
        share = mfu(rate, self.config.model, self.config.length, peak=peak_flops(device), devices=devices)
        self.history.append(self.record("train", **values, tokens_per_second=rate, mfu=share, seconds=seconds))
        self.bar.note(describe(self.history[-1]))
        self._check_before()

    def _evaluate(self) -> None:
        config, begin = self.config, time.perf_counter()
        result: Evaluation | None = evaluate_batches(
            self.state.model,
            self.feed.heldout(config.eval_batches),
            bytes_per_token=self.source.bytes_per_token,
            compute_dtype=self.dtype,
            selection=config.eval_selection,
        )
        own = {} if self.evaluation is None else _own_numbers(self.evaluation(self.state.model))
        if result is None and not own:
            return
        seconds = time.perf_counter() - begin
        fields = {**({} if result is None else dataclasses.asdict(result)), **own}
        record = {"kind": "eval", "step": self.step, **fields}
        if any(record.items() <= old.items() for old in self.logged if old["kind"] == "eval"):
            self.evaluations.append({**record, "seconds": seconds})  # a finished run, resumed
        else:
            self.evaluations.append(self.record("eval", **fields, seconds=seconds))
        if result is not None:
            bits = f"{result.bits_per_byte:.4f} bits per byte"
            self.bar.say(f"step {self.step}: held-out {result.loss:.4f} nats, {bits}")


def _own_numbers(found: Any) -> dict[str, float]:
    """What `evaluation` returned, as numbers of Python. Raises TypeError or ValueError for anything else."""
    taken = {"kind", "step", "seconds", *(field.name for field in dataclasses.fields(Evaluation))}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise bad_type("evaluation", "must return a dict of numbers by name", f"{found!r:.60}", "Name each number.")
    if taken & found.keys():
        raise bad_value("evaluation", "must name its numbers otherwise", sorted(taken & found.keys()), "Rename them.")
    return {name: float(value) for name, value in found.items()}


def _draw(root: Path) -> None:
    """The picture of a run, where it can be drawn: it must not cost a run that is done."""
    if missing_modules("plots"):
        return
    try:
        plot_run(root, root / PICTURE_NAME)
    except Exception as error:
        warnings.warn(f"no picture of {root}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in processes.to_host(metrics).items()}


def _held(array: Any) -> np.ndarray:
    """A batch's array, 0 where its rows or tokens are on devices of other processes."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    whole = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_processes(mesh: Mesh | None, source: Source) -> None:
    """Raises ValueError where some process would have no part in the run, or all of them the same, or another text."""
    if jax.process_count() == 1:
        return
    taking_part = set() if mesh is None else {device.process_index for device in mesh.devices.flat}
    if len(taking_part) < jax.process_count():
        rule = f"must have devices of all {jax.process_count()} processes"
        got = f"those of {sorted(taking_part)}" if taking_part else None
        raise bad_value("mesh", rule, got, "Pass parallel.make_mesh(data=-1), for example.")
    _require_one_text(source)


def _require_one_text(source: Source) -> None:
    """Raises ValueError, in all processes, where they would read different texts."""
    if processes.differs(zlib.crc32(source.fingerprint().encode())):
        rule = "must be the same in all processes"
        raise bad_value("source", rule, f"{source.fingerprint()} here", "Give all of them the same files.")


def _first_state(
    config: TrainConfig, model: NosaLM | None, mesh: Mesh | None, optimizer: Any
) -> tuple[TrainState, Any]:
    """The state before the first step, on its devices, and where the model came from."""
    make = lambda: NosaLM(config.model, rngs=nnx.Rngs(config.seed))
    split(jax.eval_shape(make), config.trainable, argument="TrainConfig.trainable")  # refuses what matches nothing
    if model is None:
        if mesh is None:
            model = make()
        else:  # drawn where it is kept: a large one fits no single device
            model = jax.jit(make, out_shardings=parallel.shardings(jax.eval_shape(make), mesh))()
    elif mesh is not None:
        model = parallel.shard(model, mesh)
    state = init_state(model, optimizer or config.optimizer, config.trainable)
    # Committed to its device as restored arrays are: otherwise the step would compile twice.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
    return state, model.origin


def _resume_data(config: TrainConfig, source: Source, feed: Feed, meta: dict[str, Any]) -> None:
    """Moves `feed` on to where the checkpoint of `meta` was; raises ValueError where that is one of another run."""
    saved = meta["config"]
    # As configurations, so that a field which is younger than the checkpoint has its default.
    saved = {**saved, "model": model_config_from_dict(saved["model"])}
    for name in ("model", "seed", "batch_size", "length"):
        now = getattr(config, name)
        if saved[name] != now:
            raise bad_value(
                f"TrainConfig.{name}",
                f"must be {saved[name]} as in the checkpoint to resume",
                now,
                "Use the same value, or take another directory.",
            )
    if meta["corpus"] != source.fingerprint():
        raise bad_value(
            "corpus",
            f"must be the text of the checkpoint ({meta['corpus']}) to resume",
            source.fingerprint(),
            "Pass the same files, held-out fraction and seed, or take another directory.",
        )
    try:
        feed.set_state(meta["data"])
    except ValueError as error:  # it is no position: damage, and not another run
        raise LookupError(str(error)) from error
