"""What a run leaves in its folder, and how it goes on after kills, signals, damage and streams that are gone."""

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import CONFIG, CORPUS, interrupt_at, leaves_equal, new_state

from nosa_jax import save_pretrained
from nosa_jax._paths import only_run
from nosa_jax.train import Checkpoints, load_model, loop, read_log, train
from nosa_jax.train._interrupt import interrupt_flag

pytestmark = pytest.mark.usefixtures("undrawn")

STEPS = dataclasses.replace(CONFIG, checkpoint_every=3, eval_every=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 6 steps, with checkpoints of steps 3 and 6, and what `train` returned."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(STEPS, CORPUS, folder, progress=False)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with only_run("directory", tmp_path):
        rule = rf"directory: must be a folder without another run in it, got {tmp_path}, which process {os.getpid()} on"
        with pytest.raises(ValueError, match=rule):
            train(CONFIG, CORPUS, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
    (tmp_path / "letter.txt").touch()
    with pytest.raises(
        ValueError, match=rf"directory: must be new, empty, or .*, got {tmp_path} with letter.txt\. Name"
    ):
        train(CONFIG, CORPUS, tmp_path, progress=False)
    with only_run("directory", tmp_path / "new" / "folder"):
        pass


def test_a_run_leaves_a_picture_where_it_can(run, monkeypatch):
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    monkeypatch.setattr(loop, "plot_run", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match=rf"no picture of {run}: ZeroDivisionError"):
        assert train(STEPS, CORPUS, run, resume=True, progress=False).step == 6


def test_numbers_of_numpy_become_those_of_python(without_type_checker):
    """They are logged and saved as JSON."""
    optimizer = dataclasses.replace(CONFIG.optimizer, beta1=np.float32(0.5), weight_decay=np.int64(1))
    fields = {"steps": np.int64(1), "seed": np.int32(0), "remat": np.bool_(False)}
    told = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(CONFIG, optimizer=optimizer, **fields))))
    assert told["steps"] == 1 and told["remat"] is False and told["optimizer"]["beta1"] == 0.5
    assert type(dataclasses.replace(CORPUS, bytes_per_token=np.float64(2)).bytes_per_token) is float
    with pytest.raises(TypeError, match=r"TrainConfig.remat: must be True or False, got 1"):
        dataclasses.replace(CONFIG, remat=1)


# --- The log -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", b"\n", b'{"kind": "tr', b"\0\0\0\0", b"\xff\xfe", b'{"kind": "train", "ste'])
def test_a_cut_last_line_of_the_log_is_dropped(run, end):
    log = run / "log.jsonl"
    whole = read_log(log)
    log.write_bytes(log.read_bytes().removesuffix(b"\n") + (b"\n" + end if end.strip() else end))
    assert read_log(log) == whole
    train(STEPS, CORPUS, run, resume=True, progress=False)
    lines = log.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [record["kind"] for record in [*whole, whole[0]]]


@pytest.mark.parametrize("line", ["{", "[]", "7", "{}", '{"kind": "train"}', '{"kind": 1, "step": 2}', "[" * 9999])
def test_other_lines_in_a_log_are_skipped_with_a_word(tmp_path, line):
    log = tmp_path / "log.jsonl"
    record = {"kind": "start", "step": 0}
    log.write_text(f"{json.dumps(record)}\n{line}\n{json.dumps(record)}\n")
    with pytest.warns(UserWarning, match="skipped line 2 of .*log.jsonl, which is no record"):
        assert read_log(log) == [record, record]


