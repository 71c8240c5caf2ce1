"""Training: what is asked for is checked, opened and resumed, and the run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from nosa_jax import parallel, processes
from nosa_jax._extras import import_extra, missing_modules
from nosa_jax._paths import only_run, user_path
from nosa_jax._pytree import by_name
from nosa_jax.hf.load import from_pretrained, outline
from nosa_jax.model import NosaLM
from nosa_jax.origin import Origin
from nosa_jax.train._interrupt import interrupt_flag
from nosa_jax.train._progress import Progress
from nosa_jax.train.checkpoint import Checkpoints
from nosa_jax.train.config import TrainConfig
from nosa_jax.train.data import Corpus, OtherOrderError, Source
from nosa_jax.train.feed import Feed, as_source
from nosa_jax.train.fields import differences, model_config_from_dict
from nosa_jax.train.folder import CHECKPOINTS_NAME, LOG_NAME, PICTURE_NAME, PROFILE_NAME, check_run_folder
from nosa_jax.train.log import JsonLines, Record
from nosa_jax.train.optim import OptimizerConfig
from nosa_jax.train.patterns import matches, split
from nosa_jax.train.plots import plot_run
from nosa_jax.train.profile import Profiler
from nosa_jax.train.run import Run
from nosa_jax.train.step import Loss, TrainState, init_state
from nosa_jax.train.trackers import as_trackers
from pallas_kernels.checks import bad_type, bad_value, require_type
from pallas_kernels.device import default_device

_SAME = "Use the same value, or take another directory."


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
    model: NosaLM | str | os.PathLike[str] | None = None,
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
    model: to start from, e.g. for continued pretraining; None draws weights with `config.seed`. Its configuration must
        be `config.model`. A NosaLM is copied: what the caller keeps of it stays where it is during the run. The path
        of a Hugging Face folder is loaded, attending as `config.model` does, only where the run starts from it, and
        nothing of it is kept.
    mesh: devices that share the work, see `nosa_jax.parallel.make_mesh`; None for those that `model` lies on.
    optimizer: an optax transformation instead of `config.optimizer`.
    loss: what is minimised instead of the next-token loss; see `train_step`.
    evaluation: numbers of your own, made of the model whenever it is evaluated; they go into the record.
    resume: continue from the newest checkpoint in `directory` that is whole (from the start if there is none at all)
        on exactly the batches that would have come. The model's configuration, the seed, the batches and the text must
        be as they were, and so must what trains and how moments are kept; the mesh, the number of processes and all
        else may change. The checkpoint alone is then put onto the devices, and of `model` nothing is. A run that was
        done before is evaluated as it is.
    progress: whether a bar is shown on standard error.
    on_record: called with every log record.
    trackers: what else is told of the run: "tensorboard", "wandb", a Tracker, or several of them; see `as_trackers`.

    A record of kind `train` holds step, loss (nats), bits_per_byte, learning_rate, grad_norm, norms by group, `skipped`
    (steps so far that were not finite and changed nothing), and tokens_per_second (without padding) and mfu (see
    `train.mfu`; None for an unknown card) over the `seconds` since the record before (the first one includes
    compiling). One of kind `eval` holds what `Evaluation` does, and seconds; one of kind `start` tells how the run was
    made. At the end all that becomes a picture in `directory`, training.png, where matplotlib is installed.

    Ctrl-C, SIGTERM and SIGHUP let the current step end, save, and return what there is; a second Ctrl-C stops at once.
    Of several processes all end after the same step. Where one fails while it reads batches or writes its log, the
    others do too, with a RuntimeError (`nosa_jax.parallel.OtherProcessError`).

    Raises ValueError for text shorter than a window or out of the vocabulary, for a directory that another run uses,
    that holds other things than a run or, without `resume`, checkpoints, for a checkpoint of another run or of more
    than `config.steps` steps, and for a mesh that does not divide what it cuts; FloatingPointError after
    `config.max_skipped` steps in a row whose loss or gradient is not finite.
    """
    import_extra("tqdm")
    source = as_source(config, source)
    root = None if directory is None else user_path("directory", directory).resolve()
    if mesh is not None:
        require_type("mesh", mesh, Mesh, "Make one with nosa_jax.parallel.make_mesh.")
    elif isinstance(model, NosaLM):
        mesh = parallel.concrete_mesh(model)
    origin = _check_model(config, model)
    _check_processes(mesh, source)
    told = as_trackers(trackers)  # made everywhere, so that what cannot be made ends all processes
    told.check(root)
    if not processes.is_writer():
        told = as_trackers(None)
    if config.profile_steps is not None and (root is None or config.profile_steps[0] > config.steps):
        rule = f"must begin within the {config.steps} steps of a run that has a directory"
        raise bad_value("TrainConfig.profile_steps", rule, config.profile_steps, "Pass a directory, or earlier steps.")
    feed = Feed(source, config, mesh)
    like = _state_shapes(config, model, mesh, optimizer)

    with contextlib.ExitStack() as stack:
        checkpoints = None
        if root is not None:
            with processes.failing_together("opening the directory"):
                if processes.is_writer():
                    check_run_folder("directory", root)
                    stack.enter_context(only_run("directory", root))
            checkpoints = stack.enter_context(
                Checkpoints(
                    root / CHECKPOINTS_NAME,
                    keep=config.keep_checkpoints,
                    keep_every=config.keep_every,
                    clean=True,
                    background=True,
                )
            )
            if checkpoints.latest_step() is not None and not resume:
                raise bad_value(
                    "directory",
                    "must not hold checkpoints yet",
                    f"step {checkpoints.latest_step()} in {checkpoints.directory}",
                    "Pass resume=True to continue it, or take another directory.",
                )
        writes = processes.is_writer()
        watching = stack.enter_context(contextlib.ExitStack())
        with processes.failing_together("opening the log"):
            log = watching.enter_context(JsonLines(root / LOG_NAME if root is not None and writes else None))
            watching.enter_context(told)
            traced = config.profile_steps if root is not None and writes else None
            profiler = watching.enter_context(Profiler((root or Path()) / PROFILE_NAME, traced))
        # Memory is spent from here on, and for one state.
        is_new = checkpoints is None or checkpoints.latest_step() is None
        if checkpoints is None or is_new:
            with processes.failing_together("making the first state"):
                state = _first_state(config, model, mesh, optimizer)
        else:
            _check_steps(config, checkpoints)
            state = checkpoints.restore_newest(like, partial(_resume, config, source, feed, like.model, optimizer))
        del model
        bar = watching.enter_context(Progress(config.steps, int(state.step), shown=progress and writes))
        stop = stack.enter_context(interrupt_flag())
        tell = [told.record] if on_record is None or not writes else [told.record, on_record]
        options = {"optimizer": optimizer or config.optimizer, "loss": loss}
        run = Run(config, source, state, feed, checkpoints, log, bar, tell, profiler, options, evaluation)
        run.start(root)
        if resume and root is not None and is_new:
            run.say(f"There is no checkpoint in {root}: from the start.")
        run.peers.settle(False)  # what fails so early does so before anything is compiled
        run.advance(stop)
        run.finish()
        with run.peers.holding():
            watching.close()
            if root is not None and writes:
                _draw(root)
        run.state.model.origin = origin  # the compiled step may be that of a run with another
        interrupted = run.peers.settle(stop.is_set())
        return TrainResult(run.state.model, run.step, run.history, run.evaluations, root, interrupted)


