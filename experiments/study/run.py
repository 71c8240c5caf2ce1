"""Runs the study: the same dense model, continued with every variant on the same text, and measured before and after.

    python -m experiments.study.get_model --output models/smollm2-135m
    python -m experiments.study.dense --output runs/study/dense
    python -m experiments.study.run --size gpu --output runs/study            # an hour and a half on one H100
    python -m experiments.study.run --size cpu --output runs/study-cpu        # minutes, a tiny model of its own
    python -m experiments.study.tables runs/study --output experiments/results/study_h200.json

Every arm and seed is a file in OUTPUT/arms; those that are whole are not run again, so a run that was ended goes on. (A
file is there once losses are known; what was ended while tasks were asked is run again.)
Several GPUs share the work with `--shard 0/4` to `3/4`, each in a process of its own. The text is the source of the
packages installed beside this one, whole packages held out; OUTPUT/text.json names all of them with their versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.environment import environment
from experiments.study import measure, tasks, text
from experiments.study.arms import ARMS, SIZES, VARIANTS, Arm, Size, completed, started, training
from experiments.study.dense import small_dense
from experiments.study.held import describe, documents_of, study_text
from nosa_jax import NosaLM, cast, from_pretrained, save_importance, save_pretrained, train, with_attention
from nosa_jax.evals.examples import Example
from nosa_jax.hf import load_tokenizer

RECORDED = ("infllmv2", "nosa", "dma")  # whose selections of seed 0 are kept
KEPT_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Materials:
    """What all arms share. held: the text. asked, lessons: questions, and examples to learn tasks from; none and None
    where the size asks nothing."""

    dense: NosaLM
    held: text.Text
    asked: list[list[Example]]
    lessons: train.Source | None


def jobs(names: list[str] | None, shard: tuple[int, int], seeds: int = 3) -> Iterator[tuple[Arm, int]]:
    """The arms and seeds of one process, at most so many seeds of each; what has several comes first."""
    chosen = [arm for arm in ARMS if names is None or arm.name in names]
    every = [(arm, seed) for seed in range(seeds) for arm in chosen if seed in arm.seeds]
    every.sort(key=lambda job: -len(job[0].seeds))
    return iter(every[shard[0] :: shard[1]])


def shard(written: str) -> tuple[int, int]:
    """INDEX/COUNT as numbers. Raises ArgumentTypeError for what is no part of a whole."""
    index, _, count = written.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be INDEX/COUNT with INDEX from 0 to COUNT - 1, got {written!r}.")
    return int(index), int(count)


def continued(dense: NosaLM, arm: Arm, seed: int, source: train.Source, size: Size) -> tuple[NosaLM, NosaLM, list[Any]]:
    """The model as the arm begins, as it ends, and the log of its training, stage after stage."""
    start = model = started(dense, arm, size, source, seed)
    log: list[Any] = []
    left = whole = round(arm.times * size.steps)
    for stage in arm.stages:
        model = with_attention(model, **arm.attention_of(stage, size))
        steps = round(stage.share * whole)
        model, of_stage = _trained(
            training(arm, size, model, seed + left, steps=steps, trained=stage.trained), model, source
        )
        left, log = left - steps, log + of_stage
    model = with_attention(model, **arm.attention(size))
    model, last = _trained(training(arm, size, model, seed, steps=left, trained=arm.trained), model, source)
    return start, model, log + last


def _trained(run: train.TrainConfig, model: NosaLM, source: train.Source) -> tuple[NosaLM, list[Any]]:
    result = completed(run, source, model=model)
    return result.model, [[record["step"], round(record["loss"], 5)] for record in result.history]


def run_arm(shared: Materials, arm: Arm, seed: int, size: Size, output: Path) -> None:
    """Writes the file of one arm and seed."""
    begin = time.perf_counter()
    start, trained, log = continued(shared.dense, arm, seed, shared.held.source, size)
    found: dict[str, Any] = {
        "arm": arm.name, "seed": seed, "attention": arm.attention(size), "training": log,
        "train_seconds": round(time.perf_counter() - begin, 1), "environment": environment(),
    }  # fmt: skip
    documents = documents_of(shared.held, size)
    if seed == 0 and (arm in VARIANTS or arm.start == "fit"):
        found["before"], _ = measure.quality_and_locality(cast(start, size.dtype), documents, size, arm.name)
    model = cast(trained, size.dtype)
    found["after"], recorded = measure.quality_and_locality(model, documents, size, arm.name)
    if arm.name == "nosa":
        found["other_bias"] = measure.without_exact_bias(model, documents)
    if seed == 0 and arm.name in RECORDED and recorded is not None:
        measure.first_rows(recorded, KEPT_ROWS).save(output / f"selections-{arm.name}.npz")
    if seed == 0 and model.config.attention.uses_importance:
        save_importance(trained, arm_file(output, arm, seed).with_suffix(".safetensors"))
    found["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(arm_file(output, arm, seed), found)
    if shared.lessons is not None and arm.asked:
        found["tasks_before"] = tasks.answers(model, shared.asked) if seed == 0 and arm in VARIANTS else None
        tuned = tasks.tuned(trained, arm, seed, shared.lessons, size)
        found["tasks"] = tasks.answers(cast(tuned, size.dtype), shared.asked)
        if seed == 0 and arm.name == "full":
            save_pretrained(tuned, output / "tuned")  # for `experiments.rivals.quality`
        found["seconds_with_tasks"] = round(time.perf_counter() - begin, 1)
        write_json(arm_file(output, arm, seed), found)
    print(f"{arm.name}, seed {seed}: loss {np.mean(found['after']['losses']):.4f}, {found['seconds']} s", flush=True)


def arm_file(output: Path, arm: Arm, seed: int) -> Path:
    return output / "arms" / f"{arm.name.replace(', ', '_').replace(' ', '-')}-{seed}.json"


def is_done(output: Path, arm: Arm, seed: int, size: Size) -> bool:
    """Whether the file of an arm and seed is there, with answers where it is asked."""
    file = arm_file(output, arm, seed)
    return file.exists() and (not (arm.asked and size.tasks) or "tasks" in json.loads(file.read_text()))


def write_json(file: Path, content: Any) -> None:
    """A file that is whole or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(file)