def test_a_finished_run_that_is_resumed_says_so_and_logs_its_evaluation_once(run, capsys):
    kinds = lambda: [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert kinds().count("eval") == 1
    seen = []
    for _ in range(2):
        resumed = train(STEPS, CORPUS, run, resume=True, on_record=seen.append)
        assert [record["step"] for record in resumed.evaluations] == [6]
        assert capsys.readouterr().out.startswith("All 6 steps were done before, and there are none to take.\n")
    assert kinds().count("eval") == 1 and {record["kind"] for record in seen} == {"start"}
    other = dataclasses.replace(STEPS, eval_batches=1)  # something new to say
    train(other, CORPUS, run, resume=True, progress=False)
    assert kinds().count("eval") == 2
    assert len([record for record in read_log(run / "log.jsonl") if record["kind"] == "eval"]) == 1


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    """JSON has no others. Functions get them as they are, and pictures and summaries take both."""
    seen, numbers = [], {"own": math.nan, "other": -math.inf, "third": 1.0}
    options = {"evaluation": lambda model: numbers, "on_record": seen.append}
    for resume in (False, True):  # evaluated again, with nothing new to say
        train(STEPS, CORPUS, tmp_path, resume=resume, progress=False, **options)
    refuse = lambda constant: pytest.fail(constant)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    [told] = [record for record in seen if record["kind"] == "eval"]
    [logged] = [r for line in lines if (r := json.loads(line, parse_constant=refuse))["kind"] == "eval"]
    assert [logged[name] for name in numbers] == [None, None, 1.0] and math.isnan(told["own"])


# --- Checkpoints ---------------------------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate(file: Path, size: int = 0) -> None:
    os.truncate(file, size)


DAMAGE = {
    "an empty folder": empty,
    "no meta": lambda step: shutil.rmtree(step / "meta"),
    "no model": lambda step: shutil.rmtree(step / "model"),
    "no optimizer": lambda step: shutil.rmtree(step / "optimizer"),
    "a cut meta": lambda step: truncate(step / "meta" / "metadata", 100),
    "another meta": lambda step: (step / "meta" / "metadata").write_text('{"layout": 2}'),
    "a list for a meta": lambda step: (step / "meta" / "metadata").write_text("[]"),
    "emptied weights": lambda step: [truncate(file) for file in (step / "model").rglob("d/*")],
    "a cut description": lambda step: truncate(step / "optimizer" / "_METADATA", 300),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops its other reads
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, run, name):
    DAMAGE[name](run / "checkpoints" / "6")
    named = r"directory: must hold whole checkpoints, got .*/checkpoints/6, which is damaged \(.+\). The one before"
    if name != "no optimizer" and name != "a cut description":
        with pytest.raises(ValueError, match=named):
            load_model(run / "checkpoints")
    assert load_model(run / "checkpoints", step=3).config == CONFIG.model
    with pytest.warns(UserWarning, match=rf"{named} it is of step 3. It is now .*damaged-6-.*, and the run goes on"):
        resumed = train(STEPS, CORPUS, run, resume=True, progress=False)
    assert [record["step"] for record in resumed.history] == [4, 5, 6]
    assert leaves_equal(resumed.model, finished[1].model)
    assert leaves_equal(load_model(run / "checkpoints"), resumed.model)


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "UNKNOWN"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fault_that_passes_moves_no_checkpoint(run, monkeypatch, code, wrapped):
    """TensorStore tells of it by a ValueError; Orbax raises an Exception from it where it reads the array's content."""
    manager = ocp.CheckpointManager
    restore, faults = manager.restore, iter([ValueError(f"{code}: Error opening local file: Too many open files")])

    def fail_once(self, step, args):
        for fault in faults if "model" in args else ():
            if wrapped:
                raise Exception("Encountered error while reading array index: 0") from fault
            raise fault
        return restore(self, step, args=args)

    monkeypatch.setattr(manager, "restore", fail_once)
    with pytest.raises(Exception, match=code if not wrapped else "Encountered error while reading"):
        train(STEPS, CORPUS, run, resume=True, progress=False)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}
    assert train(STEPS, CORPUS, run, resume=True, progress=False).history == []


def edit_meta(step: Path, change: Callable[[dict], object]) -> None:
    file = step / "meta" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


CHANGES_OF_META = {
    "no data": lambda meta: meta.pop("data"),
    "an empty position": lambda meta: meta.update(data={}),
    "a list for a position": lambda meta: meta.update(data=[]),
    "a position behind the end": lambda meta: meta.update(data={"next_index": -1}),
    "no text": lambda meta: meta.pop("corpus"),
    "a list for a configuration": lambda meta: meta.update(config=[]),
    "no model": lambda meta: meta["config"].pop("model"),
    "a list for the positions": lambda meta: meta["config"]["model"].update(rope=[]),
    "a number for the attention": lambda meta: meta["config"]["model"].update(attention=3),
    "a model without a size": lambda meta: meta["config"]["model"].pop("num_layers"),
}


@pytest.mark.parametrize("name", CHANGES_OF_META)
def test_a_damaged_meta_is_a_damaged_checkpoint(run, name):
    edit_meta(run / "checkpoints" / "6", CHANGES_OF_META[name])
    with pytest.warns(UserWarning, match=r"checkpoints/6, which is damaged .* It is now .*damaged-6-"):
        resumed = train(STEPS, CORPUS, run, resume=True, progress=False)
    assert [record["step"] for record in resumed.history] == [4, 5, 6]


@pytest.mark.parametrize("part", [None, "rope", "attention"])
def test_fields_of_a_later_version_are_named_and_nothing_is_moved(run, part):
    def add(meta: dict) -> None:
        model = meta["config"]["model"]
        (model if part is None else model[part])["num_dreams"] = 3

    edit_meta(run / "checkpoints" / "6", add)
    owner = {None: "ModelConfig", "rope": "RopeConfig", "attention": "AttentionConfig"}[part]
    named = rf"{owner}: must have fields of this version only, got \['num_dreams'\]. A later version"
    with pytest.raises(ValueError, match=named):
        train(STEPS, CORPUS, run, resume=True, progress=False)
    with pytest.raises(ValueError, match=named):
        load_model(run / "checkpoints")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}


