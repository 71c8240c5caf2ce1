"""Runs the study: the same dense model, continued with every variant on the same text, and measured before and after.

    python -m experiments.study.get_model --output models/smollm2-135m
    python -m experiments.study.run --size gpu --output runs/study            # an hour and a half on one H100
    python -m experiments.study.run --size cpu --output runs/study-cpu        # minutes, a tiny model of its own
    python -m experiments.study.tables runs/study --output experiments/results/study_h100.json

Every arm and seed is a file in OUTPUT/arms; those that are there are not run again, so a run that was ended goes on. (A
file is there once losses are known: what was ended while tasks were asked stays without their answers.)
Several GPUs share the work with `--shard 0/4` to `3/4`, each in a process of its own. The text is the source of the
packages installed beside this one, whole packages held out; OUTPUT/text.json names all of them with their versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from experiments.environment import environment
from experiments.study import measure, text
from experiments.study.arms import ARMS, SIZES, Arm, Size, started, training
from nosa_jax import NosaLM, cast, from_pretrained, presets, train
from nosa_jax.hf import load_tokenizer
from nosa_jax.train import OptimizerConfig, TrainConfig

HELD_OUT = 0.25
DOCUMENTS_PER_PACKAGE = 6
CHARACTERS = 400_000  # of each package
RECORDED = ("infllmv2", "nosa", "dma")  # whose selections of seed 0 are kept
KEPT_ROWS = 2


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


def small_dense(size: Size, source: train.Source) -> NosaLM:
    """A dense model for a CPU, trained here on the text that the arms are continued on."""
    config = presets.tiny(variant="full")
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", weight_decay=0.0)
    run = TrainConfig(
        config, optimizer, steps=10 * size.steps, batch_size=size.batch_size, length=size.length, seed=100,
        eval_every=0, eval_batches=1, checkpoint_every=0,
    )  # fmt: skip
    return train.train(run, source).model


def continued(dense: NosaLM, arm: Arm, seed: int, source: train.Source, size: Size) -> tuple[NosaLM, NosaLM, list[Any]]:
    """The model as the arm begins, as it ends, and the log of its training."""
    start = started(dense, arm, size, source, seed)
    result = train.train(training(arm, size, start, seed), source, model=start, progress=sys.stderr.isatty())
    if result.interrupted:  # what half a training gives must not count as the arm
        raise KeyboardInterrupt
    return start, result.model, [[record["step"], round(record["loss"], 5)] for record in result.history]


def run_arm(dense: NosaLM, arm: Arm, seed: int, held: text.Text, tokenizer: Any, size: Size, output: Path) -> None:
    """Writes the file of one arm and seed."""
    begin = time.perf_counter()
    start, model, log = continued(dense, arm, seed, held.source, size)
    found: dict[str, Any] = {
        "arm": arm.name, "seed": seed, "attention": arm.attention(size), "training": log,
        "train_seconds": round(time.perf_counter() - begin, 1), "environment": environment(),
    }  # fmt: skip
    documents = documents_of(held, size)
    if seed == 0:
        found["before"], _ = measure.quality_and_locality(cast(start, size.dtype), documents, size, arm.name)
    model = cast(model, size.dtype)
    found["after"], recorded = measure.quality_and_locality(model, documents, size, arm.name)
    if arm.name == "nosa":
        found["other_bias"] = measure.without_exact_bias(model, documents)
    if seed == 0 and arm.name in RECORDED and recorded is not None:
        measure.first_rows(recorded, KEPT_ROWS).save(output / f"selections-{arm.name}.npz")
    found["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(arm_file(output, arm, seed), found)
    if seed == 0:
        found["tasks"] = measure.answers(model, tokenizer, size)
        write_json(arm_file(output, arm, seed), found)
    print(f"{arm.name}, seed {seed}: loss {np.mean(found['after']['losses']):.4f}, {found['seconds']} s", flush=True)


def arm_file(output: Path, arm: Arm, seed: int) -> Path:
    return output / "arms" / f"{arm.name.replace(', ', '_').replace(' ', '-')}-{seed}.json"


def write_json(file: Path, content: Any) -> None:
    """A file that is whole or not there."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(file)


def documents_of(held: text.Text, size: Size) -> Int32[np.ndarray, "N T"]:
    """Held-out documents, as many as the size asks for, spread over all there are."""
    rows = held.source.heldout_rows()
    chosen = np.linspace(0, len(rows) - 1, min(size.documents, len(rows))).round().astype(int)
    return np.stack([np.asarray(rows[int(n)].tokens, np.int32) for n in chosen])


def study_text(size: Size, tokenizer: Any) -> text.Text:
    return text.packages_source(
        text.packages(), tokenizer, size.length, block_size=size.block_size, heldout_fraction=HELD_OUT,
        documents_per_package=DOCUMENTS_PER_PACKAGE, most_characters=CHARACTERS,
    )  # fmt: skip


def describe(held: text.Text, size: Size) -> dict[str, Any]:
    """Which text it was."""
    versions = {}
    owners = importlib.metadata.packages_distributions()
    for name in text.packages():
        dists = sorted(set(owners.get(name, [])))  # which name one twice that was installed in two ways
        versions[name] = [f"{dist} {importlib.metadata.version(dist)}" for dist in dists]
    return {
        "packages": versions, "fingerprint": held.source.fingerprint(), "train_tokens": held.source.train_tokens,
        "documents": len(documents_of(held, size)), "of": len(held.heldout), "heldout": sorted(set(held.heldout)),
        "overlap_mean": float(np.mean(held.overlap)), "overlap_max": float(np.max(held.overlap)),
        "dropped": held.dropped,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="gpu")
    parser.add_argument(
        "--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the dense model (gpu)"
    )
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="instead of all")
    parser.add_argument("--seeds", type=int, default=3, help="of an arm, at most")
    parser.add_argument("--shard", type=shard, default=(0, 1), help="which part of the work, INDEX/COUNT")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    size, real = SIZES[args.size], args.size == "gpu"
    (args.output / "arms").mkdir(parents=True, exist_ok=True)
    dense = from_pretrained(args.model, variant="full") if real else None
    tokenizer = None if dense is None else load_tokenizer(args.model, dense.config.vocab_size)
    held = study_text(size, tokenizer)
    if args.shard[0] == 0:
        write_json(args.output / "text.json", describe(held, size))
    dense = small_dense(size, held.source) if dense is None else dense
    for arm, seed in jobs(args.arms, args.shard, args.seeds):
        if not arm_file(args.output, arm, seed).exists():
            run_arm(dense, arm, seed, held, tokenizer, size, args.output)


if __name__ == "__main__":
    main()
