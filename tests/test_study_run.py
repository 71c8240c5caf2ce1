"""How the study is run: what each process does, and that a run that was ended goes on."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest

from experiments.study import run
from experiments.study.arms import ARMS, SIZES
from nosa_jax import train

SIZE = dataclasses.replace(SIZES["cpu"], documents=3)


@pytest.mark.parametrize("count", [1, 3, 4, 100])
def test_shards_have_every_job_once(count):
    found = [job for index in range(count) for job in run.jobs(None, (index, count))]
    expected = [(arm, seed) for arm in ARMS for seed in arm.seeds]
    assert len(found) == len(expected) == len(set(found)) and set(found) == set(expected)


def test_arms_of_several_seeds_come_first():
    numbers = [len(arm.seeds) for arm, _ in run.jobs(None, (0, 1))]
    assert numbers == sorted(numbers, reverse=True)
    assert [(arm.name, seed) for arm, seed in run.jobs(["nosa", "nosa, half"], (0, 1))] == [
        ("nosa", 0),
        ("nosa", 1),
        ("nosa", 2),
        ("nosa, half", 0),
    ]


def test_a_shard_is_a_part_of_a_whole():
    assert run.shard("0/1") == (0, 1) and run.shard("3/4") == (3, 4)
    for wrong in ("4/4", "0/0", "-1/4", "1", "a/b", "1/2/3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be INDEX/COUNT with INDEX from 0 to COUNT - 1"):
            run.shard(wrong)


def test_files_of_arms_are_whole_and_of_their_own(tmp_path):
    files = {run.arm_file(tmp_path, arm, seed) for arm in ARMS for seed in arm.seeds}
    assert len(files) == len(list(run.jobs(None, (0, 1)))) and all(file.suffix == ".json" for file in files)
    assert len({file.with_suffix(".partial") for file in files}) == len(files)
    assert not any(set(" ,") & set(file.name) for file in files)
    file = tmp_path / "one.json"
    run.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


@dataclasses.dataclass
class Held:
    """What of a `Text` a run asks for."""

    source: object


class Source:
    def heldout_rows(self):
        return [argparse.Namespace(tokens=np.full(8, n)) for n in range(6)]


def test_documents_are_spread_over_all():
    found = run.documents_of(Held(Source()), SIZE)
    assert found.dtype == np.int32 and found[:, 0].tolist() == [0, 2, 5]
    many = dataclasses.replace(SIZE, documents=100)
    assert run.documents_of(Held(Source()), many)[:, 0].tolist() == list(range(6))


@pytest.fixture
def faked(monkeypatch):
    """A run without its models: what was trained, by arm and seed, and measures that say so."""
    trained = []
    model = argparse.Namespace(config=None)

    def continued(dense, arm, seed, source, size):
        if len(trained) == trained_at_most[0]:
            raise KeyboardInterrupt
        trained.append((arm.name, seed))
        return model, model, [[10, 2.0]]

    trained_at_most = [2]
    monkeypatch.setattr(run, "study_text", lambda size, tokenizer: Held(Source()))
    monkeypatch.setattr(run, "describe", lambda held, size: {"documents": 3})
    monkeypatch.setattr(run, "small_dense", lambda size, source: model)
    monkeypatch.setattr(run, "continued", continued)
    monkeypatch.setattr(run, "cast", lambda model, dtype: model)
    monkeypatch.setattr(run.measure, "quality_and_locality", lambda *_: ({"losses": [[1.0]]}, None))
    monkeypatch.setattr(run.measure, "without_exact_bias", lambda *_: {"none": [[1.0]]})
    monkeypatch.setattr(run.measure, "answers", lambda *_: [{"task": "mqar"}])
    return trained, trained_at_most


def test_a_run_that_was_ended_goes_on(faked, tmp_path):
    trained, at_most = faked
    call = lambda *more: run.main(["--size", "cpu", "--output", str(tmp_path), "--arms", "full", "nosa", *more])
    with pytest.raises(KeyboardInterrupt):
        call()
    assert trained == [("full", 0), ("nosa", 0)]
    at_most[0] = 100
    call()
    call()
    assert sorted(trained) == [(name, seed) for name in ("full", "nosa") for seed in range(3)]  # each once
    assert json.loads((tmp_path / "text.json").read_text()) == {"documents": 3}
    first, second = (json.loads((tmp_path / "arms" / f"nosa-{seed}.json").read_text()) for seed in (0, 1))
    assert {"before", "tasks"} <= set(first) and not {"before", "tasks"} & set(second)
    assert first["training"] == [[10, 2.0]] and second["other_bias"] == {"none": [[1.0]]}
    assert "other_bias" not in json.loads((tmp_path / "arms" / "full-0.json").read_text())


def test_losses_are_kept_where_tasks_are_ended(faked, tmp_path, monkeypatch):
    monkeypatch.setattr(run.measure, "answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main(["--size", "cpu", "--output", str(tmp_path), "--arms", "full"])
    assert "after" in json.loads((tmp_path / "arms" / "full-0.json").read_text())


def test_the_small_dense_model_is_of_no_seed_that_arms_have(monkeypatch):
    runs = []
    monkeypatch.setattr(train, "train", lambda config, source: runs.append(config) or argparse.Namespace(model=None))
    run.small_dense(SIZE, None)
    assert runs[0].model.attention.variant == "full" and runs[0].seed not in {s for arm in ARMS for s in arm.seeds}
