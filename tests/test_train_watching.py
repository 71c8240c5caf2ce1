"""Trackers, profiles and what a run shows: none of them needs a run."""

import copy
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nosa_jax import presets
from nosa_jax.train import Corpus, Profiler, TensorBoard, Tracker, TrainConfig, WandB, as_trackers, train
from nosa_jax.train._progress import Progress, describe
from nosa_jax.train.profile import as_profile_steps
from nosa_jax.train.trackers import scalars

START = {"kind": "start", "step": 0, "config": {"steps": 4, "model": {"layers": 2}}, "directory": None}
STEP = {"kind": "train", "step": 3, "loss": 2.5, "tokens_per_second": 100, "finite": True, "note": "x", "mfu": None}
EVAL = {
    "kind": "eval",
    "step": 4,
    "loss": 2.0,
    "misses": {"8": 0.5, "10": 0.25},
    "bias_by_layer": [1.0, 3.0],
    "loss_by_position": {},
}
TOKENS = np.arange(99)


def test_scalars_are_the_numbers_of_a_record_by_kind():
    assert scalars(STEP) == {"train/loss": 2.5, "train/tokens_per_second": 100.0}
    assert scalars(EVAL) == {
        "eval/loss": 2.0,
        "eval/misses/8": 0.5,
        "eval/misses/10": 0.25,
        "eval/bias_by_layer/0": 1.0,
        "eval/bias_by_layer/1": 3.0,
    }


# --- Trackers ------------------------------------------------------------------------------------------------------


class Remembers:
    """A tracker, and a stand-in for a SummaryWriter and a run of wandb: keeps what it was told."""

    def __init__(self, *args, **options):
        self.told = [("made", args, options)]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: self.told.append((name, args, options))

    def record(self, record):
        self.told.append(("record", (record,), {}))


