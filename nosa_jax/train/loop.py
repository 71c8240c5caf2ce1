"""The training loop: steps, progress, log, evaluation on held-out text, checkpoints, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from nosa_jax._extras import import_extra
from nosa_jax._paths import only_run, user_path
from nosa_jax.environment import environment
from nosa_jax.model import NosaLM, num_parameters
from nosa_jax.train._interrupt import interrupt_flag
from nosa_jax.train._progress import Progress
from nosa_jax.train.checkpoint import Checkpoints, model_config_from_dict
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import Corpus, train_batches
from nosa_jax.train.evaluation import Evaluation, evaluate
from nosa_jax.train.log import LOG_NAME, JsonLines
from nosa_jax.train.loss import bits_per_byte
from nosa_jax.train.step import TrainState, init_state, jit_train_step
from pallas_kernels.checks import bad_value

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
    corpus: Corpus,
    directory: str | os.PathLike[str] | None = None,
    *,
    model: NosaLM | None = None,
    resume: bool = False,
    progress: bool = True,
    on_record: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Trains on `corpus.train`, evaluates on `corpus.heldout`.

    config: the run: model, batches, optimizer, what is logged, evaluated and kept.
    corpus: the text, split.
    directory: gets `log.jsonl` and `checkpoints/`; None saves nothing.
    model: to start from (copied), e.g. for continued pretraining; None draws weights with `config.seed`.
        Its configuration must be `config.model`.
    resume: continue from the newest checkpoint in `directory` that is whole (from the start if there is none at all)
        on exactly the batches that would have come. Everything but the model's shape, the seed, the batches and the
        text may change.
    progress: whether a bar is shown on standard error.
    on_record: called with every log record, for trackers.

    A record of kind `train` holds step, loss (nats), bits_per_byte, learning_rate, grad_norm, and tokens_per_second
    over the `seconds` since the record before (the first one includes compiling); one of kind `eval` holds step, loss,
    bits_per_byte, tokens and seconds; one of kind `start` tells how the run was made.

    Ctrl-C, SIGTERM and SIGHUP let the current step end, save, and return what there is; a second Ctrl-C stops at once.
    Raises ValueError for text shorter than a window or out of the vocabulary, for a directory that another run uses
    or that already holds checkpoints without `resume`, and for a checkpoint of another run; FloatingPointError when the
    loss is not finite.
    """
    import_extra("tqdm")
    _check_corpus(config, corpus)
    root = None if directory is None else user_path("directory", directory).resolve()
    batches = train_batches(corpus.train, batch_size=config.batch_size, length=config.length, seed=config.seed)
    if model is None:
        model = NosaLM(config.model, rngs=nnx.Rngs(config.seed))
    elif model.config != config.model:
        raise bad_value(
            "model",
            "must be of TrainConfig.model",
            model.config,
            "Change the variant with nosa_jax.with_attention.",
        )
    # Committed to its device as restored arrays are: otherwise the step would compile twice.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), init_state(model, config.optimizer))
    origin = model.origin
    del model

    with contextlib.ExitStack() as stack:
        checkpoints = None
        if root is not None:
            stack.enter_context(only_run("directory", root))
            keep = config.keep_checkpoints
            checkpoints = stack.enter_context(Checkpoints(root / "checkpoints", keep=keep, clean=True))
            if checkpoints.latest_step() is not None:
                if not resume:
                    raise bad_value(
                        "directory",
                        "must not hold checkpoints yet",
                        f"step {checkpoints.latest_step()} in {checkpoints.directory}",
                        "Pass resume=True to continue it, or take another directory.",
                    )
                state = checkpoints.restore_newest(state, partial(_resume_data, config, corpus, batches))
        log = stack.enter_context(JsonLines(None if root is None else root / LOG_NAME))
        bar = stack.enter_context(Progress(config.steps, int(state.step), shown=progress))
        stop = stack.enter_context(interrupt_flag())
        run = _Run(config, corpus, state, batches, checkpoints, log, bar, on_record)
        run.start()
        run.advance(stop)
        run.finish(interrupted=stop.is_set())
        run.state.model.origin = origin  # the compiled step may be that of a run with another
        return TrainResult(run.state.model, run.step, run.history, run.evaluations, root, stop.is_set())


