"""A run in progress: steps, log, progress, evaluation, checkpoints, and what is not finite."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nosa_jax import processes
from nosa_jax._paths import replacing
from nosa_jax.convert import num_parameters
from nosa_jax.environment import environment
from nosa_jax.model import NosaLM
from nosa_jax.train._progress import Progress, describe
from nosa_jax.train.checkpoint import Checkpoints
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import Batch, Source, heldout_bytes_per_token
from nosa_jax.train.evaluation import Evaluation, evaluate_batches
from nosa_jax.train.feed import Feed
from nosa_jax.train.flops import mfu, peak_flops
from nosa_jax.train.folder import NOT_FINITE
from nosa_jax.train.log import JsonLines, Record, as_json
from nosa_jax.train.loss import bits_per_byte
from nosa_jax.train.profile import Profiler
from nosa_jax.train.step import TrainState, jit_train_step
from pallas_kernels.checks import bad_type, bad_value


class Run:
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
        self.peers = processes.Peers()
        self.ended = False  # by a signal to some process

    def record(self, kind: str, **fields: Any) -> Record:
        record = {"kind": kind, "step": self.step, **fields}
        with self.peers.holding():  # the others write nothing
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
        with self.peers.holding():
            self.logged = self.log.read()
        if self.step >= self.config.steps:
            self.say(f"All {self.config.steps} steps were done before, and there are none to take.")

    def advance(self, stop: threading.Event) -> None:
        """Steps until the end of the run or until `stop` is set in any process.

        Several processes ask each other while they make a step, which the devices do not wait for, and end after it.
        """
        config = self.config
        begin, since = time.perf_counter(), self.step
        batch: Batch | None = None
        while self.step < config.steps and not self._stopped(stop):
            # A process that cannot read takes part with what it read before. All hear of it below, before anything
            # comes of this step.
            with processes.failing_together("reading") if batch is None else self.peers.holding():
                batch = next(self.feed)
            with self.peers.holding():
                self.profiler.before(self.step + 1, self.metrics)
            self.peers.ask(stop.is_set())
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
            self.ended = self.peers.answer()
            self.before = (self.metrics, batch)
            self.step += 1
            with self.peers.holding():
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
        """Whether to end before the next step; all processes come to the same answer, which `ended` keeps."""
        if jax.process_count() == 1:  # several have told each other during the step before
            self.ended = stop.is_set()
        return self.ended

    def say(self, text: str) -> None:
        """Tells the user a line."""
        with self.peers.holding():
            self.bar.say(text)

    def finish(self) -> None:
        """Saves and, unless the user is waiting for the prompt, evaluates."""
        saved = self.save()
        if self.checkpoints is not None:
            with processes.failing_together("writing the last checkpoint"):
                self.checkpoints.wait()
        if self.ended and self.step < self.config.steps:
            goes_on = f"saved {saved}; resume=True (--resume) continues"
            where = "nothing was saved (no directory)" if saved is None else goes_on
            self.say(f"Interrupted after step {self.step}: {where}.")
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
        # Orbax raises here, in one process alone, what went wrong with the files of the checkpoint before.
        with processes.failing_together("writing the checkpoint before"):
            self.checkpoints.wait()
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
        path = self.checkpoints.directory.parent / f"{NOT_FINITE}{self.step}-{jax.process_index()}.npz"
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
        documents, share = self.feed.take_documents()
        rate = (self.step - since) * self.config.batch_size * self.config.length * share / seconds
        values["bits_per_byte"] = bits_per_byte(values["loss"], self.source.bytes_per_token)
        device, devices = jax.devices()[0].device_kind, self.state.step.sharding.num_devices
        used = mfu(rate, self.config.model, documents or 1, peak=peak_flops(device), devices=devices)
        self.history.append(self.record("train", **values, tokens_per_second=rate, mfu=used, seconds=seconds))
        with self.peers.holding():
            self.bar.note(describe(self.history[-1]))
        self._check_before()

    def _evaluate(self) -> None:
        config, begin = self.config, time.perf_counter()
        result: Evaluation | None = evaluate_batches(
            self.state.model,
            self.feed.heldout(config.eval_batches),
            bytes_per_token=heldout_bytes_per_token(self.source),
            compute_dtype=self.dtype,
            selection=config.eval_selection,
        )
        own: dict[str, float] = {}
        with self.peers.holding():
            if self.evaluation is not None:
                own = _own_numbers(self.evaluation(self.state.model))
        if result is None and not own:
            return
        seconds = time.perf_counter() - begin
        fields = {**({} if result is None else dataclasses.asdict(result)), **own}
        record = {"kind": "eval", "step": self.step, **fields}
        logged = as_json(record)
        if any(logged.items() <= old.items() for old in self.logged if old["kind"] == "eval"):
            self.evaluations.append({**record, "seconds": seconds})  # a finished run, resumed
        else:
            self.evaluations.append(self.record("eval", **fields, seconds=seconds))
        if result is not None:
            bits = f"{result.bits_per_byte:.4f} bits per byte"
            self.say(f"step {self.step}: held-out {result.loss:.4f} nats, {bits}")


def _own_numbers(found: Any) -> dict[str, float]:
    """What `evaluation` returned, as numbers of Python. Raises TypeError or ValueError for anything else."""
    taken = {"kind", "step", "seconds", *(field.name for field in dataclasses.fields(Evaluation))}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise bad_type("evaluation", "must return a dict of numbers by name", f"{found!r:.60}", "Name each number.")
    if taken & found.keys():
        raise bad_value("evaluation", "must name its numbers otherwise", sorted(taken & found.keys()), "Rename them.")
    return {name: float(value) for name, value in found.items()}


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