def package(name, **contents):
    """A module of one name that holds what is given."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


@pytest.fixture
def writers(monkeypatch):
    """The writers that a stand-in for tensorboardX makes."""
    made = []

    def make(*args, **options):
        made.append(Remembers(*args, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "tensorboardX", package("tensorboardX", SummaryWriter=make))
    return made


def test_tensorboard_gets_scalars_below_the_folder_of_the_run(writers, tmp_path):
    tracker = TensorBoard()
    for record in ({**START, "directory": str(tmp_path)}, STEP, EVAL):
        tracker.record(record)
    tracker.close()
    (writer,) = writers
    assert writer.told[0] == ("made", (str(tmp_path / "tensorboard"),), {"purge_step": None})
    added = {args[0]: args[1:] for name, args, _ in writer.told if name == "add_scalar"}
    assert added["train/loss"] == (2.5, 3) and added["eval/misses/8"] == (0.5, 4) and len(added) == 7
    (text,) = [args for name, args, _ in writer.told if name == "add_text"]
    assert text[0] == "config" and '"layers": 2' in text[1]
    assert [name for name, _, _ in writer.told][-2:] == ["flush", "close"]


def test_tensorboard_hides_what_a_resumed_run_takes_again(writers, tmp_path):
    tracker = TensorBoard(tmp_path / "mine")
    tracker.record(START)
    tracker.record({**START, "step": 3})
    assert [writer.told[0][1:] for writer in writers] == [
        ((str(tmp_path / "mine"),), {"purge_step": None}),
        ((str(tmp_path / "mine"),), {"purge_step": 4}),
    ]
    assert writers[0].told[-1][0] == "close"


def test_tensorboard_needs_a_folder(writers):
    with pytest.raises(
        ValueError, match="directory: must be given for TensorBoard where the run has no folder, got No"
    ):
        TensorBoard().record(START)
    with pytest.raises(ValueError, match="directory: must be given for TensorBoard"):  # before anything is computed
        train(TrainConfig(presets.tiny(), length=8), Corpus(TOKENS, TOKENS), trackers=[print, "tensorboard"])
    as_trackers(TensorBoard("mine")).check(None)
    assert not writers


@pytest.mark.slow
def test_tensorboard_writes_files(tmp_path):
    pytest.importorskip("tensorboardX")
    with as_trackers("tensorboard") as trackers:
        for record in ({**START, "directory": str(tmp_path)}, STEP):
            trackers.record(record)
        assert len(trackers) == 1  # it did not fail
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_wandb_gets_scalars_and_the_configuration(monkeypatch, tmp_path):
    runs = []

    def init(**options):
        runs.append(Remembers(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", package("wandb", init=init))
    tracker = WandB("mine", mode="offline")
    for record in ({**START, "directory": str(tmp_path)}, STEP, {"kind": "note", "step": 3}):
        tracker.record(record)
    tracker.close()
    options = {"project": "mine", "mode": "offline", "config": START["config"], "dir": str(tmp_path)}
    logged = ("log", ({"train/loss": 2.5, "train/tokens_per_second": 100.0},), {"step": 3})
    assert runs[0].told == [("made", (), options), logged, ("finish", (), {})]


def test_a_tracker_that_raises_is_dropped_with_one_warning():
    seen = []

    class Broken:
        def record(self, record):
            raise OSError("no space left")

        def close(self):
            seen.append("closed")

    with as_trackers([Broken(), seen.append]) as trackers:
        with pytest.warns(RuntimeWarning, match="the tracker Broken gets no more records: OSError: no space left"):
            trackers.record(STEP)
        trackers.record(EVAL)  # warnings are errors here: there is no second one
        assert len(trackers) == 1
    assert seen == [STEP, EVAL]


def test_an_interruption_is_no_failure_of_a_tracker():
    def interrupt(record):
        raise KeyboardInterrupt

    trackers = as_trackers(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trackers.record(STEP)
    assert len(trackers) == 1


def test_trackers_are_told_in_order_and_closed():
    seen, tracker = [], Remembers()
    assert isinstance(tracker, Tracker)
    before = copy.deepcopy(STEP)
    with as_trackers((tracker, seen.append)) as trackers:
        trackers.record(STEP)
    assert [name for name, _, _ in tracker.told] == ["made", "record", "close"] and seen == [STEP] == [before]
    with as_trackers(trackers) as again:  # of another run, which drops one
        again.record(EVAL)
        again._trackers.pop()
    assert [name for name, _, _ in tracker.told[3:]] == ["record", "close"] and len(trackers) == 2
    assert len(as_trackers(None)) == 0 and len(as_trackers(seen.append)) == 1


def test_what_is_no_tracker_is_refused(monkeypatch, without_type_checker):
    with pytest.raises(ValueError, match=r"trackers: must be among \['tensorboard', 'wandb'\], got 'mlflow'"):
        as_trackers(["mlflow"])
    for value in (7, [7], [TensorBoard], {"tensorboard"}):
        with pytest.raises(TypeError, match="trackers: must be trackers"):
            as_trackers(value)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ImportError, match=r'tensorboardX is needed for logs for TensorBoard: pip install "nosa-jax\[te'
    ):
        as_trackers("tensorboard")


# --- Profiles ------------------------------------------------------------------------------------------------------


class Trace:
    """Stands for a result that is waited for."""

    def __init__(self, events, step):
        self.block_until_ready = lambda: events.append(("waited", step))


def events_of(monkeypatch, tmp_path, steps, taken):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: events.append(("start", directory)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(("stop",)))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: x and x.block_until_ready())
    with Profiler(tmp_path, steps) as profiler:
        for step in taken:
            profiler.before(step, Trace(events, step - 1))
            events.append(step)
            profiler.after(step, Trace(events, step))
    return events


def test_a_profile_is_of_its_steps(monkeypatch, tmp_path):
    begin = [("waited", 2), ("start", tmp_path)]
    events = events_of(monkeypatch, tmp_path, (3, 4), range(1, 7))
    assert events == [1, 2, *begin, 3, 4, ("waited", 4), ("stop",), 5, 6]
    events = events_of(monkeypatch, tmp_path, (1, 4), range(3, 7))  # resumed in the middle
    assert events == [*begin, 3, 4, ("waited", 4), ("stop",), 5, 6]
    events = events_of(monkeypatch, tmp_path, (3, 9), range(3, 5))  # interrupted
    assert events == [*begin, 3, 4, ("stop",)]
    assert events_of(monkeypatch, tmp_path, None, range(1, 3)) == [1, 2]


def test_a_profile_lies_in_its_folder(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    with Profiler(tmp_path / "profile", (2, 2)) as profiler:
        for step in range(1, 4):
            profiler.before(step)
            result = double(jnp.float32(step))
            profiler.after(step, result)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("steps", [(0, 1), (3, 2), (1.5, 2), 3, (1, 2, 3), "12"])
def test_steps_of_a_profile_that_cannot_be_are_refused(steps):
    with pytest.raises((TypeError, ValueError), match="profile_steps: must"):
        as_profile_steps("profile_steps", steps)


def test_steps_of_a_profile_are_numbers_in_order():
    assert as_profile_steps("profile_steps", [2, 2]) == (2, 2) and as_profile_steps("profile_steps", None) is None


# --- What is shown -------------------------------------------------------------------------------------------------


def test_a_step_is_described_by_what_is_known():
    assert describe(STEP) == "loss 2.500, 100 tokens/s"
    assert describe({**STEP, "mfu": 0.4149, "skipped": 0}) == "loss 2.500, 100 tokens/s, MFU 41%"
    assert describe({**STEP, "skipped": 1}) == "loss 2.500, 100 tokens/s, 1 step skipped"
    assert describe({**STEP, "skipped": 2.0}).endswith(", 2 steps skipped")


@pytest.mark.parametrize("steps", [1, 4, 20, 1000])
def test_progress_in_a_file_is_the_first_and_last_step_and_tenths(capsys, monkeypatch, steps):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    with Progress(steps, 0, shown=True) as progress:
        for step in range(1, steps + 1):
            progress.advance()
            progress.note(f"loss {step}")
    lines = [int(line.split("/")[0].removeprefix("step ")) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == 1 and lines[-1] == steps and len(lines) == min(steps, 11)


def test_progress_in_a_file_of_a_long_run_goes_by_time_too(capsys, monkeypatch):
    clock = iter(range(0, 10**6, 2))  # two seconds a look
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with Progress(10**6, 0, shown=True) as progress:
        for step in range(100):
            progress.advance()
            progress.note(f"loss {step}")
    assert 15 <= len(capsys.readouterr().err.splitlines()) <= 30