class _Run:
    """The mutable part of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        state: TrainState,
        batches: Any,
        checkpoints: Checkpoints | None,
        log: JsonLines,
        bar: Progress,
        on_record: Callable[[Record], None] | None,
    ) -> None:
        self.config, self.corpus, self.state, self.batches = config, corpus, state, batches
        self.checkpoints, self.log, self.bar, self.on_record = checkpoints, log, bar, on_record
        self.dtype = config.resolved_dtype()
        self.step = int(state.step)
        self.metrics: dict[str, Any] = {}
        self.history: list[Record] = []
        self.evaluations: list[Record] = []
        self.logged: list[Record] = []  # by an earlier part of this run

    def record(self, kind: str, **fields: Any) -> Record:
        record = {"kind": kind, "step": self.step, **fields}
        self.log.write(record)
        if self.on_record is not None:
            self.on_record(record)
        return record

    def start(self) -> None:
        self.record(
            "start",
            seed=self.config.seed,
            config=dataclasses.asdict(self.config),
            compute_dtype=self.dtype,
            parameters=num_parameters(self.state.model),
            corpus={
                "train_tokens": len(self.corpus.train),
                "heldout_tokens": len(self.corpus.heldout),
                "fingerprint": self.corpus.fingerprint(),
            },
            **environment(),
        )
        self.logged = self.log.read()

    def advance(self, stop: threading.Event) -> None:
        """Steps until the end of the run or until `stop` is set."""
        config = self.config
        begin, since = time.perf_counter(), self.step
        while self.step < config.steps and not stop.is_set():
            self.state, self.metrics = jit_train_step(
                self.state,
                next(self.batches),
                optimizer=config.optimizer,
                steps=config.steps,
                compute_dtype=self.dtype,
                accumulate=config.accumulate,
                remat=config.remat,
            )
            self.step += 1
            self.bar.advance()
            last = self.step == config.steps
            # Looking at a metric waits for the device, so the steps in between are only queued.
            if self.step % config.log_every == 0 or last or not self.history:
                self._log_step(begin, since)
                begin, since = time.perf_counter(), self.step
            if _due(self.step, config.eval_every) and not last:
                self._evaluate()
                begin, since = time.perf_counter(), self.step
            if _due(self.step, config.checkpoint_every) and not last:
                self.save()
                begin, since = time.perf_counter(), self.step

    def finish(self, *, interrupted: bool) -> None:
        """Saves and, unless the user is waiting for the prompt, evaluates."""
        saved = self.save()
        if interrupted and self.step < self.config.steps:
            where = "nothing was saved (no directory)" if saved is None else f"saved {saved}; resume=True continues"
            self.bar.say(f"Interrupted after step {self.step}: {where}.")
        else:
            self._evaluate()

    def save(self) -> Path | None:
        """Writes a checkpoint unless the last step went wrong; returns its folder, None without a directory."""
        self._finite_metrics()
        if self.checkpoints is None:
            return None
        meta = {
            "config": dataclasses.asdict(self.config),
            "corpus": self.corpus.fingerprint(),
            "data": self.batches.get_state(),
        }
        return self.checkpoints.save(self.state, meta)

    def _finite_metrics(self) -> dict[str, float]:
        """The last step's metrics (empty before any step). A finite gradient means that it left finite parameters."""
        values = {name: float(value) for name, value in self.metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name}: must stay finite, got {values[name]} in step {self.step}. Lower the learning rate "
                    f"(now {values['learning_rate']:.3g}) or warm up longer; earlier checkpoints are kept."
                )
        return values

    def _log_step(self, begin: float, since: int) -> None:
        values = self._finite_metrics()
        seconds = time.perf_counter() - begin
        tokens = (self.step - since) * self.config.batch_size * self.config.length
        rate = tokens / seconds
        values["bits_per_byte"] = bits_per_byte(values["loss"], self.corpus.bytes_per_token)
        self.bar.note(f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s")
        self.history.append(self.record("train", **values, tokens_per_second=rate, seconds=seconds))

    def _evaluate(self) -> None:
        if not len(self.corpus.heldout):
            return
        config, begin = self.config, time.perf_counter()
        result: Evaluation = evaluate(
            self.state.model,
            self.corpus.heldout,
            batch_size=config.batch_size,
            length=config.length,
            max_batches=config.eval_batches,
            bytes_per_token=self.corpus.bytes_per_token,
            compute_dtype=self.dtype,
        )
        seconds = time.perf_counter() - begin
        fields = dataclasses.asdict(result)
        record = {"kind": "eval", "step": self.step, **fields}
        if any(record.items() <= old.items() for old in self.logged if old["kind"] == "eval"):
            self.evaluations.append({**record, "seconds": seconds})  # a finished run, resumed
        else:
            self.evaluations.append(self.record("eval", **fields, seconds=seconds))
        self.bar.say(f"step {self.step}: held-out {result.loss:.4f} nats, {result.bits_per_byte:.4f} bits per byte")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_corpus(config: TrainConfig, corpus: Corpus) -> None:
    for name in ("train", "heldout"):
        tokens, vocab_size = getattr(corpus, name), config.model.vocab_size
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
            raise bad_value(
                f"corpus.{name}",
                f"must hold token ids below vocab_size = {vocab_size}",
                f"{tokens.min()} .. {tokens.max()}",
                "Use the tokenizer of the model; bytes need 256.",
            )
    if len(corpus.heldout) and len(corpus.heldout) <= config.length:
        raise bad_value(
            "corpus.heldout",
            f"must be empty or fill one window of length + 1 = {config.length + 1}",
            len(corpus.heldout),
            "Hold out more text or shorten the windows.",
        )


def _resume_data(config: TrainConfig, corpus: Corpus, batches: Any, meta: dict[str, Any]) -> None:
    """Moves `batches` on to where the checkpoint of `meta` was; raises ValueError where that is one of another run."""
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
    if meta["corpus"] != corpus.fingerprint():
        raise bad_value(
            "corpus",
            f"must be the text of the checkpoint ({meta['corpus']}) to resume",
            corpus.fingerprint(),
            "Pass the same files, held-out fraction and seed, or take another directory.",
        )
    batches.set_state(meta["data"])