def test_a_position_in_an_older_order_is_no_damage(run):
    for step in ("3", "6"):
        edit_meta(run / "checkpoints" / step, lambda meta: meta["data"].pop("order"))
    with pytest.raises(ValueError, match=r"state: must be a position in the order .* train on from its weights"):
        train(STEPS, CORPUS, run, resume=True, progress=False)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}


def test_where_no_checkpoint_is_whole_the_newest_is_named(run):
    for step in ("3", "6"):
        empty(run / "checkpoints" / step)
    with pytest.raises(ValueError, match=r"got .*/checkpoints/6, which is damaged"):
        train(STEPS, CORPUS, run, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"got .*/checkpoints/3, which is damaged .* There is none before it"):
        load_model(run / "checkpoints", step=3)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3", "6"}  # nothing was moved


def test_a_checkpoint_older_than_a_field_of_the_configuration_is_resumed(run):
    """The field has its default then; another value is another run."""
    for step in ("3", "6"):
        edit_meta(run / "checkpoints" / step, lambda meta: meta["config"]["model"].pop("qk_norm"))
    assert train(STEPS, CORPUS, run, resume=True, progress=False).step == 6
    other = dataclasses.replace(STEPS, model=dataclasses.replace(STEPS.model, qk_norm=True))
    with pytest.raises(
        ValueError, match=r"^TrainConfig.model: must be as in the checkpoint to resume, got qk_norm=True instead of"
    ):
        train(other, CORPUS, run, resume=True, progress=False)


def test_a_run_that_goes_on_holds_one_state(run, tmp_path, monkeypatch):
    """The checkpoint's alone: nothing is drawn, and the weights that the run began with are not loaded."""
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(new_state()))
    before = {id(array) for array in jax.live_arrays()}
    held = lambda: sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    restore, sizes = ocp.CheckpointManager.restore, []

    def watched(*args, **kwargs):
        sizes.append(held())
        return restore(*args, **kwargs)

    save_pretrained(new_state().model, tmp_path / "model")
    monkeypatch.setattr(ocp.CheckpointManager, "restore", watched)
    monkeypatch.setattr(loop, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    on_record = lambda record: sizes.append(held())
    model = tmp_path / "model"
    resumed = train(STEPS, CORPUS, run, model=model, resume=True, progress=False, on_record=on_record)
    assert resumed.model.origin.model_type == "nosa_llama"
    assert len(sizes) >= 3 and max(sizes) < 1.05 * state, (sizes, state)


def test_leftovers_of_killed_saves_are_cleaned_by_the_run_alone(run):
    leftover = run / "checkpoints" / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "meta").write_text("half of it")
    load_model(run / "checkpoints")
    assert leftover.is_dir()  # a run may just be writing it
    train(STEPS, CORPUS, run, resume=True, progress=False)
    assert not leftover.exists()


def test_a_checkpoint_that_would_not_be_kept_is_refused(tmp_path):
    state = new_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=jax.numpy.int32(5)), {})
        with pytest.raises(ValueError, match=r"state.step: must lie above the newest step saved in .*, 5, got 4"):
            checkpoints.save(dataclasses.replace(state, step=jax.numpy.int32(4)), {})


# --- Signals and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_saves(tmp_path, name, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def on_record(record):
        if record["kind"] == "train" and record["step"] == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as a shell and the kernel do when a terminal closes

    result = train(CONFIG, CORPUS, tmp_path, progress=False, on_record=on_record)
    assert result.interrupted and result.step == 2 and (tmp_path / "checkpoints" / "2").is_dir()
    assert signal.getsignal(number) is before
    assert capsys.readouterr() == ("", "")  # progress=False


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_so(tmp_path, name):
    """SIGINT in the background of a script, SIGHUP under nohup."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        on_record = lambda record: os.kill(os.getpid(), number)
        assert not train(CONFIG, CORPUS, tmp_path, progress=False, on_record=on_record).interrupted
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_that_is_not_of_python_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it could not be put back"))
    with interrupt_flag() as flag:
        assert not flag.is_set()


def test_a_signal_in_the_last_step_is_told(tmp_path):
    result = train(CONFIG, CORPUS, tmp_path, progress=False, on_record=interrupt_at(CONFIG.steps))
    assert result.interrupted and result.step == CONFIG.steps and result.evaluations[-1]["step"] == CONFIG.steps


class Gone(io.StringIO):
    """A stream whose other end is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Gone(), closed()], ids=["none", "gone", "closed"])
def test_a_run_goes_on_without_streams(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    result = train(CONFIG, CORPUS, tmp_path, on_record=interrupt_at(4))
    assert result.step == 4 and (tmp_path / "checkpoints" / "4").is_dir()


def test_progress_in_a_file_is_a_few_lines(capsys):
    train(dataclasses.replace(CONFIG, eval_every=0), CORPUS)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/6" for step in range(1, 7)]
    assert "\r" not in "".join(lines) and np.all(["tokens/s" in line for line in lines])
