"""Training in several processes, and what a process knows of its part."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sources import made

import nosa_jax
from nosa_jax import parallel, presets, processes, train
from nosa_jax.cli.train import as_sizes
from nosa_jax.train.feed import Feed, _rows_here

WORKER = Path(__file__).parent / "train_processes.py"


def start(folder: Path, count: int, axes: str, steps: int, variant: str, trouble: str) -> list[tuple[int, str, str]]:
    """How each process of a run ended: its code, what it printed, and its errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, *map(str, (index, count, port, folder, axes, steps, variant, trouble))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=WORKER.parent,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for index in range(count)
    ]
    try:
        done = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(started, done, strict=True)]


def run(folder: Path, count: int, axes: str, steps: int, variant: str = "full", trouble: str = "none") -> list[Any]:
    """What each process of a run says."""
    ended = start(folder, count, axes, steps, variant, trouble)
    for code, _, errors in ended:
        assert code == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "meshes"),
    [
        ("full", [(2, "data=2,fsdp=2"), (4, "fsdp=2,tensor=2"), (2, "data=2,context=2")]),
        ("nosa", [(2, "fsdp=2,tensor=2"), (2, "data=2,context=2")]),
    ],
)
def test_several_processes_train_as_one(tmp_path, variant, meshes):
    """Against one process: the same losses and the same folder, and one log."""
    [alone] = run(tmp_path / "1", 1, "data=2,fsdp=2", 6, variant)
    for count, axes in meshes:
        folder = tmp_path / f"{count}-{axes}"
        for said in run(folder, count, axes, 6, variant):
            np.testing.assert_allclose(said["train"], alone["train"], rtol=1e-5)
            np.testing.assert_allclose(said["eval"], alone["eval"], rtol=1e-5)
        log = train.read_log(folder / "log.jsonl")
        assert [record["step"] for record in log if record["kind"] == "train"] == list(range(1, 7))
        assert [record["kind"] for record in log].count("start") == 1
        ours, theirs = (nosa_jax.from_pretrained(path / "model") for path in (folder, tmp_path / "1"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_runs_go_on_in_other_numbers_of_processes(tmp_path):
    """Begun by two, where a signal to one ends both after the same step; gone on with by four and by one."""
    first = run(tmp_path, 2, "data=4", 6, trouble="signal")
    assert [(said["step"], said["interrupted"]) for said in first] == [(3, True)] * 2
    second, third = (
        run(tmp_path, count, axes, steps)[0] for count, axes, steps in ((4, "fsdp=4", 4), (1, "data=2,tensor=2", 6))
    )
    assert [len(part["train"]) for part in (first[0], second, third)] == [3, 1, 2]
    log = [record for record in train.read_log(tmp_path / "log.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in log] == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "first", "last"),
    [
        ("write", "OSError: No space left on device", "OtherProcessError: training failed in another process"),
        ("read", "OtherProcessError: training failed in another process", "OSError: no more text"),
        ("save", "OtherProcessError: writing the checkpoint before failed in", "OSError: no more room"),
        ("nan", "FloatingPointError: loss: must stay finite", "FloatingPointError: loss: must stay finite"),
    ],
)
def test_what_fails_in_one_process_ends_all(tmp_path, trouble, first, last):
    begin = time.monotonic()
    ended = start(tmp_path, 2, "data=2,fsdp=2", 10**6, "full", trouble)
    assert time.monotonic() - begin < 120  # and not the minutes after which JAX misses a process
    for (code, _, errors), said in zip(ended, (first, last), strict=True):
        assert code == 1 and said in errors, errors[-3000:]
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == (set() if trouble == "nan" else {"2"})
    assert len(list(tmp_path.glob("not_finite-*.npz"))) == (2 if trouble == "nan" else 0)


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_for_one_process_is_moved_aside_by_all(tmp_path):
    run(tmp_path, 2, "data=2,fsdp=2", 4)
    parts = sorted((tmp_path / "checkpoints" / "4" / "model").glob("ocdbt.process_1/d/*"))
    assert parts
    for part in parts:
        os.truncate(part, 0)
    again = run(tmp_path, 2, "data=2,fsdp=2", 4)
    assert [len(said["train"]) for said in again] == [2, 2]
    names = {path.name.partition("-")[0] for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "4", "damaged"}


@pytest.mark.slow
def test_a_signal_before_a_run_ends_the_process(tmp_path):
    """JAX's own service for several processes would swallow it."""
    [(code, _, errors), *_] = start(tmp_path, 2, "data=4", 2, "full", "early signal")
    assert code == -signal.SIGTERM, errors[-3000:]


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(shape), parallel.AXES)


def test_one_process_is_all_processes():
    assert processes.is_writer()
    assert processes.any_of(True) and not processes.any_of(False)
    with pytest.raises(ValueError, match="here"), processes.failing_together("a test"):
        raise ValueError("here")
    with processes.writing("a test") as writes:
        assert writes
    peers = processes.Peers()
    assert [peers.settle(stop) for stop in (False, True)] == [False, True]
    with pytest.raises(ValueError, match="here"), peers.holding():  # nobody else has to hear of it
        raise ValueError("here")
    assert processes.whole({"a": jax.numpy.ones(2)})["a"].shape == (2,)


@pytest.mark.parametrize(
    ("given", "missing"),
    [({"num_processes": 2}, "coordinator_address and process_id"), ({"process_id": 0, "num_processes": 2}, "coord")],
)
def test_parts_of_an_address_are_refused(given, missing):
    with pytest.raises(ValueError, match=f"^{missing}.*: must be given with"):
        parallel.initialize(**given)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("coordinator_address should be defined."),
            "^coordinator_address: must be given where JAX finds no",
        ),
        (RuntimeError("must be called before any JAX calls"), "^initialize: must be called before anything else"),
    ],
)
def test_what_keeps_a_process_from_joining_is_said(monkeypatch, error, said):
    def refuse(*_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match=said):
        parallel.initialize()