def _draw(root: Path) -> None:
    """The picture of a run, where it can be drawn: it must not cost a run that is done."""
    if missing_modules("plots"):
        return
    try:
        plot_run(root, root / PICTURE_NAME)
    except Exception as error:
        warnings.warn(f"no picture of {root}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def _check_processes(mesh: Mesh | None, source: Source) -> None:
    """Raises ValueError where some process would have no part in the run, or all of them the same, or another text."""
    if jax.process_count() == 1:
        return
    taking_part = set() if mesh is None else {device.process_index for device in mesh.devices.flat}
    if len(taking_part) < jax.process_count():
        rule = f"must have devices of all {jax.process_count()} processes"
        got = f"those of {sorted(taking_part)}" if taking_part else None
        raise bad_value("mesh", rule, got, "Pass parallel.make_mesh(data=-1), for example.")
    if processes.differs(zlib.crc32(source.fingerprint().encode())):
        rule = "must be the same in all processes"
        raise bad_value("source", rule, f"{source.fingerprint()} here", "Give all of them the same files.")


def _check_model(config: TrainConfig, model: NosaLM | str | os.PathLike[str] | None) -> Origin:
    """Where the model to start from comes from. Raises ValueError where it is another than that of `config`."""
    if model is None:
        return Origin()
    if not isinstance(model, NosaLM | str | os.PathLike):
        rule, remedy = "must be a NosaLM or the path of a folder", "Pass nosa_jax.from_pretrained(path), or the path."
        raise bad_type("model", rule, f"{type(model).__name__} {model!r:.60}", remedy)
    found = model if isinstance(model, NosaLM) else outline(model, attention=_attention(config))
    if found.config != config.model:
        got = f"one with {differences(found.config, config.model)}"
        remedy = "Change one of them: nosa_jax.with_attention changes the variant."
        raise bad_value("model", "must be of TrainConfig.model", got, remedy)
    return found.origin


def _attention(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config.model.attention)


def _draw_model(config: TrainConfig) -> NosaLM:
    return NosaLM(config.model, rngs=nnx.Rngs(config.seed))


def _state_shapes(config: TrainConfig, model: Any, mesh: Mesh | None, optimizer: Any) -> TrainState:
    """The state of a run as shapes, which say where its arrays are to lie."""
    shapes = jax.eval_shape(partial(_draw_model, config))
    split(shapes, config.trainable, argument="TrainConfig.trainable")  # refuses what matches nothing
    if mesh is not None:
        shapes = parallel.shard(shapes, mesh)
    else:
        given = jax.tree.leaves(model) if isinstance(model, NosaLM) else []
        place = given[0].sharding if given else jax.sharding.SingleDeviceSharding(default_device())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return init_state(shapes, optimizer or config.optimizer, config.trainable)


def _first_state(config: TrainConfig, model: Any, mesh: Mesh | None, optimizer: Any) -> TrainState:
    """The state before the first step, on its devices."""
    if isinstance(model, NosaLM):
        model = model if mesh is None else parallel.shard(model, mesh)
    elif model is not None:
        model = from_pretrained(model, attention=_attention(config), mesh=mesh)
    elif mesh is None:
        model = _draw_model(config)
    else:  # drawn where it is kept: a large one fits no single device
        draw = partial(_draw_model, config)
        model = jax.jit(draw, out_shardings=parallel.shardings(jax.eval_shape(draw), mesh))()
    state = init_state(model, optimizer or config.optimizer, config.trainable)
    # Committed to its device as restored arrays are: otherwise the step would compile twice.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _check_steps(config: TrainConfig, checkpoints: Checkpoints) -> None:
    """Raises ValueError for a run that took more steps than it is to have: none would lead to what was asked for."""
    step = checkpoints.latest_step()
    if step is not None and step > config.steps:
        rule = f"must be at least {step}, the steps that were taken before in {checkpoints.directory}"
        raise bad_value("TrainConfig.steps", rule, config.steps, "Raise it, or take another directory.")


def _resume(config: TrainConfig, source: Source, feed: Feed, model: Any, optimizer: Any, meta: dict[str, Any]) -> None:
    """Moves `feed` on to where the checkpoint of `meta` was; raises ValueError where that is one of another run.

    model: of shapes. optimizer: what is used instead of the one of `config`, or None.
    """
    saved = meta["config"]
    # As configurations, so that a field which is younger than the checkpoint has its default.
    saved = {**saved, "model": model_config_from_dict(saved["model"])}
    for name in ("model", "seed", "batch_size", "length"):
        now = getattr(config, name)
        if saved[name] != now:
            is_model = name == "model"  # of many fields, few of which differ
            rule = f"must be {'as' if is_model else f'{saved[name]} as'} in the checkpoint to resume"
            got = differences(now, saved[name]) if is_model else now
            raise bad_value(f"TrainConfig.{name}", rule, got, _SAME)
    # The moments that were kept are of what trained then. Other patterns may say the same.
    patterns = tuple(saved.get("trainable", TrainConfig.trainable))
    if any(matches(patterns, name) != matches(config.trainable, name) for name in by_name(model)):
        rule = f"must train what {' '.join(patterns)} does, as in the checkpoint to resume"
        raise bad_value("TrainConfig.trainable", rule, " ".join(config.trainable), _SAME)
    kept, dtype = saved["optimizer"].get("moment_dtype", OptimizerConfig.moment_dtype), config.optimizer.moment_dtype
    if optimizer is None and kept != dtype:
        rule = f"must be {kept} as in the checkpoint to resume"
        raise bad_value("OptimizerConfig.moment_dtype", rule, dtype, _SAME)
    if meta["corpus"] != source.fingerprint():
        raise bad_value(
            "corpus",
            f"must be the text of the checkpoint ({meta['corpus']}) to resume",
            source.fingerprint(),
            "Pass the same files, held-out fraction and seed, or take another directory.",
        )
    try:
        feed.set_state(meta["data"])
    except OtherOrderError:
        raise
    except ValueError as error:  # it is no position: damage, and not another run
        raise LookupError(str(error)) from error
