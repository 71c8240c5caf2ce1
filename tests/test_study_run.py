"""How the study is run: what each process does, and that a run that was ended goes on."""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from support import small_config

from experiments.study import dense, held, run, tasks
from experiments.study.arms import ARMS, SIZES
from nosa_jax import NosaLM, evals, train

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
    found = held.documents_of(Held(Source()), SIZE)
    assert found.dtype == np.int32 and found[:, 0].tolist() == [0, 2, 5]
    many = dataclasses.replace(SIZE, documents=100)
    assert held.documents_of(Held(Source()), many)[:, 0].tolist() == list(range(6))


@pytest.fixture
def faked(monkeypatch):
    """A run without its models: what was trained, by arm and seed, and measures that say so."""
    trained = []
    attention = argparse.Namespace(uses_importance=False)
    model = argparse.Namespace(config=argparse.Namespace(attention=attention))

    def continued(dense, arm, seed, source, size):
        if len(trained) == trained_at_most[0]:
            raise KeyboardInterrupt
        trained.append((arm.name, seed))
        return model, model, [[10, 2.0]]

    trained_at_most = [2]
    shared = run.Materials(model, Held(Source()), [["a question"]], "lessons")
    monkeypatch.setattr(run, "materials", lambda size, folder, output, asks: shared)
    monkeypatch.setattr(run, "describe", lambda held, size: {"documents": 3})
    monkeypatch.setattr(run, "continued", continued)
    monkeypatch.setattr(run, "cast", lambda model, dtype: model)
    monkeypatch.setattr(run, "save_importance", lambda model, path: None)
    monkeypatch.setattr(run, "save_pretrained", lambda model, path: None)
    monkeypatch.setattr(run.measure, "quality_and_locality", lambda *_: ({"losses": [[1.0]]}, None))
    monkeypatch.setattr(run.measure, "without_exact_bias", lambda *_: {"none": [[1.0]]})
    monkeypatch.setattr(run.tasks, "answers", lambda *_: [{"task": "mqar"}])
    monkeypatch.setattr(run.tasks, "tuned", lambda model, *_: model)
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
    assert {"before", "tasks", "tasks_before"} <= set(first) and "tasks" in second
    assert "before" not in second and second["tasks_before"] is None
    assert first["training"] == [[10, 2.0]] and second["other_bias"] == {"none": [[1.0]]}
    assert "other_bias" not in json.loads((tmp_path / "arms" / "full-0.json").read_text())


def test_losses_are_kept_where_tasks_are_ended(faked, tmp_path, monkeypatch):
    trained, at_most = faked
    at_most[0] = 100
    monkeypatch.setitem(run.SIZES, "cpu", dataclasses.replace(SIZE, tasks=("mqar",)))
    answers = run.tasks.answers
    monkeypatch.setattr(run.tasks, "answers", lambda *_: 1 / 0)
    call = lambda: run.main(["--size", "cpu", "--output", str(tmp_path), "--arms", "full", "--seeds", "1"])
    with pytest.raises(ZeroDivisionError):
        call()
    assert "after" in json.loads((tmp_path / "arms" / "full-0.json").read_text())
    monkeypatch.setattr(run.tasks, "answers", answers)
    call()
    call()
    assert trained == [("full", 0)] * 2  # again for its answers, and then no more
    assert "tasks" in json.loads((tmp_path / "arms" / "full-0.json").read_text())


def test_the_dense_model_is_of_no_seed_that_arms_have(monkeypatch):
    runs = []
    done = argparse.Namespace(model=None, interrupted=False)
    monkeypatch.setattr(train, "train", lambda config, source, **_: runs.append(config) or done)
    dense.small_dense(SIZE, None)
    started = argparse.Namespace(config=small_config())
    dense.trained_on(started, SIZE, None)
    assert runs[0].model.attention.variant == "full"
    done.interrupted = True
    for train_dense in (lambda: dense.small_dense(SIZE, None), lambda: dense.trained_on(started, SIZE, None)):
        with pytest.raises(KeyboardInterrupt):
            train_dense()
    for one in runs:
        assert one.steps == SIZE.dense_steps and one.seed not in {seed for arm in ARMS for seed in arm.seeds}


def test_stages_come_first_and_take_no_steps_more(monkeypatch):
    runs = []

    def trained(config, source, *, model, progress):
        runs.append(config)
        return argparse.Namespace(model=model, interrupted=False, history=[{"step": config.steps, "loss": 1.0}])

    monkeypatch.setattr(train, "train", trained)
    arm = next(arm for arm in ARMS if arm.name == "nosa, importance first")
    start, model, log = run.continued(jax.eval_shape(small_dense_model), arm, 0, None, SIZE)
    assert [config.steps for config in runs] == [SIZE.steps // 4, SIZE.steps - SIZE.steps // 4] and len(log) == 2
    assert runs[0].model.attention.num_selected_blocks == 4 * runs[1].model.attention.num_selected_blocks
    assert runs[0].seed != runs[1].seed == 0
    assert start.config == model.config == runs[1].model


def small_dense_model():
    return NosaLM(small_config().with_attention(variant="full"), rngs=nnx.Rngs(0))


def test_lessons_are_of_no_unseen_task_and_other_text(monkeypatch, tmp_path):
    """Conversations of every other task that is asked, hidden in text of packages that are trained on."""
    wanted = []
    size = dataclasses.replace(SIZE, tasks=("mqar", "niah_single", tasks.UNSEEN), block_size=16, length=64)

    def made(tokenizer, entries):
        wanted.extend(entries)
        return [[argparse.Namespace(prompt="What?\nIt is", answer=" 7")] for _ in entries]

    monkeypatch.setattr(tasks, "made", made)
    monkeypatch.setattr(tasks, "haystack", lambda: "hay")
    monkeypatch.setattr(tasks.train, "chat", lambda files, *_, **__: files)
    (file,) = tasks.lessons(None, tmp_path, size, tmp_path / "lessons.jsonl")
    assert {entry[0] for entry in wanted} == {"mqar", "niah_single"}
    assert {entry[3] for entry in wanted} == {tasks.TAUGHT_SEED} != {0} and {entry[4] for entry in wanted} == {"hay"}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(wanted) and lines[0]["messages"][0] == {"role": "user", "content": "What?"}
    assert lines[0]["messages"][1] == {"role": "assistant", "content": "It is 7."}
    asked = tasks.made(None, [])
    assert asked == [] and tasks.lessons(None, tmp_path, size, file) == [file]  # what is there is not made again


def test_answers_are_counted_by_task_and_length(monkeypatch):
    read = [evals.Forced(-2.0, 4, 4), evals.Forced(-4.0, 2, 1)]
    monkeypatch.setattr(tasks.evals, "score_answers", lambda model, examples: read[: len(examples)])
    example = argparse.Namespace(task="mqar", length=64)
    both, one = tasks.answers(None, [[example] * 2, [example]])
    assert both == {
        "task": "mqar", "length": 64, "count": 2, "exact": 0.5, "tokens": 0.8333, "log_likelihood": -1.0,
    }  # fmt: skip
    assert one["exact"] == 1.0 and one["count"] == 1