def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch):
    sharding = NamedSharding(mesh_of((1, 1, 1, 1)), PartitionSpec(("data", "fsdp")))

    def rows(*slices: slice) -> tuple[int, int]:
        found = {index: (part, slice(None)) for index, part in enumerate(slices)}
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda *_: found)
        return _rows_here(sharding, (8, 16))

    assert rows(slice(None)) == (0, 8)
    assert rows(slice(2, 4), slice(2, 4)) == (2, 2)
    assert rows(slice(4, 6), slice(6, 8)) == (4, 4)
    assert rows(slice(0, 2), slice(6, 8)) == (0, 8)  # not side by side: all are read
    assert rows(slice(2, 4), slice(4, 6)) == (0, 8)  # no whole share of four


def test_batches_on_a_mesh_are_the_source_s():
    corpus = train.Corpus(np.arange(400, dtype=np.int32) % 250, np.arange(100, dtype=np.int32))
    config = train.TrainConfig(presets.tiny(), batch_size=2, length=32)
    source = corpus.source(32)
    feed, plain = Feed(source, config, mesh_of((1, 1, 1, 1))), Feed(source, config, None)
    for _ in range(2):
        for a, b in zip(jax.tree.leaves(next(feed)), jax.tree.leaves(next(plain)), strict=True):
            assert isinstance(a, jax.Array) and isinstance(b, np.ndarray)
            np.testing.assert_array_equal(a, b)
    state = feed.get_state()
    assert state == plain.get_state()
    following = next(feed)
    plain.set_state(state)
    np.testing.assert_array_equal(following.tokens, next(plain).tokens)
    assert len(list(feed.heldout(1))) == 1


def test_what_was_read_is_counted_without_padding():
    config = train.TrainConfig(presets.tiny(), batch_size=2, length=32)
    feed = Feed(made(count=8, size=9, length=32), config, None)  # two documents of 12 places with padding to a row
    for batches in (1, 2):
        for _ in range(batches):
            next(feed)
        assert feed.take_documents() == ({9: 4 * batches}, 18 / 32)
    whole = Feed(made(count=100, size=9, length=32, pack=False), config, None)
    next(whole)
    assert whole.take_documents() == ({32: 2}, 1.0)


@pytest.mark.parametrize(
    ("text", "sizes"), [("", {}), ("data=2", {"data": 2}), ("fsdp=4, tensor=-1", {"fsdp": 4, "tensor": -1})]
)
def test_meshes_are_written_as_sizes(text, sizes):
    assert as_sizes(text) == sizes


@pytest.mark.parametrize("text", ["rows=2", "data", "data=", "data=two", "data=2,data=2", "data=2,,fsdp=2"])
def test_other_words_for_meshes_are_refused(text):
    with pytest.raises(ValueError, match=r"^--mesh: must be sizes of axes among data, fsdp"):
        as_sizes(text)