def materials(size: Size, folder: Path | None, output: Path, asks: bool) -> Materials:
    """What the arms need. folder: of the dense model; None for one that is trained here. asks: whether any arm is asked
    tasks."""
    if folder is None:
        held = study_text(size, None)
        return Materials(small_dense(size, held.source), held, [], None)
    dense = from_pretrained(folder, variant="full")
    tokenizer = load_tokenizer(folder, dense.config.vocab_size)
    held = study_text(size, tokenizer, output / "text.pickle")
    if not asks:
        return Materials(dense, held, [], None)
    lessons = tasks.lessons(tokenizer, folder, size, output / "lessons.jsonl")
    return Materials(dense, held, tasks.questions(tokenizer, size), lessons)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(repr(arm.name) for arm in ARMS)
    parser.add_argument("--size", choices=tuple(SIZES), default="gpu")
    parser.add_argument("--model", type=Path, help="folder of the dense model (gpu); OUTPUT/dense unless given")
    parser.add_argument(
        "--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="NAME", help=f"instead of all: {names}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of an arm, at most")
    parser.add_argument("--shard", type=shard, default=(0, 1), help="which part of the work, INDEX/COUNT")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds: must be at least 1, got {args.seeds}. Leave it out for three.")
    size = SIZES[args.size]
    (args.output / "arms").mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs(args.arms, args.shard, args.seeds) if not is_done(args.output, *job, size)]
    if not todo:
        print(f"nothing to do: {args.output} has all that was asked for.")
        return
    folder = (args.model or args.output / "dense") if args.size == "gpu" else None
    shared = materials(size, folder, args.output, any(arm.asked for arm, _ in todo))
    if args.shard[0] == 0:
        write_json(args.output / "text.json", describe(shared.held, size))
    for arm, seed in todo:
        run_arm(shared, arm, seed, size, args.output)


if __name__ == "__main__":
    main()
